"""Ask a checkpoint, or a run finetuned from it:

    python sample.py [--model FOLDER] [--adapter RUN] [--prompt TEXT]

Without --prompt, each line of standard input is a prompt, with --chat of one conversation; a terminal asks
for it. The text goes into the template the run was trained with, or a base's own chat markup; else it is
the prompt as it stands. A run names its base, so --model is not needed; without both it is the last run of
the demonstration. The answer goes to standard output, everything else to standard error.
"""

import sys
from pathlib import Path

from cli.chat import conversation
from cli.explain import explain
from cli.memory import fold_for_answers
from cli.process import before_work, run_main
from cli.settings import DEMO, add_chat, add_run, add_sampling, flag_adder, last_demonstration, new_parser
from cli.terminal import Stream, bars, prompts, say, say_loaded, whole_prompt
from files.run import load_run
from text.examples import encode_prompt, settle, stop_id
from text.rows import read_rows


def ask(bitune, tokenizer, prompt, stop_ids, args):
    """Stream one answer to standard output; say how fast it came, and if it was cut; return its text."""
    limit = min(args.max_new_tokens, bitune.model.config.max_length - len(prompt))
    shown = Stream(tokenizer, args.stop)
    try:
        for (token,) in bitune.answer([prompt], limit, stop_ids, args.temperature, args.top_k, args.top_p,
                                      args.seed):
            if shown.add(token):
                break
    except KeyboardInterrupt:                           # enough of this answer
        shown.ended = True
    say(shown.finish(len(prompt), limit))
    return shown.shown


def main(argv=None):
    parser = new_parser(__doc__)
    arg = flag_adder(parser)
    add_run(arg)
    arg("--prompt", metavar="TEXT", help="what to ask; -: all of standard input, as one prompt")
    arg("--prompt-file", metavar="FILE", help="a file with the prompt, which may have several lines")
    arg("--stop", metavar="TEXT", action="append", default=[], help="ends an answer, too; may be repeated")
    arg("--show-mixing", action="store_true", help="show how --prompt is mixed, layer by layer")
    arg("--explain", action="store_true", help="show what becomes of --prompt, step by step")
    add_sampling(arg)
    add_chat(arg)
    args = parser.parse_args(argv)
    demonstrates = not (args.model or args.adapter)
    with before_work():
        args.prompt = whole_prompt(args.prompt, args.prompt_file)
        args.adapter = last_demonstration() if demonstrates else args.adapter
        bitune, tokenizer, n, about = load_run(args.adapter, args.model, args.device, args.dtype)
        template = about.get("template", "plain") if about else "auto"
        template = settle(args.template or template, tokenizer, otherwise="plain")
        turns = [("system", args.system)] if args.system is not None else []
        encode = lambda text: encode_prompt(tokenizer, template, [*turns, ("user", text)])
        stop_ids = tokenizer.stop_ids | ({stop_id(tokenizer, template)} if template != "plain" else set())
        first = encode(args.prompt or "")
        bitune.model.config.check_length(len(first) + 1)
        if args.prompt is not None and not first:
            raise ValueError("--prompt is empty: expected some text")
        if args.prompt is None and (args.explain or args.show_mixing):
            raise ValueError("--explain and --show-mixing show what becomes of a prompt: give --prompt")
        page = bars(bitune, first) if args.show_mixing else ""
        page = explain(bitune, tokenizer, first, stop_ids) if args.explain else page    # which has the bars
        bitune = conversation(fold_for_answers(bitune), template, args.chat)
    say_loaded(args.adapter or args.model, n, bitune, about, template, tokenizer)
    if page:
        say(page)
    if demonstrates and args.prompt is None:
        say("It knows the words of experiments/demo/language.py. Questions that it has not seen:\n")
        unseen = [row["prompt"] for _, row in read_rows(Path(DEMO["val_data"]).with_name("test.jsonl"))]
        say("\n".join(unseen[:3]) + "\n")
    failed = False
    for prompt in prompts() if args.prompt is None else [args.prompt]:
        try:
            answer = ask(bitune, tokenizer, encode(prompt), stop_ids, args)
            if args.chat:
                turns += [("user", prompt), ("assistant", answer)]
        except (ValueError, FloatingPointError) as problem:     # one that is too long does not end the
            print()                                             # others, nor shift their answers
            say(f"error: {problem}")
            failed = True
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
