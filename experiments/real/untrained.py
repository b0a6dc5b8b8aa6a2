"""What the second reading does to a base before any training: the loss at each α.

    python -m experiments.real.untrained --model FOLDER --task arc --data FILE [--n 60] [--dtype bfloat16]

The adapters are new, so both passes read with the base's own weights: what differs is who sees whom. At
α = 0 the loss is the base's.
"""

from cli.early import answer_flags
answer_flags(__name__)          # before torch is imported, which takes two seconds

import torch

from bitune import Bitune, adapter_sets
from cli.process import before_work, run_main
from cli.settings import add_device, flag_adder, new_parser, number
from cli.speed import hasten
from experiments.compare import markdown
from files.checkpoint import load_base
from lora import add_adapter
from text.examples import batches, load_examples
from text.rows import TASKS

ALPHAS = 0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1
PARTS = 6           # of the layers


@torch.inference_mode()
def loss_at(bitune, examples, key, value):
    """The mean loss with α by layer, (L,) each, of keys and values."""
    bitune.alpha = lambda: {"key": key, "value": value}
    return sum(bitune.losses(*zip(*batch)).sum().item() for batch in batches(examples, 10)) / len(examples)


def main(argv=None):
    parser = new_parser(__doc__)
    arg = flag_adder(parser)
    arg("--model", metavar="FOLDER", required=True, help="a checkpoint")
    arg("--data", metavar="FILE", required=True, help="examples; the last ones are taken")
    arg("--task", choices=TASKS, default="rows", help="how --data is read")
    arg("--n", type=number(int, 1), default=60, help="how many examples")
    add_device(arg)
    args = parser.parse_args(argv)
    with before_work():
        model, tokenizer = load_base(args.model, args.device, args.dtype)
        examples = load_examples(args.data, tokenizer, "paper", 512, args.task)[0][-args.n:]
        for name in adapter_sets("bitune"):
            add_adapter(model, name)
        bitune = Bitune(model).eval()
        hasten(bitune)
    L = model.config.num_hidden_layers
    all_at = lambda a: torch.full((L,), float(a), device=bitune.device)
    row = lambda a, *of: [f"{a:g}", *(f"{loss_at(bitune, examples, *kv):.2f}" for kv in of)]
    lines = [["α", "keys and values", "keys alone", "values alone"]]
    for a in ALPHAS:
        lines.append(row(a, (all_at(a), all_at(a)), (all_at(a), all_at(0)), (all_at(0), all_at(a))))
    print(markdown(lines), end="\n\n")
    lines = [["layers at α = 0.5, the others at 0", "loss"]]
    for layers in torch.arange(L).split(-(-L // PARTS)):
        alpha = all_at(0)
        alpha[layers] = 0.5
        lines.append([f"{layers[0]}-{layers[-1]}", f"{loss_at(bitune, examples, alpha, alpha):.2f}"])
    print(markdown(lines))


if __name__ == "__main__":
    run_main(main)
