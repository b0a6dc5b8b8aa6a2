"""The paper's tables: a grid of finetunings on one base, each of them evaluated.

    python -m experiments.ablate --out FOLDER --model FOLDER --data FILE --evaluate piqa=FILE
        [--methods bitune ...] [--pefts lora ...] [--cs 0.01 ...]
        [--lrs 3e-4 ... [--search]] [--seeds 42 43 44] [any other flag of train.py]

Plain finetuning with adapters of the same rank is always beside it, and of twice the rank, which has as many
trainable parameters as Bitune's two sets. Learning rates are compared on validation data alone: with all
seeds, or with --search with the first one, and the others are left for each model's best rate and for that
of plain finetuning, by which the paper chose it for all. A finished run is never made again, and one that
was stopped goes on from its last save: repeat the command. Several processes, on all machines that share the
folder, make one grid: give each of them the same command.
"""

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path

from bitune import METHODS, Bitune
from cli.memory import fold_for_answers
from cli.process import before_work, guarded, run_main
from cli.settings import MAY_CHANGE, complete, default, flag_adder, given, new_parser, number
from cli.settings import read_flags, train_parser
from cli.terminal import Progress
from experiments.compare import chosen, report
from experiments.evaluate import SCORED, evaluate, load_questions
from files.checkpoint import load_base, read_config
from files.disk import InUse, finish_writing, hold, json_bytes, let_go, one_at_a_time, write_files
from files.run import finished, load_run, read_settings
from lora import KINDS, add_adapter
from text.examples import settle, stop_id
from text.tokenizer import Tokenizer
from text.words import listed, read_json
from train import prepare, train

OWN = ("method", "peft", "c", "lr", "seed", "out", "resume", "adapter")     # set by the grid
KIND, C = default(add_adapter, "kind"), default(Bitune, "c")


def variants(methods, kinds=(KIND,), cs=(C,), options={}):
    """The models of a grid: name -> flags of train.py. What a method does not use is not varied; `options`
    are those of the adapters that differ from the defaults."""
    models = {}
    label = lambda kind: KINDS[kind].label or KINDS[kind].__name__
    for kind in dict.fromkeys([KIND, *kinds]):
        own = {n: options.get(n, option.default) for n, option in KINDS[kind].options.items()}
        for times in (1, 2) if "rank" in own else (1,):
            flags = ["--method=causal", f"--peft={kind}"]
            for name in ("rank", "lora_alpha"):         # alpha grows along: the scale alpha / rank stays
                if name in own:
                    flags.append(f"--{name.replace('_', '-')}={times * own[name]:g}")
            models[label(kind) + (f" rank {times * own['rank']}" if "rank" in own else "")] = flags
    for method, kind, c in product(methods, kinds, cs):
        name, flags = method.replace("bitune", "Bitune"), [f"--method={method}", f"--peft={kind}"]
        if kind != KIND:                                # what differs from the defaults is named
            name += f", {label(kind)}"
        if len(METHODS[method]) > 1:
            flags.append(f"--c={c:g}")
            name += f", c {c:g}" if c != C else ""
        models[name] = flags
    return models


# ----------------------------------------------------------------------------------------------------------
# Running it

class Line(Progress):
    """All that a run has to say, on one line: a name, and a bar for each validation's exact match."""

    def __init__(self, name):
        super().__init__()
        self.name, self.bars = name, ""

    def update(self, text, last=False):
        super().update(f"{self.name}  {self.bars}  {text}")

    def note(self, text):
        self.update(text)

    def validated(self, run, result):
        self.bars += bar(result["exact_match"])

    def end(self, record):
        bars = "".join(bar(r["val_exact_match"]) for r in record["validations"])
        scores = "".join(f", {column} {value:.1%}" for column, value in record["scores"].items())
        super().note(f"{self.name}  {bars}  {record['seconds']:.0f} s{scores}")


def bar(part):
    return "▁▂▃▄▅▆▇█"[round(part * 7)]


def finetune(flags, folder, progress):
    """The model that train.py's flags make in a folder, and its tokenizer; of a run that is there, what is
    left of it to do. InUse if another process takes it over."""
    if not finished(folder):
        argv = [*flags, f"--out={folder}"]
        if (folder / "bitune.json").exists():
            now = {k.replace("_", "-"): v for k, v in given(flags).items()}
            argv = [f"--resume={folder}", *(f"--{k}" if now[k] is True else f"--{k}={now[k]}"
                                              for k in MAY_CHANGE if k in now)]
        run = prepare(read_flags(argv))
        with guarded(run, progress) as stop:
            train(run, progress, stop)
        hold(folder)                                    # which the end of training has let go
    dtype = read_settings(folder)[1]["dtype"]           # scored as it was trained
    return load_run(folder, device=given(flags).get("device"), dtype=dtype)[:2]


def measure(flags, folder, score, progress):
    """One run's numbers. score(bitune, tokenizer, progress) gives those that scoring makes: `scores`, column
    by column, and perhaps `right`, a string of 1 or 0 for each question."""
    scored = score(*finetune(flags, folder, progress), progress)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    validations = [r for r in log if "val_loss" in r]
    return {"trainable": read_settings(folder)[1]["trainable_parameters"],
            "seconds": sum(r.get("seconds", 0) for r in log),               # without validation
            "val_loss": validations[-1]["val_loss"] if validations else None,
            "validations": validations, **scored}


def read_records(out):
    file = out / "results.jsonl"
    return list(map(json.loads, file.read_text().splitlines())) if file.exists() else []


def find_record(out, own):
    """The record that holds all of `own`, if there is one."""
    return next((r for r in read_records(out) if own.items() <= r.items()), None)


def add_record(out, record):
    """Write a record, in the place of the run's older one."""
    run = lambda r: (r["name"], r["lr"], r["seed"])
    with one_at_a_time(out):
        lines = {run(r): json.dumps(r) + "\n" for r in [*read_records(out), record]}
        write_files(out, {"results.jsonl": "".join(lines.values()).encode()})


def one_run(own, flags, folder, score, progress):
    """The record of a run, which is made if there is none that holds all of `own`; None if its training
    fails. InUse if another process is at it."""
    out = folder.parent
    record = find_record(out, own)
    if record is None:
        hold(folder)
        try:
            record = find_record(out, own)          # it may have come before the folder was held
            if record is None:
                record = {"scored_on": []} | own | {"run": folder.name}     # [] for a search
                record |= measure(flags, folder, score, progress)
                add_record(out, record)
        except FloatingPointError as problem:
            print(f"error: {folder.name}: {problem}", file=sys.stderr)
            return None
        except SystemExit as end:
            if end.code != 1:                       # stopped by hand; 1: it went wrong, and has said how
                print("All of the grid goes on when its own command is repeated.", file=sys.stderr)
                raise
            return None
        finally:
            let_go(folder)
    progress.end(record)
    return record


def grid(models, lrs, seeds, out, score, scored_on=()):
    """Every model at every learning rate (a list, or one for each model's name) with every seed: their
    records, which are also the lines of out/results.jsonl. One whose training failed has none. Records with
    scores on anything but `scored_on` get new ones. A run that another process is at is left to it, and
    waited for in the end."""
    width, left = max(map(len, models)), {}
    lrs = lrs if isinstance(lrs, dict) else dict.fromkeys(models, list(dict.fromkeys(lrs)))
    runs = [(name, lr, seed) for name in models for lr in lrs[name] for seed in dict.fromkeys(seeds)]
    for name, lr, seed in runs:
        run = f"{name.lower().replace(', ', '-').replace(' ', '-')}-lr{lr:g}-seed{seed}"
        own = {"name": name, "lr": lr, "seed": seed}
        own |= {} if scored_on is None else {"scored_on": list(scored_on)}      # None: any record will do
        line = Line(f"{name:<{width}}  lr {lr:<6g} seed {seed}")
        left[run] = own, [*models[name], f"--lr={lr}", f"--seed={seed}"], out / run, score, line
    records, told = dict.fromkeys(left), None       # in this order, whoever makes them
    while left:
        for run, its in [*left.items()]:
            try:
                records[run] = record = one_run(*its)
            except InUse:
                continue
            if len({lr for _, lr, _ in runs}) > 1 and record and record["val_loss"] is None:
                raise ValueError("several learning rates and no validation data to choose by: give "
                                 "--val-data")
            del left[run]
        if left:
            if told != (told := listed(list(left))):
                print(f"waiting for what other processes are at: {told}", flush=True)
            time.sleep(1)
    return [record for record in records.values() if record]


# ----------------------------------------------------------------------------------------------------------
# The command

def common_settings(argv):
    """train.py's settings that hold for the whole grid. ValueError for those that the grid varies itself."""
    if odd := [f"--{name}" for name in OWN if name.replace("-", "_") in given(argv)]:
        raise ValueError(f"{', '.join(odd)}: the grid sets this for each run; see --help")
    common = read_flags(argv)
    if missing := [f"--{k}" for k in ("model", "data") if not getattr(common, k)]:
        raise ValueError(f"{missing[0]} not given: see train.py --help")
    if common.template == "auto":                   # the tables' own, whatever the base
        common.template = "paper"
    common.template = settle(common.template, Tokenizer.from_pretrained(common.model), "paper")
    return common


def read_questions(files, common, limit):
    """[TASK=FILE] to [(task, the name of its columns, its questions)]."""
    tokenizer, config = Tokenizer.from_pretrained(common.model), read_config(common.model)
    tasks = []
    for task, _, file in (f.partition("=") for f in files):
        if task not in SCORED or not file:
            raise ValueError(f"--evaluate {task}: expected TASK=FILE, TASK one of {', '.join(SCORED)}")
        longest = config.max_length
        questions, left_out = load_questions(file, task, tokenizer, common.template, longest, limit)
        stem = Path(file).stem
        tasks.append((task, task if stem == task else f"{task} {stem}", questions))
        if left_out:
            print(f"{file}: {len(left_out)} questions longer than {longest} tokens are left out")
    names = [name for _, name, _ in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--evaluate: two files would both be called {twice[0]!r}: rename one")
    return tasks


def scorer(tasks, common, batch_size, max_new_tokens):
    """The function that scores a model on all tasks: see `measure`."""
    def score(bitune, tokenizer, progress):
        fold_for_answers(bitune)
        stop_ids, scores, right = tokenizer.stop_ids | {stop_id(tokenizer, common.template)}, {}, {}
        for task, name, questions in tasks:
            results, means = evaluate(bitune, tokenizer, task, questions, stop_ids, batch_size,
                                      max_new_tokens, progress)
            for metric, (mean, _) in means.items():
                scores[f"{name} {metric}"] = mean
                right[f"{name} {metric}"] = "".join(f"{result[metric]:.0f}" for result in results)
        return {"scores": scores, "right": right}
    return score


def search(models, lrs, seed, out, baseline):
    """Each model's learning rates of which all seeds are wanted: the best of `lrs` with one seed, and the
    one that is best for `baseline`. Nothing is scored for it; records that have scores stay."""
    grid(models, lrs, [seed], out, lambda *_: {"scores": {}}, None)
    best = chosen([r for r in read_records(out) if r["seed"] == seed and r["name"] in models])
    if baseline not in best:
        raise ValueError(f"{out}: no run of {baseline} came to its end")
    shared = best[baseline][0]["lr"]
    return {name: sorted({shared, best[name][0]["lr"] if name in best else shared}) for name in models}


def base_line(common, score, scored_on, out):
    """The table's first line: what the model scores before any finetuning, measured once."""
    file = out / "base.json"
    with one_at_a_time(out):
        if not file.exists() or read_json(file)["scored_on"] != scored_on:
            model, tokenizer = load_base(common.model, common.device, common.dtype)
            scored = score(Bitune(model, "causal").eval(), tokenizer, Line("base model"))
            write_files(out, {file.name: json_bytes({"scored_on": scored_on} | scored)})
    scores = read_json(file)["scores"].values()
    return ["base model", "", "", "", "", *(f"{100 * v:.1f}%" for v in scores)]


def claim(out, grid):
    """Make the folder `out` this grid's. ValueError if it holds runs of another."""
    with one_at_a_time(out):
        finish_writing(out)
        if (out / "results.jsonl").exists() or any(out.glob("*/settings.json")):
            newer = vars(train_parser().parse_args([]))         # flags that the grid does not know
            before = vars(complete(argparse.Namespace(**newer | read_json(out / "grid.json"))))
            if differ := [k for k in grid if before.get(k) != grid[k]]:
                raise ValueError(f"{out} holds a grid with other settings: " + listed(
                    [f"{k} was {before.get(k)} and is {grid[k]}" for k in differ]))
        write_files(out, {"grid.json": json_bytes(grid)})


def main(argv=None):
    parser = new_parser(__doc__)
    parser.allow_abbrev = False
    arg = flag_adder(parser)
    arg("--out", metavar="FOLDER", required=True, help="where runs, results.jsonl and tables.md go, and "
        "where they are continued")
    arg("--evaluate", nargs="+", default=[], metavar="TASK=FILE", help="what to score every run on, as "
        "experiments.evaluate does: " + ", ".join(SCORED))
    arg("--methods", nargs="+", default=["bitune"], choices=[m for m in METHODS if METHODS[m]],
        help="what to lay beside plain finetuning")
    arg("--pefts", nargs="+", default=[KIND], choices=KINDS, help="kinds of adapters")
    arg("--cs", nargs="+", default=[C], type=number(float, 1e-9, 1e9), metavar="C",
        help="of the methods that mix")
    arg("--lrs", nargs="+", type=number(float, 0), metavar="LR", help="learning rates (default: train.py's)")
    arg("--search", action="store_true", help="compare the --lrs with the first seed alone, unscored")
    arg("--seeds", nargs="+", default=[42, 43, 44], type=number(int, 0), help="of each model")
    arg("--limit", type=number(int, 1), metavar="N", help="only the first N questions of each file")
    arg("--eval-batch-size", type=number(int, 1), help="questions at a time")
    arg("--max-new-tokens", type=number(int, 1), default=default(Bitune.answer, "max_new_tokens"),
        help="longest written answer")
    args, rest = parser.parse_known_args(argv)
    out = Path(args.out)
    with before_work():
        common = common_settings(rest)
        tasks = read_questions(args.evaluate, common, args.limit)
        scored_on = [*args.evaluate, args.limit, args.max_new_tokens]
        lrs = args.lrs or [common.lr]
        if len(lrs) > 1 and not common.val_data and not common.val_size:
            raise ValueError("several --lrs and no validation data to choose by: --val-size is 0")
        # No result hangs on these.
        free = (*OWN, *MAY_CHANGE[3:], "save-every", "keep")
        claim(out, {k: v for k, v in vars(common).items() if k.replace("_", "-") not in free})
        score = scorer(tasks, common, args.eval_batch_size, args.max_new_tokens)
        models = variants(args.methods, args.pefts, args.cs, given(rest))
        rest = [*rest, f"--template={common.template}"]
        flags = {name: [*rest, *own] for name, own in models.items()}
        baseline = next(iter(models))                   # plain finetuning
        if args.search:
            lrs = search(flags, lrs, args.seeds[0], out, baseline)
        records = grid(flags, lrs, args.seeds, out, score, scored_on)
        if not records:
            raise ValueError(f"{out}: no run came to its end")
        base = base_line(common, score, scored_on, out)
        # And of earlier commands; [] are the scores of a search.
        text = report([r for r in read_records(out) if r["scored_on"] in (scored_on, [])], base, baseline)
        with one_at_a_time(out):
            write_files(out, {"tables.md": (text + "\n").encode()})
    print(f"\n{text}\n\nwrote {out / 'tables.md'}, {out / 'results.jsonl'}")
    of_each = len({*args.seeds})
    asked = sum(map(len, lrs.values())) if args.search else len(models) * len({*lrs})
    if missing := asked * of_each - len(records):
        print(f"error: {missing} of the runs did not come to an end, as said above: repeat the command, or "
              "leave a rate that diverges out of --lrs", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
