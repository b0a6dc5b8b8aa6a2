"""The first minute: one small pretrained decoder, finetuned with LoRA and with Bitune on a CPU.

    python -m experiments.demo [--all] [--seeds 5] [--lrs 0.003 0.01 0.03]

Every run is a run of train.py: its functions, and the settings of its demonstration. Learning rates are
compared on validation data; what is reported comes from test data, on which nothing was chosen. With --out
FOLDER it goes on where it was stopped.
"""

import statistics
from pathlib import Path

from cli.process import command
from cli.settings import DEMO, SETTINGS, SWITCH, Setting, free_name, new_parser, number, text, words
from cli.terminal import bars
from experiments.ablate import check_grid, grid, planned, tasks_of, variants
from experiments.compare import chosen, table
from experiments.curves import colours, panel, picture
from experiments.demo.language import TASKS, write
from files.checkpoint import load_base
from files.run import load_run
from text.examples import encode_prompt, stop_id
from text.rows import read_rows

ABLATIONS = ["naive-bidir", "no-mixing", "shared-weights", "only-causal"]


def answers(runs, rows, tokenizer):
    """Some questions, each with the truth and with what each run, name -> Bitune, says."""
    lines = []
    for row in rows:
        lines += [f"\n{row['prompt']}", f"    {'the truth':<16}{row['completion']}"]
        prompt = encode_prompt(tokenizer, "paper", [("user", row["prompt"])])
        for name, bitune in runs.items():
            (ids,) = bitune.generate([prompt], 20, stop_ids={stop_id(tokenizer, "paper")})
            said = tokenizer.decode(ids).strip()
            lines.append(f"    {name:<16}{said}{'  ✓' if said == row['completion'] else ''}")
    return "\n".join(lines)


def matches(seeds):
    """Each seed's validations as one line of a picture: [(step, the seeds' exact matches)]."""
    return [(at[0]["step"], [r["val_exact_match"] for r in at]) for at in zip(*seeds)]


def demonstrate(task, models, lrs, seeds, steps, out):
    write(task, out)
    common = DEMO | {"data": str(out / "train.jsonl"), "val_data": str(out / "val.jsonl"), "steps": steps,
                     "eval_every": -(-steps // 10), "template": "paper"}
    tokenizer = load_base(DEMO["model"])[1]
    rows = [row for _, row in read_rows(out / "test.jsonl")]
    chance = statistics.mean(1 / (1 + row["prompt"].count(";")) for row in rows)
    print(f"\n{task}: {rows[0]['prompt']} -> {rows[0]['completion']}", flush=True)

    runs = planned(models, lrs, seeds, common, out)
    check_grid(runs)
    best = chosen(grid(runs, tasks_of([f"rows={out / 'test.jsonl'}"], None, None, 20, None), common))
    if best.keys() != models.keys():
        raise ValueError(f"only {', '.join(best) or 'nothing'} came to its end: try lower --lrs")
    lines = {name: matches([r["validations"] for r in records]) for name, records in best.items()}
    drawn = panel("exact match on validation data", lines, colours(lines), 0, 1, "{:.0%}",
                  (chance, f"chance {chance:.1%}"))
    (out / "curves.svg").write_text(picture([drawn]), encoding="utf-8")
    print("\n" + table(list(best.values()), [["one of the sayings", "", "", "", "", f"{chance:.1%}"]]))
    first = {name: load_run(records[0]["run"])[0] for name, records in best.items()}
    print(f"{answers(first, rows[:3], tokenizer)}\n")
    prompt = encode_prompt(tokenizer, "paper", [("user", rows[0]["prompt"])])
    print(f"Bitune's mixing coefficients:\n{bars(first['Bitune'], prompt)}\n")
    print(f"Exact match over steps: {out / 'curves.svg'}. Ask the last run yourself: python sample.py")


SHOWN = {
    "all": Setting("also the ablations, and all three tasks", SWITCH),
    "tasks": Setting("where the speakers' names stand (default: behind)", words(*TASKS) | {"nargs": "+"}),
    "seeds": Setting("how many, from 42 on", number(int, 1), 1),
    "lrs": Setting("learning rates, of which validation chooses one a model",
                   SETTINGS["lr"].form | {"nargs": "+"}, [DEMO["lr"]]),
    "steps": Setting("of a run", number(int, 1), DEMO["steps"]),
    "out": Setting("where the runs go, or are continued (default: a new one)", text("FOLDER")),
}


@command
def main(argv=None):
    args = new_parser(__doc__, SHOWN).parse_args(argv)
    out = Path(args.out or free_name("runs/laptop"))
    models = variants(["bitune", *(ABLATIONS if args.all else [])])
    for task in args.tasks or (TASKS if args.all else ["behind"]):
        demonstrate(task, models, args.lrs, range(42, 42 + args.seeds), args.steps, out / task)


if __name__ == "__main__":
    main()
