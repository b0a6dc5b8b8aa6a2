"""What the second reading is worth: the loss with α scaled, of a run or of a base before any training.

    python -m experiments.real.alphas --model FOLDER --task arc --data FILE [--n 60] [--dtype bfloat16]
    python -m experiments.real.alphas --adapter RUN --task arc --data FILE --n 225 --scales 0.5 1

A base gets new adapters, so both passes read with its own weights, and α is the scale itself; at 0 the loss
is the base's. A run's own α are scaled.
"""

from cli.early import answer_flags
answer_flags(__name__)          # before torch is imported, which takes two seconds

import torch

from bitune import Bitune, adapter_sets
from cli.process import before_work, run_main
from cli.settings import add_device, flag_adder, new_parser, number
from cli.speed import hasten
from cli.terminal import Progress
from experiments.compare import markdown
from files.checkpoint import load_base
from files.run import load_run
from lora import add_adapter
from text.examples import load_examples
from text.rows import TASKS
from train import validate

SCALES = 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1
PARTS = 6           # of the layers


def load(args):
    """The Bitune, its tokenizer and template, and the α that are scaled, (L, ...) of keys and of values."""
    if args.adapter:
        bitune, tokenizer, _, about = load_run(args.adapter, args.model, args.device, args.dtype)
        if not bitune.mixes or {*bitune.alpha()} != {"key", "value"}:
            raise ValueError(f"{args.adapter} (method {bitune.method}) mixes no keys and values by α")
        template = about.get("template", "paper")
        return bitune, tokenizer, template, [a.detach() for a in bitune.alpha().values()]
    model, tokenizer = load_base(args.model, args.device, args.dtype)
    for name in adapter_sets("bitune"):
        add_adapter(model, name)
    bitune = Bitune(model)
    return bitune, tokenizer, "paper", [torch.ones_like(a) for a in bitune.alpha().values()]


def main(argv=None):
    parser = new_parser(__doc__)
    arg = flag_adder(parser)
    arg("--model", metavar="FOLDER", help="a checkpoint (default: the run's)")
    arg("--adapter", metavar="RUN", help="a run of a method that mixes")
    arg("--data", metavar="FILE", required=True, help="examples; the last ones are taken")
    arg("--task", choices=TASKS, default="rows", help="how --data is read")
    arg("--n", type=number(int, 1), default=60, help="how many examples")
    arg("--scales", type=number(float, 0, 1), nargs="+", default=SCALES, metavar="S", help="of α, beside 0")
    add_device(arg)
    args = parser.parse_args(argv)
    with before_work():
        if not (args.model or args.adapter):
            raise ValueError("neither --model nor --adapter given: see --help")
        bitune, tokenizer, template, (key, value) = load(args)
        examples = load_examples(args.data, tokenizer, template, 512, args.task)[0][-args.n:]
        hasten(bitune)
    progress = Progress()

    def loss(key, value):
        bitune.alpha = lambda: {"key": key, "value": value}
        return f"{validate(bitune, examples, 10, progress.update)['loss']:.3f}"

    none, own = loss(0 * key, 0 * value), "α times" if args.adapter else "α"
    lines = [[own, "keys and values", "keys alone", "values alone"], ["0", none, none, none]]
    for s in args.scales:
        of_each = (s * key, s * value), (s * key, 0 * value), (0 * key, s * value)
        lines.append([f"{s:g}", *(loss(*alpha) for alpha in of_each)])
    progress.note(markdown(lines) + "\n")

    s = 1 if args.adapter else 0.5
    lines = [[f"{own} {s:g} in layers, 0 in the others", "loss"]]
    for layers in torch.arange(len(key)).split(-(-len(key) // PARTS)):
        only = torch.zeros(len(key), *[1] * (key.dim() - 1), device=key.device)
        only[layers] = s
        first, last = layers[0].item(), layers[-1].item()
        lines.append([f"{first} to {last}" if first < last else f"{first}", loss(only * key, only * value)])
    progress.note(markdown(lines))


if __name__ == "__main__":
    run_main(main)
