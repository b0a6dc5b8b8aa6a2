"""When does a second reading help? The demonstration's task, on bases of more and of fewer layers.

    python -m experiments.demo.depth --out FOLDER [--bases 2x64 3x64 4x64 6x64 8x64 12x64 3x128]

A base is LAYERSxWIDTH, made by the demonstration's own pretraining; on each, LoRA, Bitune and two of its
parts learn `behind`. Learning rates are compared on validation data. What is there is not made again: repeat
the command to go on. It takes some hours.
"""

from pathlib import Path
from statistics import fmean

from cli.process import command
from cli.settings import DEMO, SETTINGS, Setting, new_parser, number, text
from experiments.ablate import check_grid, grid, planned, tasks_of, variants
from experiments.compare import chosen, markdown, percent, spread
from experiments.curves import colours, panel, picture
from experiments.demo.language import write
from experiments.demo.pretrain import CONFIG, pretrain, scores
from files.checkpoint import load_base

MANY = 6        # layers, above which one seed has to do


def made(base, out, steps):
    """The folder of a base, LAYERSxWIDTH, which is made if it is not there."""
    layers, width = map(int, base.split("x"))
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 3 * width,
             "num_attention_heads": width // 32, "num_key_value_heads": width // 32}
    if all(CONFIG[key] == value for key, value in shape.items()):
        return DEMO["model"]
    if not (out / base / "model.safetensors").exists():
        pretrain(out / base, steps, 1, shape)
    return str(out / base)


def half_way(record):
    """After how many steps half of the validation answers were right, on a line between validations; or
    none."""
    at = [(r["step"], r["val_exact_match"]) for r in record["validations"]]
    for (before, low), (after, high) in zip(at, at[1:]):
        if high >= 0.5:
            return before + (after - before) * (0.5 - low) / (high - low) if low < 0.5 else before
    return None


def halves(group):
    """The steps to half of the way, of the seeds that get there."""
    found = [step for step in map(half_way, group) if step is not None]
    some = f" ({len(found)} of {len(group)})" if 0 < len(found) < len(group) else ""
    return spread(found, "{:.0f}") + some if found else "-"


def lines_of(found, column):
    """The tables' lines and the picture's, of base -> its groups, model -> records."""
    names = list(next(iter(found.values())))
    exact = [[base, *(percent([r["scores"][column] for r in groups[n]]) for n in names)]
             for base, groups in found.items()]
    half = [[base, *(halves(groups[n]) for n in names)] for base, groups in found.items()]
    narrow = {int(base.split("x")[0]): groups for base, groups in found.items() if base.endswith("x64")}
    drawn = {n: [(layers, [r["scores"][column] for r in narrow[layers][n]]) for layers in sorted(narrow)]
             for n in names}
    return names, exact, half, drawn


FLAGS = {
    "out": Setting("where bases, runs and the figure go", text("FOLDER", required=True)),
    "bases": Setting("LAYERSxWIDTH each", text("BASE", nargs="+"),
                     ["2x64", "3x64", "4x64", "6x64", "8x64", "12x64", "3x128"]),
    "seeds": Setting(f"how many, from 42 on; one for more than {MANY} layers", number(int, 1), 3),
    "lrs": Setting("learning rates", SETTINGS["lr"].form | {"nargs": "+"}, [2e-2, 5e-3]),
    "steps": Setting("of a run", number(int, 1), DEMO["steps"]),
    "pretraining": Setting("steps of a base", number(int, 1), 6000),
}


@command
def main(argv=None):
    args = new_parser(__doc__, FLAGS).parse_args(argv)
    out, found, taught = Path(args.out), {}, []
    write("behind", out)
    models = variants(["bitune", "naive-bidir", "no-mixing"])
    for base in args.bases:
        folder = made(base, out, args.pretraining)
        model, tokenizer = load_base(folder)
        *known, new = scores(model, tokenizer).values()
        taught.append([base, f"{sum(p.numel() for p in model.parameters()):,}", f"{min(known):.0%}",
                       f"{fmean(known):.1%}", f"{new:.1%}"])
        print(*taught[-1], flush=True)
        common = DEMO | {"model": folder, "data": str(out / "train.jsonl"), "template": "paper",
                         "val_data": str(out / "val.jsonl"), "steps": args.steps}
        seeds = range(42, 42 + (args.seeds if int(base.split("x")[0]) <= MANY else 1))
        runs = planned(models, args.lrs, seeds, common, out / f"{base}-runs")
        check_grid(runs)
        tasks = tasks_of([f"rows={out / 'test.jsonl'}"], None, None, 20, None)
        found[base] = chosen(grid(runs, tasks, common))
    column = next(iter(next(iter(found[base].values()))[0]["scores"]))
    names, exact, half, drawn = lines_of(found, column)
    print("\nThe bases, on what they were taught (the worst form, the mean) and on the task:\n")
    print(markdown([["base", "parameters", "worst", "mean", "behind"], *taught]))
    print("\nExact match on test data:\n")
    print(markdown([["base", *names], *exact]))
    print("\nSteps until half of the validation answers are right:\n")
    print(markdown([["base", *names], *half]))
    if len(found) > 1:
        figure = panel("exact match on test data", drawn, colours(drawn), 0, 1, "{:.0%}", across="layers")
        (out / "depth.svg").write_text(picture([figure]), encoding="utf-8")
        print(f"\nwrote {out / 'depth.svg'}")


if __name__ == "__main__":
    main()
