"""The first minute: one small pretrained decoder, finetuned with LoRA and with Bitune on a CPU.

    python -m experiments.demo [--all] [--seeds 5] [--lrs 0.003 0.01 0.03]

Every run is one of train.py, with the settings of its demonstration. Validation data choose a learning rate
for each model; what is reported comes from test data. With --out FOLDER it goes on where it was stopped.
"""

from pathlib import Path
from statistics import fmean

from cli.process import Failed, command
from cli.settings import DEMO, SWITCH, Setting, free_name, new_parser, number, text, words
from cli.terminal import bars
from experiments.ablate import GRID, grid, planned, tasks_of, variants
from experiments.compare import chosen, table
from experiments.curves import colours, panel, picture
from experiments.demo.language import TASKS, write
from files.disk import write_file
from files.run import load_run
from text.examples import encode_prompt, stop_id
from text.rows import read_rows
from text.words import to_type

ABLATIONS = ["naive-bidir", "no-mixing", "shared-weights", "only-causal"]


def compared(models, lrs, seeds, steps, data, out, **more):
    """Each model's records at its best rate: a grid in the folder `out` on the task in the folder `data`."""
    common = DEMO | {"data": str(data / "train.jsonl"), "val_data": str(data / "val.jsonl"), "steps": steps,
                     "eval_every": -(-steps // 10), "template": "paper"} | more
    tasks = tasks_of([f"rows={data / 'test.jsonl'}"], max_new_tokens=20)
    best = chosen(grid(planned(models, lrs, seeds, common, out), tasks, common))
    if best.keys() != models.keys():
        raise Failed(f"only {', '.join(best) or 'nothing'} came to its end: try lower --lrs")
    return best


def demonstrate(task, models, lrs, seeds, steps, out):
    write(task, out)
    rows = [row for _, row in read_rows(out / "test.jsonl")]
    chance = fmean(1 / (1 + row["prompt"].count(";")) for row in rows)
    print(f"\n{task}: {rows[0]['prompt']} -> {rows[0]['completion']}", flush=True)
    best = compared(models, lrs, seeds, steps, out, out)
    lines = {name: [(at[0]["step"], [r["val_exact_match"] for r in at])         # of each seed
                    for at in zip(*(r["validations"] for r in records))] for name, records in best.items()}
    drawn = panel("exact match on validation data", lines, colours(lines),
                  level=(chance, f"chance {chance:.1%}"))
    write_file(out / "curves.svg", picture([drawn]).encode())
    print("\n" + table(list(best.values()), [["one of the sayings", "", "", "", "", f"{chance:.1%}"]]))
    first = {name: load_run(records[0]["run"])[:2] for name, records in best.items()}
    bitune, tokenizer = first["Bitune"]
    asked = [encode_prompt(tokenizer, "paper", [("user", row["prompt"])]) for row in rows[:3]]
    for row, prompt in zip(rows, asked):
        print(f"\n{row['prompt']}\n    {'the truth':<16}{row['completion']}")
        for name, (model, _) in first.items():
            (ids,) = model.generate([prompt], 20, stop_ids={stop_id(tokenizer, "paper")})
            said = tokenizer.decode(ids).strip()
            print(f"    {name:<16}{said}{'  ✓' if said == row['completion'] else ''}")
    print(f"\nBitune's mixing coefficients:\n{bars(bitune, asked[0])}\n")
    ask = to_type("sample.py", "--adapter", best["Bitune"][0]["run"])
    print(f"Exact match over steps: {out / 'curves.svg'}. Ask it yourself: {ask}")


SHOWN = {
    "all": Setting("also the ablations, and all three tasks", SWITCH),
    "tasks": Setting("where the speakers' names stand (default: behind)", words(*TASKS) | {"nargs": "+"}),
    "seeds": Setting("how many, from 42 on", number(int, 1, 1000), 1),
    "lrs": GRID["lrs"]._replace(default=[DEMO["lr"]]),
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
