"""What the second reading is worth: the loss with α scaled, of a run or of a base before any training.

    python -m experiments.real.alphas --model FOLDER --task arc --data FILE [--n 60] [--dtype bfloat16]
    python -m experiments.real.alphas --adapter RUN --task arc --data FILE --n 225 --scales 0.5 1

A base gets new adapters, so both passes read with its own weights, and α is the scale itself; at 0 the loss
is the base's. A run's own α are scaled.
"""

from functools import cache

import torch

from bitune import Bitune, adapter_sets
from cli.process import command
from cli.settings import ASKED, SETTINGS, Setting, new_parser, number, text
from cli.terminal import Progress
from experiments.compare import markdown
from files.run import load_run
from lora import add_adapter
from text.examples import MAX_LENGTH, batches, load_examples
from train import validate

PARTS = 6           # of the layers
SCALES = 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1


class Scaled(Bitune):
    """With α that are, by name, `scales` (L,) times what they are in a `run`, or these alone."""

    def alpha(self, read, positions):
        own = lambda a: a if self.run else torch.ones_like(a)
        times = lambda scale, a: scale.view(-1, *[1] * (a.dim() - 1)) * own(a)
        return {name: times(self.scales[name], a) for name, a in super().alpha(read, positions).items()}


FLAGS = {
    **{name: ASKED[name] for name in ("model", "adapter", "dtype", "device")},
    "data": Setting("examples; the last ones are taken", text("FILE", required=True)),
    "task": Setting("how --data is read", SETTINGS["task"].form, "rows"),
    "n": Setting("how many examples", number(int, 1), 60),
    "scales": Setting("of α, beside 0", number(float, 0, 1) | text("S", nargs="+"), SCALES),
}


@command
def main(argv=None):
    args = new_parser(__doc__, FLAGS).parse_args(argv)
    if not (args.model or args.adapter):
        raise ValueError("neither --model nor --adapter given: see --help")
    bitune, tokenizer, _, about = load_run(args.adapter, args.model, args.device, args.dtype)
    if not args.adapter:
        for name in adapter_sets("bitune"):
            add_adapter(bitune.model, name)
        bitune = Bitune(bitune.model)
    elif not bitune.mixes:
        raise ValueError(f"{args.adapter} (method {bitune.method}) mixes nothing")
    template, longest = about.get("template", "paper"), min(MAX_LENGTH, bitune.model.config.max_length)
    examples = load_examples(args.data, tokenizer, template, longest, args.task)[0][-args.n:]
    layers, progress = range(bitune.model.config.num_hidden_layers), Progress()
    scaled = bitune.twin(Scaled)
    scaled.run = args.adapter

    @cache
    def loss(key, value, of=layers):
        part = torch.tensor([float(layer in of) for layer in layers], device=bitune.device)
        scaled.scales = {"key": key * part, "value": value * part}
        return f"{validate(scaled, examples, batches, progress.update)['loss']:.3f}"

    own, s = ("α times", 1) if args.adapter else ("α", 0.5)
    lines = [[f"{s:g}", loss(s, s), loss(s, 0), loss(0, s)] for s in (0, *args.scales)]
    progress.note(markdown([[own, "keys and values", "keys alone", "values alone"], *lines]) + "\n")
    size = -(-len(layers) // PARTS)
    lines = [[" to ".join(map(str, sorted({of[0], of[-1]}))), loss(s, s, of)]
             for of in (layers[first:first + size] for first in layers[::size])]
    progress.note(markdown([[f"{own} {s:g} in layers, 0 in the others", "loss"], *lines]))


if __name__ == "__main__":
    main()
