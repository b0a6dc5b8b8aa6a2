"""Settings: one table, from which the flags, the checks of settings.json and a grid's variations follow.

A training's settings are three layers, joined once: the defaults, what lies below (the demonstration, a run
that is resumed, an adapter that is started from), and what was typed.
"""

import argparse
import inspect
import os
import sys
from argparse import Namespace
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from bitune import METHODS, Bitune, adapter_sets
from files.adapters import read_options
from files.checkpoint import DTYPES
from files.run import FULL, base_of, finished, read_about, read_settings
from lora import KINDS, LoRA, add_adapter
from text.examples import MAX_LENGTH, TEMPLATES
from text.rows import TASKS
from text.words import check_fields, number_within, read_json


def default(function, name):
    """The default of a function's argument."""
    return inspect.signature(function).parameters[name].default


# ----------------------------------------------------------------------------------------------------------
# Forms: what a value may be, as keywords for argparse; `in_files` makes of them forms for values in files

def number(kind, low=0, high=sys.float_info.max):          # nan and inf are out of range, too
    """The form of a number of a kind, int or float, from low to high."""
    fits = number_within(kind, low, high)

    def read(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range: expected {fits.__doc__}")
        return value

    read.__name__ = "whole number" if kind is int else "number"         # argparse puts it into its message
    read.fits = fits
    return {"type": read}


def words(*choices):
    return {"choices": choices}


def text(name, **more):
    return {"metavar": name} | more


SWITCH = {"action": "store_true"}


def in_files(form):
    """What a value that was written down must be to have been typed: a form of `words.check_fields`."""
    if "type" in form:
        return form["type"].fits
    return form.get("choices") or (list if "nargs" in form else bool if form == SWITCH else str)


# ----------------------------------------------------------------------------------------------------------
# The table

class Setting(NamedTuple):
    help: str
    form: dict
    default: object = None
    may_change: bool = False    # when a run is resumed: where files are, and what leaves the result as it is
    group: str = "what"         # its heading in --help


def group(title, settings):
    return {name: setting._replace(group=title) for name, setting in settings.items()}


def kind_options():
    """Every option of a kind of adapters, by its name, as a Setting."""
    found = {}
    for name in dict.fromkeys(name for maker in KINDS.values() for name in maker.options):
        of = {kind: maker.options[name] for kind, maker in KINDS.items() if name in maker.options}
        option = next(iter(of.values()))
        names = isinstance(option.default, tuple)
        defaults = [" ".join(o.default) if names else str(o.default) for o in of.values()]
        shown = " or ".join(dict.fromkeys(defaults))
        form = text("NAME", nargs="+") if names else number(type(option.default), option.low, option.high)
        found[name] = Setting(f"of {', '.join(of)}: {option.help} (default: {shown})", form)
    return found


SEED = number(int, 0, 2**63 - 1)
TEMPLATE = words("auto", "chat", *TEMPLATES)
SETTINGS = {
    **group("what", {
        "model": Setting("base model: a Hugging Face checkpoint folder", text("FOLDER"), None, True),
        "data": Setting("training data, in a form of docs/data.md", text("FILE"), None, True),
        "out": Setting("folder to write the run to", text("RUN")),
        "adapter": Setting("start from what this run, or PEFT adapter, has learned", text("RUN")),
        "resume": Setting("continue RUN from its last save, with its own settings", text("RUN")),
    }),
    **group("method", {
        "method": Setting("how the prompt is read", words(*METHODS), default(Bitune, "method")),
        "c": Setting("constant in α, where θ starts", number(float, 1e-9, 1e9), default(Bitune, "c")),
        "peft": Setting("kind of adapters", words(*KINDS), default(add_adapter, "kind")),
        **kind_options(),
        "targets": Setting("linears to adapt (default: those of lora.is_target)", text("NAME", nargs="+")),
    }),
    **group("data", {
        "task": Setting("form of the data: rows, or a published task's", words(*TASKS), "rows"),
        "template": Setting("words around a row; chat: the model's own; auto: that, if it is one of chat-*, "
                            "else paper", TEMPLATE, "auto"),
        "max_length": Setting(f"longer examples are dropped (default: {MAX_LENGTH}, or the model's)",
                              number(int, 2)),
        "val_data": Setting("validation data (default: the last of --data)", text("FILE"), None, True),
        "val_size": Setting("validate on so many of the last of --data, at most a tenth", number(int), 1000),
    }),
    **group("optimisation", {
        "steps": Setting("optimizer steps", number(int, 1, 10**9), 3000),
        "batch_size": Setting("examples a step", number(int, 1, 10**9), 10),
        "micro_batch_tokens": Setting("tokens at a time, same result (default: what memory has room for)",
                                      number(int, 1), None, True),
        "lr": Setting("peak learning rate", number(float), 3e-4),
        "warmup": Setting("part of the steps in which the rate rises", number(float, 0, 1), 0.1),
        "checkpointing": Setting("less memory, half more time, same result", SWITCH, False, True),
        "base_bits": Setting("of frozen linears: less memory, slower, a little off", number(int, 8, 8)),
        "clip": Setting("largest gradient norm", number(float, 1e-9), 1.0),
        "eps": Setting("AdamW's epsilon", number(float, 1e-12), 1e-6),
        "weight_decay": Setting("AdamW's weight decay", number(float), 0.0),
        "seed": Setting("of adapters and order of examples", SEED, 42),
    }),
    **group("running", {
        "eval_every": Setting("steps between validations (default: a tenth of --steps)", number(int, 1)),
        "save_every": Setting("steps between saves (default: a tenth of --steps)", number(int, 1)),
        "keep": Setting("best: also that of the lowest validation loss, in RUN/best", words("last", "best"),
                        "last"),
        "dtype": Setting("of the base (default: bfloat16 on a GPU where it is frozen, else float32)",
                         words(*DTYPES)),
        "device": Setting("cpu, cuda or mps (default: cuda or cpu)", text("DEVICE"), None, True),
    }),
}
SAMPLING = group("sampling", {
    name: Setting(help, form, default(Bitune.answer, name)) for name, help, form in (
        ("temperature", "0 takes the likeliest token", number(float)),
        ("top_k", "sample from the k likeliest; 0: all", number(int)),
        ("top_p", "sample from the likeliest that make up this mass", number(float, 1e-9, 1)),
        ("seed", "of the sampling", SEED))
})
ASKED = {               # what is asked or scored
    "model": Setting("base model: a checkpoint folder (default: the run's own)", text("FOLDER")),
    "adapter": Setting("a run of train.py, or a PEFT adapter (default: the bare model)", text("RUN")),
    "max_new_tokens": Setting("longest answer", number(int, 1), default(Bitune.answer, "max_new_tokens")),
    "dtype": SETTINGS["dtype"], "device": SETTINGS["device"],
}
PROMPT = {
    "prompt": Setting("what to ask; -: all of standard input, as one prompt", text("TEXT")),
    "template": Setting("words around the text (default: the run's, else auto: chat or plain)", TEMPLATE),
    "chat": Setting("each line goes on from those before; recompute, the default, reads all again, "
                    "alternating only what is new",
                    words("recompute", "alternating") | {"nargs": "?", "const": "recompute"}),
    "system": Setting("what the system says before the first line", text("TEXT")),
    "stop": Setting("ends an answer, too; may be repeated", text("TEXT", action="append"), []),
    "show_mixing": Setting("how --prompt is mixed, layer by layer", SWITCH),
}

# Without --model and --data: the demonstration. Its files come with this repository.
HERE = os.path.relpath(Path(__file__).parent.parent / "experiments/demo")
DEMO = {"model": f"{HERE}/base", "data": f"{HERE}/data/train.jsonl", "val_data": f"{HERE}/data/val.jsonl",
        "steps": 200, "batch_size": 32, "lr": 2e-2, "eval_every": 20}


# ----------------------------------------------------------------------------------------------------------
# Flags

class Parser(argparse.ArgumentParser):
    """Its errors are ValueErrors. Any empty value but that of --system is one: of a shell's variable that is
    not set, as a rule."""

    def error(self, message):
        raise ValueError(message)

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if name != "system" and "" in (value if isinstance(value, list) else [value]):
                raise ValueError(f"{flag(name)} is empty: expected some text")
        return args


def new_parser(description, *tables, typed_only=False):
    """A Parser with the flags of tables, name -> Setting. typed_only: it gives what was typed, without
    defaults."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS if typed_only else None)
    groups = {}
    for name, s in (pair for table in tables for pair in table.items()):
        group = groups.setdefault(s.group, parser.add_argument_group(s.group))
        values = s.default if isinstance(s.default, (list, tuple)) else [s.default]
        nothing = s.default is False or s.default in (None, [])
        shown = "" if nothing else f" (default: {' '.join(map(str, values))})"
        own = {} if typed_only or s.form == SWITCH else {"default": s.default}
        group.add_argument(flag(name), help=s.help + shown, **own, **s.form)
    return parser


def flag(name):
    return f"--{name.replace('_', '-')}"


def check_idle(given, names, where, table={}):
    """ValueError for a flag of these names that is `given`, name -> value, but has no effect `where` it
    stands. What equals its default in a table, name -> Setting, is not given."""
    for name in sorted(names):
        if name in given and (name not in table or given[name] != table[name].default):
            raise ValueError(f"{flag(name)} has no effect {where}")


def typed(argv, description=None):
    """What `argv` sets itself, of train.py's settings."""
    return vars(new_parser(description, SETTINGS, typed_only=True).parse_args(argv))


# ----------------------------------------------------------------------------------------------------------
# The three layers

def join(*layers):
    """The settings: the defaults, then each layer (name -> value) over those before it; without the options
    of other kinds of adapters."""
    s = {name: setting.default for name, setting in SETTINGS.items()}
    for layer in layers:
        s |= layer
    own = KINDS[s["peft"]].options
    for name in kind_options():
        if name not in own:
            del s[name]
        elif s[name] is None:
            s[name] = own[name].default
    for name in ("eval_every", "save_every"):
        s[name] = s[name] or max(1, s["steps"] // 10)
    return Namespace(**s)


def settings_of(typed):
    """All settings, from what was typed. ValueError for flags that a run below them does not allow, and for
    those that have no effect."""
    if typed.get("resume"):
        below = resumed(typed)
    elif typed.get("adapter"):
        below = adapted(typed)
    elif typed.keys() & {"model", "data"}:
        below = {}
    else:
        below = DEMO | {"out": free_name("runs/demo")}
    s = join(below, typed)
    idle = kind_options().keys() - vars(s).keys() | ({"c"} if len(METHODS[s.method]) < 2 else set())
    check_idle(typed, idle, f"with --method {s.method} --peft {s.peft}")
    return s


def resumed(typed):
    """The settings of the run that is resumed."""
    folder = typed["resume"]
    table = {name: ((in_files(s.form), None), None) if s.default is None else (in_files(s.form), ...)
             for name, s in SETTINGS.items()}
    before = check_fields(read_settings(folder)[0], f"{folder}/settings.json", table)
    other = [flag(name) for name, value in typed.items() if not SETTINGS[name].may_change
             and name != "resume" and value != before.get(name)]
    if other:
        may = " ".join(flag(name) for name, s in SETTINGS.items() if s.may_change)
        raise ValueError(f"--resume continues a run with its own settings, which {' '.join(sorted(other))} "
                         f"would change; only these may be given with it: {may}. To train it further, "
                         f"start from it: --adapter {folder}, and another --out")
    if finished(folder):
        raise ValueError(f"{folder} is finished: all of its {before['steps']} steps are done")
    if not (Path(folder) / "state.safetensors").exists():
        raise ValueError(f"{folder} holds no save yet: start again, with the same --out")
    return before | {"out": folder}


def adapted(typed):
    """What a run, or a PEFT adapter, says of a training that starts from it. Its adapters are what they are:
    ValueError for flags that would have them otherwise."""
    folder = Path(typed["adapter"])
    about = read_about(folder)
    kind, options = (FULL, {}) if about.get("whole") else read_options(folder)[:2]
    fixed = ["peft", "targets", *kind_options(), *["c"] * (folder / "mixing.safetensors").exists()]
    if odd := sorted(typed.keys() & {*fixed}):
        raise ValueError(f"{flag(odd[0])}: adapters and mixing are those of {folder}")
    there = {key: about[key] for key in ("method", "template", "c")} if about else {}
    model = {} if "model" in typed else {"model": str(base_of(folder))}
    return options | {"peft": kind} | model | there


def options(s, name):
    """The options of the adapters of the set `name`, here the same for all sets."""
    values = {option: getattr(s, option) for option in KINDS[s.peft].options}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def check_bits(s):
    """ValueError for a kind of adapters that 8 bits do not go with."""
    if s.base_bits and not issubclass(KINDS[s.peft], LoRA):
        raise ValueError(f"--base-bits {s.base_bits} goes with --peft lora or dora, not with {s.peft}")


def check(s):
    """ValueError for settings with which training cannot begin."""
    if missing := [flag(name) for name in ("model", "data", "out") if not getattr(s, name)]:
        raise ValueError(f"{', '.join(missing)} not given: see --help")
    if Path(s.out).exists() and not Path(s.out).is_dir():
        raise ValueError(f"--out {s.out} is a file: expected a folder, or a new name")
    for file in (s.data, s.val_data):
        if file is not None and (not Path(file).exists() or Path(file).is_dir()):
            found = "a folder" if Path(file).is_dir() else "not there"
            raise ValueError(f"{file!r} is {found}: expected a data file")
    if s.val_data and s.val_size != SETTINGS["val_size"].default:
        raise ValueError(f"--val-size: all of --val-data {s.val_data} is validated on, so give one of them")
    own = s.adapter and Path(s.model).resolve() == Path(s.adapter).resolve()
    if not own and read_about(s.model).get("method", "causal") != "causal":
        raise ValueError(f"{s.model} is a run with prompt passes, which need more than its checkpoint: "
                         "expected a base model, or a run of method causal")
    check_bits(s)
    if KINDS[s.peft].trains_base and s.targets and adapter_sets(s.method) == ["answer"]:
        raise ValueError(f"--targets: --peft {s.peft} trains all weights")
    if KINDS[s.peft].trains_base and s.dtype not in (None, "float32"):
        raise ValueError(f"--dtype {s.dtype}: --peft {s.peft} trains the weights, which takes float32")


# ----------------------------------------------------------------------------------------------------------
# Names of folders

def last_demonstration():
    """The newest run below runs/ that was finetuned from the demonstration's base."""
    saves = [f for f in Path("runs").rglob("bitune.json") if read_json(f).get("base") == DEMO["model"]]
    if not saves:
        raise ValueError("no run of the demonstration below runs/: python train.py makes one in a minute; "
                         "or give --model or --adapter")
    return max(saves, key=lambda f: f.stat().st_mtime).parent


def free_name(path):
    """`path`, or path-2, path-3 ..., whichever is not there yet."""
    names = chain([path], (f"{path}-{i}" for i in count(2)))
    return next(name for name in names if not Path(name).exists())
