"""Ask a checkpoint, or a run finetuned from it:

    python sample.py [--model FOLDER] [--adapter RUN] [--prompt TEXT]

Without --prompt, each line of standard input is a prompt; in a terminal, you are asked for one. With a run,
the text goes into the template the run was trained with; without, the text is the prompt as it stands. A
run names its base, so --model may be left away; without both it is the last run of the demonstration. The
answer goes to standard output, everything else to standard error.
"""

import sys
import time
from itertools import islice
from pathlib import Path

from lora import read_json
from text.examples import encode_prompt, stop_id
from text.rows import read_rows
from train import DEMO, DTYPES, fail, load_run, new_parser, number, set_up_streams


def make_parser():
    parser = new_parser(__doc__)
    arg = parser.add_argument
    arg("--model", metavar="FOLDER", help="base model: a checkpoint folder (default: the run's own)")
    arg("--adapter", metavar="RUN", help="a run of train.py, or a PEFT LoRA adapter")
    arg("--prompt", metavar="TEXT", help="what to ask")
    arg("--show-mixing", action="store_true", help="draw the mixing coefficients of the run, layer by layer")
    arg("--max-new-tokens", type=number(int, 1), default=256, help="longest answer (default: 256)")
    arg("--temperature", type=number(float, 0), default=0.0, help="0 takes the likeliest token (default: 0)")
    arg("--top-k", type=number(int, 0), default=0, help="draw from the k likeliest; 0: all (default: 0)")
    arg("--top-p", type=number(float, 1e-9, 1), default=1.0,
        help="draw from the likeliest that make up this mass (default: 1)")
    arg("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the draw (default: 0)")
    arg("--dtype", choices=DTYPES, help="of the base model (default: bfloat16 on a GPU, float32 on a CPU)")
    arg("--device", help="cpu, cuda or mps (default: cuda if there is one, else cpu)")
    return parser


def say(text):
    print(text, file=sys.stderr, flush=True)


def draw_mixing(bitune):
    """α of each layer, for keys and for values, as bars: empty is the causal pass, full the second."""
    width = 30
    lines = [f"{'layer':>5}  {'α of the keys':<{width + 6}}  α of the values"]
    for layer, pair in enumerate(zip(*(a.tolist() for a in bitune.alpha()))):
        bars = [f"{a:.3f} " + ("█" * round(a * width)).ljust(width, "·") for a in pair]
        lines.append(f"{layer:>5}  " + "  ".join(bars))
    return "\n".join(lines)


def last_demonstration():
    """The newest run below runs/ that was finetuned from the demonstration's base."""
    saves = [f for f in Path("runs").rglob("bitune.json") if read_json(f).get("base") == DEMO["model"]]
    if not saves:
        raise ValueError("no run of the demonstration below runs/: python train.py makes one in a minute; "
                         "or give --model or --adapter")
    return max(saves, key=lambda f: f.stat().st_mtime).parent


def ask(bitune, tokenizer, prompt, stop_ids, args):
    """Stream one answer to standard output, then say how fast it came."""
    ids, shown, start, first = [], "", time.perf_counter(), None
    options = (args.max_new_tokens, stop_ids, args.temperature, args.top_k, args.top_p, args.seed)
    try:
        for (token,) in bitune.answer([prompt], *options):
            first = first or time.perf_counter()
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):             # else the rest of a character is still to come
                print(text[len(shown):], end="", flush=True)
                shown = text
    except KeyboardInterrupt:                           # enough of this answer
        pass
    end = time.perf_counter()
    print(tokenizer.decode(ids)[len(shown):], flush=True)
    speed = f"prompt: {len(prompt)} tokens, {len(prompt) / ((first or end) - start):,.0f} tokens/s"
    if len(ids) > 1:
        speed += f"; answer: {len(ids)} tokens, {(len(ids) - 1) / (end - first):,.0f} tokens/s"
    say(f"[{speed}]")


def main(argv=None):
    set_up_streams()
    args = make_parser().parse_args(argv)
    try:
        demonstrates = not (args.model or args.adapter)
        if demonstrates:
            args.adapter = last_demonstration()
        bitune, tokenizer, n, about = load_run(args.adapter, args.model, args.device, args.dtype)
        template = about.get("template", "plain")
        if args.show_mixing and not bitune.mixes:
            raise ValueError("--show-mixing: " + (
                "give --adapter, a run whose method mixes" if not args.adapter else
                f"{args.adapter} was trained with method {bitune.method}, which mixes nothing"))
        stop_ids = tokenizer.stop_ids | ({stop_id(tokenizer, template)} if about else set())
        encode = lambda text: encode_prompt(tokenizer, template, [("user", text)])
        if args.prompt is not None:
            bitune.model.config.check_length(len(encode(args.prompt)) + 1)
            if not encode(args.prompt):
                raise ValueError("--prompt is empty: expected some text")
    except (ValueError, OSError, RuntimeError) as problem:      # RuntimeError: too large for the memory
        fail(problem)

    if about:
        name = args.adapter or args.model
        say(f"loaded {name}: {n} tensors, method {bitune.method}, template {template}" + (
            f", trained for {about['step']} steps" if "step" in about else ""))
    if args.show_mixing:
        say(draw_mixing(bitune))
    if args.prompt is not None:
        ask(bitune, tokenizer, encode(args.prompt), stop_ids, args)
        return
    if demonstrates:
        say("It knows the words of experiments/demo/language.py. Questions that it has not seen:\n")
        unseen = read_rows(Path(DEMO["val_data"]).with_name("test.jsonl"))
        say("\n".join(row["prompt"] for _, row in islice(unseen, 3)) + "\n")
    terminal, status = sys.stdin.isatty(), 0
    if terminal:
        say("Ask; an empty line or Ctrl-D ends.")
    while True:
        try:
            if terminal:
                print("> ", end="", file=sys.stderr, flush=True)
            line = input() if terminal else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration, KeyboardInterrupt):
            sys.exit(status)
        if not line and terminal:
            sys.exit(status)
        if not line:
            continue
        try:
            ask(bitune, tokenizer, encode(line), stop_ids, args)
        except ValueError as problem:       # one prompt that is too long does not end the others,
            print()                         # nor shift their answers
            say(f"error: {problem}")
            status = 1


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:                           # while loading
        sys.exit(130)
