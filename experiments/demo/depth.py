"""When does a second reading help? The demonstration's task, on bases of more and of fewer layers.

    python -m experiments.demo.depth --out FOLDER [--bases 2x64 3x64 ...]

A base is LAYERSxWIDTH, made by the demonstration's own pretraining, with another seed where one has not
learned all that it was taught. On each, LoRA, Bitune and two of its parts learn `behind`. It takes some
hours; what is there is not made again: repeat the command to go on.
"""

import re
from pathlib import Path
from statistics import fmean

from cli.process import command
from cli.settings import DEMO, Setting, new_parser, number, text
from experiments.ablate import GRID, variants
from experiments.compare import markdown, percent, spread
from experiments.curves import colours, panel, picture
from experiments.demo.__main__ import compared
from experiments.demo.language import write
from experiments.demo.pretrain import pretrain, scores
from files.checkpoint import load_base
from files.disk import write_file
from text.words import read_json

SEEDS = 1, 2, 3         # of pretraining


def taught_base(base, out, steps):
    """The folder of a base, LAYERSxWIDTH, made if it is not there: the first one that answers nine of ten
    questions of every form that it was taught. And which part of all these it answers."""
    layers, width = map(int, base.split("x"))
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 3 * width,
             "num_attention_heads": width // 32, "num_key_value_heads": width // 32}
    folders = {seed: out / f"{base}-{seed}" for seed in SEEDS}
    if shape.items() <= read_json(Path(DEMO["model"]) / "config.json").items():
        folders = {None: Path(DEMO["model"])}
    for seed, folder in folders.items():
        if not (folder / "model.safetensors").exists():
            pretrain(folder, steps, seed, shape)
        *taught, _ = scores(*load_base(folder)).values()
        if min(taught) > 0.9:
            break
    return str(folder), fmean(taught)


def half_way(record):
    """After how many steps half of the validation answers were right, between two validations; or None."""
    at = [(r["step"], r["val_exact_match"]) for r in record["validations"]]
    for (before, low), (after, high) in zip(at, at[1:]):
        if high >= 0.5:
            return before + (after - before) * (0.5 - low) / (high - low) if low < 0.5 else before
    return None


def right_answers(group):
    """Of each seed, 1 or 0 for each question of the test data."""
    return [right for record in group for right in record["scores"].values()]


def cell(group):
    """Exact match on test data and, in brackets, `half_way` of the seeds that get there."""
    found = [step for step in map(half_way, group) if step is not None]
    some = f", {len(found)} of {len(group)}" if len(found) < len(group) else ""
    return percent(right_answers(group)) + (f" ({spread(found, '{:.0f}')}{some})" if found else "")


FLAGS = {
    "out": Setting("where bases, runs and the figure go", text("FOLDER", required=True)),
    "bases": Setting("LAYERSxWIDTH each, heads being 32 wide", text("BASE", nargs="+"),
                     ["2x64", "3x64", "4x64", "6x64", "8x64", "12x64", "3x128"]),
    "seeds": Setting("how many, from 42 on", number(int, 1, 1000), 3),
    "lrs": GRID["lrs"]._replace(default=[2e-2, 5e-3]),
    "steps": Setting("of a run", number(int, 1), DEMO["steps"]),
    "pretraining": Setting("steps of a base", number(int, 1), 6000),
}


@command
def main(argv=None):
    args = new_parser(__doc__, FLAGS).parse_args(argv)
    for base in args.bases:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", base) or int(base.split("x")[1]) % 32:
            raise ValueError(f"--bases {base}: expected LAYERSxWIDTH, a width of heads of 32")
    out, models = Path(args.out), variants(["bitune", "naive-bidir", "no-mixing"])
    write("behind", out)
    seeds = range(42, 42 + args.seeds)
    found, lines = {}, [["base", "of what it was taught", *models]]
    for base in args.bases:
        folder, taught = taught_base(base, out, args.pretraining)
        found[base] = compared(models, args.lrs, seeds, args.steps, out, out / f"{base}-runs", model=folder)
        lines.append([base, f"{taught:.1%}", *map(cell, found[base].values())])
    print("\nExact match on test data (the step at which half of the validation answers are right):\n")
    print(markdown(lines))
    narrow = sorted((int(base.split("x")[0]), of) for base, of in found.items() if base.endswith("x64"))
    lines = {name: [(layers, [*map(fmean, right_answers(groups[name]))]) for layers, groups in narrow]
             for name in models}
    if len(narrow) > 1:
        figure = panel("exact match on test data", lines, colours(lines), across="layers")
        write_file(out / "depth.svg", picture([figure]).encode())
        print(f"\nwrote {out / 'depth.svg'}")


if __name__ == "__main__":
    main()
