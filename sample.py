"""Ask a checkpoint, or a run finetuned from it:

    python sample.py [--model FOLDER] [--adapter RUN] [--prompt TEXT]

Without --prompt, each line of standard input is a prompt, with --chat of one conversation. The text goes
into the template the run was trained with, or into a base's own chat markup, if that is known. Without
--model and --adapter it asks the last run of the demonstration. Only answers go to standard output.
"""

from cli.chat import conversation
from cli.memory import ready_to_answer
from cli.process import Failed, command
from cli.settings import ASKED, PROMPT, SAMPLING, check_idle, last_demonstration, new_parser
from cli.terminal import Stream, at_terminal, bars, prompts, say, say_loaded, whole_prompt
from files.run import load_run
from text.examples import encode_prompt, stop_id, template_named


def ask(bitune, tokenizer, prompt, stop_ids, args):
    """Stream one answer to standard output; say how fast it came, and if it was cut; return its text."""
    limit = min(args.max_new_tokens, bitune.model.config.max_length - len(prompt))
    shown = Stream(tokenizer, args.stop)
    try:
        for (token,) in bitune.answer([prompt], limit, stop_ids, args.temperature, args.top_k, args.top_p,
                                      args.seed):
            if shown.add(token):
                break
    except KeyboardInterrupt:
        if args.prompt is not None or not at_terminal():
            raise
        shown.ended = True                              # enough of this answer
    say(shown.finish(len(prompt), limit))
    return shown.shown


@command
def main(argv=None):
    args = new_parser(__doc__, ASKED, PROMPT, SAMPLING).parse_args(argv)
    demonstrates = not (args.model or args.adapter)
    args.prompt = whole_prompt(args.prompt)
    args.adapter = last_demonstration() if demonstrates else args.adapter
    bitune, tokenizer, n, about = load_run(args.adapter, args.model, args.device, args.dtype)
    template = about["template"] if about else "auto"
    template = template_named(args.template or template, tokenizer, otherwise="plain")
    turns = [] if args.system is None else [("system", args.system)]
    encode = lambda text: encode_prompt(tokenizer, template, [*turns, ("user", text)])
    stop_ids = tokenizer.stop_ids | ({stop_id(tokenizer, template)} if template != "plain" else set())
    begin = encode(args.prompt or "")           # which is refused now, if it is
    bitune.model.config.check_length(len(begin) + 1)
    if args.prompt is None and args.show_mixing:
        raise ValueError("--show-mixing shows how a prompt is mixed: give --prompt")
    if not args.temperature:
        check_idle(vars(args), ("top_k", "top_p"), "without a --temperature above 0", SAMPLING)
    if args.prompt is not None:
        check_idle(vars(args), ["chat"], "with --prompt", PROMPT)
    if args.prompt is not None and not begin:
        raise ValueError("--prompt is empty: expected some text")
    mixing = bars(bitune, begin) if args.show_mixing else ""
    bitune = conversation(ready_to_answer(bitune), template, args.chat)
    say_loaded(args.adapter or args.model, n, bitune, about, template, tokenizer)
    say(mixing)
    if demonstrates and args.prompt is None:
        say("It knows the words of experiments/demo/language.py. Unseen questions: data/test.jsonl there.")
    failed = False
    for prompt in prompts() if args.prompt is None else [args.prompt]:
        try:
            answer = ask(bitune, tokenizer, encode(prompt), stop_ids, args)
            if args.chat:
                turns += [("user", prompt), ("assistant", answer)]
        except (ValueError, FloatingPointError) as problem:     # one that is too long does not end the
            print()                                             # others, nor shift their answers
            say(f"error: {problem}" + "; the next line begins a new conversation" * bool(turns))
            turns, failed = turns[:args.system is not None], True
    if failed:
        raise Failed("")


if __name__ == "__main__":
    main()
