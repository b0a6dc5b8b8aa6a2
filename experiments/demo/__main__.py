"""The first minute: one small pretrained decoder, finetuned with LoRA and with Bitune on a CPU.

    python -m experiments.demo [--all] [--seeds 5] [--lrs 0.003 0.01 0.03]

Every run is a run of train.py: its functions, and the settings of its demonstration. Learning rates are
compared on validation data; what is reported comes from test data, on which nothing was chosen. With --out
FOLDER it goes on where it was stopped.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from bitune import Bitune
from experiments.demo.figure import curves
from experiments.demo.language import TASKS, write
from sample import draw_mixing
from text.examples import encode_prompt, load_examples, stop_id
from text.rows import read_rows
from train import DEMO, Progress, begin, evaluate, fail, free_name, load_base, load_run, new_parser
from train import number, set_up_streams, settings, train

# LoRA of rank 16 has as many trainable parameters as Bitune with its two sets of rank 8, and their scale.
MODELS = {
    "LoRA rank 8": ["--method=lora"],
    "LoRA rank 16": ["--method=lora", "--rank=16", "--alpha=2"],
    "Bitune": ["--method=bitune"],
}
ABLATIONS = {m: [f"--method={m}"] for m in ("naive-bidir", "no-mixing", "shared-weights", "only-causal")}


class Run(NamedTuple):
    bitune: Bitune
    log: list               # of records, as in log.jsonl
    trainable: int          # parameters
    seconds: float          # of training, without validation
    validation: float       # loss
    test: float             # exact match


class Line(Progress):
    """All that `train` has to say, on one line: a name, and a bar for each validation's exact match."""

    def __init__(self, name):
        super().__init__()
        self.name, self.bars = name, ""

    def update(self, text, last=False):
        super().update(f"{self.name}  {self.bars}  {text}")

    def note(self, text):
        self.update(text)

    def validated(self, what, result):
        self.bars += bar(result["exact_match"])

    def end(self, run):
        bars = "".join(bar(r["val_exact_match"]) for r in run.log if "val_exact_match" in r)
        super().note(f"{self.name}  {bars}  {run.seconds:.0f} s, {run.test:.1%} of the test right")


def bar(part):
    return "▁▂▃▄▅▆▇█"[round(part * 7)]


def finetune(flags, out, progress):
    """The model that train.py's flags make, in the folder `out`; of a run that is there, what is left of it
    to do."""
    saved = out / "bitune.json"
    args = settings(["--resume", str(out)] if saved.exists() else [*flags, f"--out={out}"])
    if not saved.exists() or json.loads(saved.read_text())["step"] < args.steps:
        bitune, _, *rest = begin(args)
        train(args, bitune, *rest, progress)
    return load_run(out, device=args.device, dtype=args.dtype)[0]


def measure(flags, out, test, progress):
    bitune = finetune(flags, out, progress)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    derived = json.loads((out / "settings.json").read_text())["derived"]
    return Run(bitune, log, derived["trainable_parameters"], sum(r.get("seconds", 0) for r in log),
               [r["val_loss"] for r in log if "val_loss" in r][-1],
               evaluate(bitune, test, 100)["exact_match"])


def compare(models, lrs, seeds, out, test):
    """Every model with every learning rate and seed: model -> (the learning rate that is best on validation,
    its Runs, one a seed)."""
    best = {}
    for name, flags in models.items():
        runs = {lr: [] for lr in lrs}
        for lr in lrs:
            for seed in seeds:
                line = Line(f"{name:<14}  lr {lr:<6g} seed {seed}")
                folder = out / f"{name.lower().replace(' ', '-')}-lr{lr:g}-seed{seed}"
                runs[lr].append(measure([*flags, f"--lr={lr}", f"--seed={seed}"], folder, test, line))
                line.end(runs[lr][-1])
        lr = min(lrs, key=lambda lr: statistics.mean(run.validation for run in runs[lr]))
        best[name] = lr, runs[lr]
    return best


# ----------------------------------------------------------------------------------------------------------
# What there is to see

def spread(values, form):
    """mean ± standard deviation, if there are several"""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def table(best, chance):
    """Markdown, a row for each model."""
    rows = [["", "trainable parameters", "learning rate", "seconds", "validation loss", "exact match, test"],
            ["one of the sayings", "", "", "", "", f"{chance:.1%}"]]
    for name, (lr, runs) in best.items():
        rows.append([name, f"{runs[0].trainable:,}", f"{lr:g}", spread([r.seconds for r in runs], "{:.0f}"),
                     spread([r.validation for r in runs], "{:.3f}"),
                     spread([100 * r.test for r in runs], "{:.1f}") + "%"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def answers(best, rows, tokenizer):
    """Some questions, each with the truth and with what each model's first run says."""
    lines = []
    for row in rows:
        lines += [f"\n{row['prompt']}", f"    {'the truth':<16}{row['completion']}"]
        prompt = encode_prompt(tokenizer, "paper", [("user", row["prompt"])])
        for name, (_, runs) in best.items():
            (ids,) = runs[0].bitune.generate([prompt], 20, stop_ids={stop_id(tokenizer, "paper")})
            said = tokenizer.decode(ids).strip()
            lines.append(f"    {name:<16}{said}{'  ✓' if said == row['completion'] else ''}")
    return "\n".join(lines)


def demonstrate(task, models, lrs, seeds, steps, out):
    write(task, out)
    given = DEMO | {"data": out / "train.jsonl", "val_data": out / "val.jsonl", "steps": steps,
                    "eval_every": -(-steps // 10)}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    tokenizer = load_base(DEMO["model"])[1]
    test, _ = load_examples(out / "test.jsonl", tokenizer, "paper", 256)
    rows = [row for _, row in read_rows(out / "test.jsonl")]
    chance = statistics.mean(1 / (1 + row["prompt"].count(";")) for row in rows)
    print(f"\n{task}: {rows[0]['prompt']} -> {rows[0]['completion']}", flush=True)

    best = compare({name: flags + more for name, more in models.items()}, lrs, seeds, out, test)
    logs = {name: [run.log for run in runs] for name, (_, runs) in best.items()}
    (out / "curves.svg").write_text(curves(logs, chance), encoding="utf-8")
    print(f"\n{table(best, chance)}\n{answers(best, rows[:3], tokenizer)}\n")
    print(f"Bitune's mixing coefficients:\n{draw_mixing(best['Bitune'][1][0].bitune)}\n")
    print(f"Exact match over steps: {out / 'curves.svg'}. Ask the last run yourself: python sample.py")


def main():
    set_up_streams()
    parser = new_parser(__doc__)
    arg = parser.add_argument
    arg("--all", action="store_true", help="also the ablations, and all three tasks")
    arg("--tasks", nargs="+", choices=TASKS, help="where the speakers' names stand (default: behind)")
    arg("--seeds", type=number(int, 1), default=1, metavar="N", help="how many, from 42 on (default: 1)")
    arg("--lrs", type=number(float, 0), nargs="+", default=[DEMO["lr"]], metavar="LR",
        help=f"learning rates, of which validation chooses one a model (default: {DEMO['lr']:g})")
    arg("--steps", type=number(int, 1), default=DEMO["steps"], help=f"of a run (default: {DEMO['steps']})")
    arg("--out", metavar="FOLDER", help="where the runs go, or are gone on with (default: a new one)")
    args = parser.parse_args()
    out = Path(args.out or free_name("runs/laptop"))
    models = MODELS | (ABLATIONS if args.all else {})
    try:
        for task in args.tasks or (TASKS if args.all else ["behind"]):
            demonstrate(task, models, args.lrs, range(42, 42 + args.seeds), args.steps, out / task)
    except (ValueError, OSError) as problem:
        fail(problem)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
