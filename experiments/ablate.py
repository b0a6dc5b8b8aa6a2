"""The paper's tables: a grid of finetunings on one base, each of them evaluated.

    python -m experiments.ablate --out FOLDER --model FOLDER --data FILE --evaluate piqa=FILE
        [--methods bitune ...] [--pefts lora ...] [--cs 0.01 ...]
        [--lrs 3e-4 ... [--search]] [--seeds 42 43 44] [any other flag of train.py]

Plain finetuning with adapters of the same rank is always beside it, and of twice the rank, which has as many
trainable parameters as Bitune's two sets. Learning rates are compared on validation data alone: with all
seeds, or with --search with the first one; the others are left for each model's best rate and for that of
plain finetuning, by which the paper chose it. What is there is not made again: repeat the command to go on,
or give it several times at once, on all machines that share the folder.
"""

import sys
import time
from argparse import Namespace
from itertools import product
from pathlib import Path

from bitune import METHODS, Bitune
from cli.cards import several
from cli.process import Failed, command
from cli.settings import SETTINGS, SWITCH, Setting, check, check_idle, default, join, new_parser, options
from cli.settings import settings_of, text, words
from cli.terminal import Progress
from experiments.compare import chosen, percent, report
from experiments.cost import without_memory
from experiments.evaluate import SCORED, SCORING, load_questions, score
from files.checkpoint import load_tokenizer, read_config
from files.disk import InUse, write_file
from files.run import finished, logged, read_about, read_settings
from lora import KINDS, add_adapter
from text.examples import MAX_LENGTH, load_data, template_named
from text.words import digest, listed, read_json
from train import finetune

KIND, C = default(add_adapter, "kind"), default(Bitune, "c")
OWN = ("method", "peft", "c", "lr", "seed", "out", "resume", "adapter")     # set by the grid for each run
FREE = {"max_length", "save_every", "keep", "out", "resume",        # of a run that is there already
        *(name for name, setting in SETTINGS.items() if setting.may_change)}
GRID = {
    "out": Setting("where the runs and tables.md go, and where they are continued", text("FOLDER")),
    "evaluate": Setting("what to score every run on, as experiments.evaluate does: " + ", ".join(SCORED),
                        text("TASK=FILE", nargs="+"), []),
    "methods": Setting("what to lay beside plain finetuning",
                       words(*(m for m in METHODS if METHODS[m])) | {"nargs": "+"}, ["bitune"]),
    "pefts": Setting("kinds of adapters", words(*KINDS) | {"nargs": "+"}, [KIND]),
    "cs": Setting("of the methods that mix", SETTINGS["c"].form | {"nargs": "+"}, [C]),
    "lrs": Setting("learning rates", SETTINGS["lr"].form | {"nargs": "+"}, [SETTINGS["lr"].default]),
    "search": Setting("compare the --lrs with the first seed alone, unscored", SWITCH),
    "seeds": Setting("of each model", SETTINGS["seed"].form | {"nargs": "+"}, [42, 43, 44]),
    "eval_batch_size": SCORING["batch_size"],
    **{name: SCORING[name] for name in ("limit", "max_new_tokens")},
}


def variants(methods, kinds=(KIND,), cs=(C,), given={}):
    """The models of a grid: name -> settings. What a method does not use is not varied; `given` has the
    options of adapters that were typed."""
    models = {}
    label = lambda kind: "full finetuning" if KINDS[kind].trains_base else KINDS[kind].__name__
    for kind in (KIND, *kinds):
        own = {name: given.get(name, option.default) for name, option in KINDS[kind].options.items()}
        for times in (1, 2) if "rank" in own else (1,):
            # The scale alpha / rank stays.
            more = {name: times * own[name] for name in ("rank", "lora_alpha") if name in own}
            name = label(kind) + (f" rank {more['rank']}" if more else "")
            models[name] = {"method": "causal", "peft": kind, **more}
    for method, kind, c in product(methods, kinds, cs):
        mixes, named = len(METHODS[method]) > 1, [method.replace("bitune", "Bitune")]
        named += [label(kind)] * (kind != KIND) + [f"c {c:g}"] * (mixes and c != C)     # if not the default
        models[", ".join(named)] = {"method": method, "peft": kind} | ({"c": c} if mixes else {})
    return models


def planned(models, lrs, seeds, common, out):
    """The runs of a grid: (name, lr, seed) -> settings. ValueError for one that cannot be trained, or that
    is there with other settings."""
    runs = {}
    for name, own in models.items():
        for lr, seed in product(lrs, seeds):
            folder = out / f"{name.lower().replace(', ', '-').replace(' ', '-')}-lr{lr}-seed{seed}"
            s = runs[name, lr, seed] = join(common, own, {"lr": lr, "seed": seed, "out": str(folder)})
            check(s)
            before = read_settings(folder)[0] if (folder / "settings.json").exists() else {}
            if differ := [f"{key} was {before[key]} and is {value}" for key, value in vars(s).items()
                          if before.get(key, value) != value and key not in FREE]:
                raise ValueError(f"{folder} is there with other settings: {listed(differ)}")
        how = options(s, "answer") | {"targets": s.targets or ()}
        without_memory(read_json(Path(s.model) / "config.json"), s.method, s.peft, how)
    return runs


def verdicts(tasks, title, **model):
    """What a model, the flags of experiments.evaluate, gets for each question, 1 or 0: column -> list."""
    found = {}
    for label, own in tasks.items():
        _, summary, results = score(Namespace(**own | model), Progress(title))
        for metric in summary["scores"]:
            found[f"{label} {metric}"] = [result[metric] for result in results]
    return found


def run_one(key, s, tasks, common):
    """Train a run unless it is trained, and score it unless it is scored: its record, as
    experiments.compare reads it. InUse if another process is at it."""
    name, lr, seed = key
    title = f"{name}  lr {lr:g}  seed {seed}"
    if not finished(s.out):
        may = {key: value for key, value in common.items() if SETTINGS[key].may_change}
        begun = (Path(s.out) / "state.safetensors").exists()
        try:
            finetune(settings_of({"resume": s.out} | may) if begun else s, Progress(title))
        except ValueError:
            if not finished(s.out):         # else another process has just ended it
                raise
    settings, derived = read_settings(s.out)
    log = logged(Path(s.out) / "log.jsonl", settings["steps"])
    validations = [r for r in log if "val_loss" in r]
    return {"name": name, "lr": lr, "seed": seed, "trainable": derived["trainable_parameters"],
            "seconds": sum(r.get("seconds", 0) for r in log),               # without validation
            "val_loss": validations[-1]["val_loss"] if validations else None, "validations": validations,
            "scores": verdicts(tasks, title, adapter=s.out, dtype=derived["dtype"]), "run": s.out,
            "base": read_about(s.out)["base_digest"]}


def grid(runs, tasks, common):
    """The records of runs, in their order; one whose training failed has none. A run that another process is
    at is left to it, and waited for in the end."""
    records, left, told = dict.fromkeys(runs), dict(runs), None
    while left:
        for key, s in [*left.items()]:
            try:
                records[key] = one = run_one(key, s, tasks, common)
                if others := [r["run"] for r in records.values() if r and r["base"] != one["base"]]:
                    raise ValueError(f"{one['run']} has another base than {listed(others)}")
            except InUse:
                continue
            except Failed as problem:
                if problem.status != 1:             # stopped by hand; 1: it went wrong
                    raise Failed(f"{problem} All of the grid goes on when its own command is repeated.",
                                 problem.status) from None
                print(f"error: {Path(s.out).name}: {problem}", file=sys.stderr)
            del left[key]
        names = listed([Path(s.out).name for s in left.values()])
        if left and names != told:
            print(f"waiting for what other processes are at: {names}", flush=True)
            told = names
        time.sleep(1 if left else 0)
    return [record for record in records.values() if record]


def tasks_of(files, **flags):
    """[TASK=FILE] to the name of its columns -> the flags of experiments.evaluate, some of them given."""
    tasks, flags = {}, {name: setting.default for name, setting in SCORING.items()} | flags
    for task, _, file in (f.partition("=") for f in files):
        if task not in SCORED or not file or not Path(file).exists():
            raise ValueError(f"--evaluate {task}={file}: expected TASK=FILE, TASK one of {listed(SCORED)}")
        label = task if Path(file).stem == task else f"{task} {Path(file).stem}"
        if label in tasks:
            raise ValueError(f"--evaluate: two files would both be called {label!r}: rename one")
        tasks[label] = flags | {"task": task, "data": file}
    return tasks


def search(runs, common, baseline):
    """Those of a grid's runs that are wanted with all seeds, as their first seed says: at each model's best
    learning rate, and at that of `baseline`."""
    best = chosen(grid({key: s for key, s in runs.items() if s.seed == next(iter(runs))[2]}, {}, common))
    if baseline not in best:
        raise Failed(f"no run of {baseline} came to its end")
    wanted = lambda name: {best[at][0]["lr"] for at in (name, baseline) if at in best}
    return {key: s for key, s in runs.items() if s.lr in wanted(key[0])}


@command
def main(argv=None):
    rest = {name: s for name, s in SETTINGS.items() if name not in OWN}
    given = vars(new_parser(__doc__, GRID, rest, typed_only=True).parse_args(argv))
    args = Namespace(**{name: given.get(name, s.default) for name, s in GRID.items()})
    common = {name: value for name, value in given.items() if name in rest}
    if not args.evaluate:
        check_idle(given, ("limit", "eval_batch_size", "max_new_tokens"), "without --evaluate")
    if all(len(METHODS[method]) < 2 for method in args.methods):
        check_idle(given, ["cs"], "with methods that mix nothing")
    if several():
        raise ValueError("a grid under torchrun: start experiments.ablate by itself, as often as you like")
    check(join(common, {"out": args.out}))
    base, out, template = common["model"], Path(args.out), common.get("template", "auto")
    tokenizer, longest = load_tokenizer(base), read_config(base).max_length
    template = "paper" if template == "auto" else template              # the tables' own, whatever the base
    common["template"] = template_named(template, tokenizer, "paper")
    tasks = tasks_of(args.evaluate, limit=args.limit, batch_size=args.eval_batch_size,
                     max_new_tokens=args.max_new_tokens, device=common.get("device"))
    files = [common["data"], common.get("val_data") or "", *(own["data"] for own in tasks.values())]
    if pipes := [file for file in files if Path(file).is_fifo()]:
        raise ValueError(f"{pipes[0]} is a pipe, which can be read once: a grid reads it for each run")
    for own in tasks.values():                              # what cannot be scored shows now
        load_questions(own["data"], own["task"], tokenizer, common["template"], longest, args.limit)
    models = variants(args.methods, args.pefts, args.cs, common)
    baseline, runs = next(iter(models)), planned(models, args.lrs, args.seeds, common, out)
    data = join(common, {"max_length": common.get("max_length", min(MAX_LENGTH, longest))})
    examples, val, _ = load_data(data, tokenizer)
    if len(args.lrs) > 1 and not val:
        raise ValueError("several --lrs and no validation data to choose by: give --val-data")
    now = digest((examples, val))
    begun = [s.out for s in runs.values() if (Path(s.out) / "settings.json").exists()]
    if others := [run for run in begun if read_settings(run)[1]["data_hash"] != now]:
        raise ValueError(f"trained on other data than these: {listed(others)}")
    runs = search(runs, common, baseline) if args.search else runs
    records = grid(runs, tasks, common)
    if not records:
        raise Failed(f"{out}: no run came to its end")
    bare = verdicts(tasks, "base model", model=base, dtype=common.get("dtype"), out=str(out / "base"))
    first = ["base model", "", "", "", "", *(percent([right]) for right in bare.values())]
    text = report(records, first, baseline)
    write_file(out / "tables.md", f"{text}\n".encode())
    print(f"\n{text}\n\nwrote {out / 'tables.md'}")
    if len(records) < len(runs):
        raise Failed(f"{len(runs) - len(records)} of the runs did not come to an end, as said above: repeat "
                     "the command, or leave a rate that diverges out of --lrs")


if __name__ == "__main__":
    main()
