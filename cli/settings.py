"""Flags to settings: train.py's parser, the demonstration's settings, those of a run that is resumed.

A default stands once: in the constructor that takes it, or here.
"""

import argparse
import inspect
import math
import os
import sys
from itertools import chain, count
from pathlib import Path

from bitune import METHODS, Bitune
from cli.process import fail
from files.adapters import read_options
from files.checkpoint import DTYPES
from files.disk import finish_writing
from files.run import FULL, base_of, finished, read_about, read_settings
from lora import KINDS, LoRA, add_adapter
from text.examples import TEMPLATES
from text.rows import TASKS
from text.words import listed, read_json

# What may be given anew when a run is resumed.
MAY_CHANGE = ("model", "data", "val-data", "micro-batch-size", "micro-batch-tokens", "checkpointing",
              "device")

WORDS = ("auto", "chat", *TEMPLATES)        # of --template

# Without --model and --data: the demonstration. Its files come with this repository.
HERE = os.path.relpath(Path(__file__).parent.parent / "experiments/demo")
DEMO = {"model": f"{HERE}/base", "data": f"{HERE}/data/train.jsonl", "val_data": f"{HERE}/data/val.jsonl",
        "steps": 200, "batch_size": 32, "lr": 2e-2, "eval_every": 20}


# ----------------------------------------------------------------------------------------------------------
# What every command's parser is made of

def default(function, name):
    """The default of a function's argument."""
    return inspect.signature(function).parameters[name].default


def number(kind, low, high=math.inf):
    """An argparse type: a number of `kind` within [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= min(high, sys.float_info.max):       # nan and inf are out of range, too
            limit = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: expected at least {low}{limit}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def new_parser(description):
    """An argument parser whose errors are one line, too."""
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=as_it_stands)
    parser.error = fail
    return parser


def flag_adder(parser, title=None):
    """A function that adds a flag to a group of the parser, its default written behind its help."""
    section = parser.add_argument_group(title) if title else parser

    def add(name, *, help, default=None, **more):
        words = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        shown = "" if default is None or default is False else f" (default: {words})"
        section.add_argument(name, default=default, help=help + shown, **more)
    return add


def add_device(arg):
    arg("--dtype", choices=DTYPES, help="of the base model (default: bfloat16 on a GPU, float32 on a CPU "
        "and where the base trains)")
    arg("--device", help="cpu, cuda or mps (default: cuda if there is one, else cpu)")


def add_run(arg):
    """The flags that say what is asked or scored."""
    arg("--model", metavar="FOLDER", help="base model: a checkpoint folder (default: the run's own)")
    arg("--adapter", metavar="RUN", help="a run of train.py, or a PEFT adapter (default: the bare model)")
    arg("--max-new-tokens", type=number(int, 1), default=default(Bitune.answer, "max_new_tokens"),
        help="longest answer")
    add_device(arg)


def add_sampling(arg):
    """The flags that say how an answer is sampled."""
    of = lambda name: default(Bitune.answer, name)
    arg("--temperature", type=number(float, 0), default=of("temperature"),
        help="0 takes the likeliest token")
    arg("--top-k", type=number(int, 0), default=of("top_k"), help="sample from the k likeliest; 0: all")
    arg("--top-p", type=number(float, 1e-9, 1), default=of("top_p"),
        help="sample from the likeliest that make up this mass")
    arg("--seed", type=number(int, 0, 2**63 - 1), default=of("seed"), help="of the sampling")


def add_chat(arg):
    """The flags that say into what words a prompt is put, and what goes before it."""
    arg("--template", choices=WORDS, help="words around the text (default: the run's; without one auto: the "
        "model's own chat markup if it is one of chat-*, else plain)")
    arg("--chat", nargs="?", const="recompute", choices=("recompute", "alternating"), help="each line goes "
        "on from those before; recompute (the default) reads all again, alternating only what is new")
    arg("--system", metavar="TEXT", help="what the system says before the first line")


# ----------------------------------------------------------------------------------------------------------
# train.py's

def kind_options():
    """Every option of a kind of adapters, by its name: the Option, and the kinds that have it."""
    found = {}
    for kind, maker in KINDS.items():
        for name, option in maker.options.items():
            found.setdefault(name, (option, []))[1].append(kind)
    return found


def train_parser(description=None):
    parser = new_parser(description)
    arg = flag_adder(parser, "what")
    arg("--model", metavar="FOLDER", help="base model: a Hugging Face checkpoint folder")
    arg("--data", metavar="FILE", help="training data: JSON Lines or a JSON list, see docs/data.md")
    arg("--out", metavar="RUN", help="folder to write the run to")
    arg("--adapter", metavar="RUN", help="start from what this run, or PEFT adapter, has learned: its base, "
        "adapters and template, its method and mixing; a set that --method needs more starts as its first")
    arg("--resume", metavar="RUN", help="continue RUN from its last save, with its own settings; only "
        "these flags may be given with it: " + " ".join(f"--{k}" for k in MAY_CHANGE))

    arg = flag_adder(parser, "method")
    arg("--method", default=default(Bitune, "method"), choices=METHODS, help="how the prompt is read")
    arg("--c", default=default(Bitune, "c"), type=number(float, 1e-9, 1e9), help="the constant in α, where "
        "every θ starts: the smaller, the faster α moves")
    arg("--peft", default=default(add_adapter, "kind"), choices=KINDS, help="kind of adapters")
    for name, (option, kinds) in kind_options().items():
        own, shown, form = option.default, option.default, {}
        if isinstance(own, tuple):
            shown, form = " ".join(own), {"nargs": "+"}
        else:
            form = {"type": number(type(own), option.low, option.high)}
        if any(KINDS[kind].options[name].default != own for kind in kinds):
            shown = "each kind's own"
        arg(f"--{name.replace('_', '-')}", **form,
            help=f"of {', '.join(kinds)}: {option.help} (default: {shown})")
    arg("--targets", nargs="+", metavar="NAME", help="linears to adapt (default: those of lora.is_target)")

    arg = flag_adder(parser, "data")
    arg("--task", default="rows", choices=TASKS, help="form of the data: rows of the forms in docs/data.md, "
        "or a task's published files")
    arg("--template", default="auto", choices=WORDS, help="words around prompt and answer; chat: the "
        "model's own chat markup, auto: the same if it is one of chat-*, else paper")
    arg("--max-length", type=number(int, 2), help="longest example in tokens, longer ones are dropped "
        "(default: 512, or what the model can read)")
    arg("--val-data", metavar="FILE", help="validation data; without it the last examples of --data")
    arg("--val-size", default=1000, type=number(int, 0), help="how many of these, at most a tenth; 0: none")

    arg = flag_adder(parser, "optimisation")
    arg("--steps", default=3000, type=number(int, 1, 10**9), help="optimizer steps")
    arg("--batch-size", default=10, type=number(int, 1, 10**9), help="examples a step")
    arg("--micro-batch-size", type=number(int, 1), help="examples at a time, whatever their length (same "
        "result)")
    arg("--micro-batch-tokens", type=number(int, 1), help="tokens at a time, in examples of like length "
        "(same result; default: as many as the memory has room for)")
    arg("--lr", default=3e-4, type=number(float, 0), help="peak learning rate")
    arg("--warmup", default=0.1, type=number(float, 0, 1), help="part of the steps in which the rate rises")
    arg("--checkpointing", action="store_true", help="compute each block twice, and keep its input alone: "
        "less memory, half more time (same result)")
    arg("--base-bits", type=int, choices=[8], help="the linears' frozen weights in 8 bits, with lora or "
        "dora: half the memory of bfloat16, slower, a little off (default: as --dtype has them)")
    arg("--clip", default=1.0, type=number(float, 1e-9), help="largest gradient norm")
    arg("--eps", default=1e-6, type=number(float, 1e-12), help="AdamW's epsilon")
    arg("--weight-decay", default=0.0, type=number(float, 0), help="AdamW's weight decay")
    arg("--seed", default=42, type=number(int, 0, 2**63 - 1), help="of adapters and order of examples")

    arg = flag_adder(parser, "running")
    arg("--eval-every", type=number(int, 1), help="steps between validations (default: a tenth of --steps)")
    arg("--save-every", type=number(int, 1), help="steps between saves (default: a tenth of --steps)")
    arg("--keep", default="last", choices=("last", "best"), help="best: beside the last save also the one "
        "with the lowest validation loss, in RUN/best")
    add_device(arg)
    return parser


def given(argv):
    """The settings that the flags `argv` name themselves, without defaults."""
    parser = train_parser()
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(argv))))
    return {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not None}


def read_flags(argv, description=None):
    """The settings that the flags `argv` stand for: completed by DEMO if they name neither model nor data,
    or by those of the run that is resumed. ValueError for a run that is not there, or finished."""
    parser = train_parser(description)
    s = parser.parse_args(argv)
    if s.resume:
        s = resumed(parser, argv, s.resume)
    elif s.adapter:
        s = adapted(parser, argv, s)
    elif not s.model and not s.data:
        parser.set_defaults(**DEMO, out=free_name("runs/demo"))
        s = parser.parse_args(argv)
    return complete(s)


def complete(s):
    """Settings with the defaults that hang on others, and without the options of other kinds of adapters."""
    for name, (option, kinds) in kind_options().items():
        if s.peft not in kinds:
            delattr(s, name)
        elif getattr(s, name) is None:
            setattr(s, name, KINDS[s.peft].options[name].default)
    s.eval_every, s.save_every = (n or max(1, s.steps // 10) for n in (s.eval_every, s.save_every))
    return s


def options(s, name):
    """The options of the adapters of the set `name`, as `lora.add_adapter` takes them: all sets' the same."""
    values = {name: getattr(s, name) for name in KINDS[s.peft].options}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def resumed(parser, argv, folder):
    """The settings of the run in `folder`, with what was given of MAY_CHANGE. ValueError for other flags."""
    flags = given(argv)
    finish_writing(folder)
    before = checked(parser, read_settings(folder)[0], Path(folder) / "settings.json")
    if (steps := flags.pop("steps", before["steps"])) != before["steps"]:
        raise ValueError(f"{folder} cannot be made longer or shorter: each step's learning rate hangs on "
                         f"their number, {before['steps']}. For another stage, start from what it has "
                         f"learned: --adapter {folder} --steps {steps}, and another --out")
    if more := {name.replace("_", "-") for name in flags} - {"resume", *MAY_CHANGE}:
        raise ValueError(f"--resume continues a run with its own settings, which "
                         f"--{' --'.join(sorted(more))} would change")
    if not (Path(folder) / "state.safetensors").exists():
        raise ValueError(f"{folder} holds no save yet: start again, with the same --out")
    if finished(folder):
        raise ValueError(f"{folder} is finished: all of its {before['steps']} steps are done")
    return argparse.Namespace(**before | flags | {"out": folder})


def checked(parser, settings, file):
    """Settings that were written down, as the flags that they stand for are read: ValueError for what no
    flag can be. Flags that came later have their defaults."""
    if unknown := sorted(settings.keys() - vars(parser.parse_args([])).keys()):
        raise ValueError(f"{file} has {listed(unknown, ', ')}, which this version does not know")
    argv = []
    for name, value in settings.items():
        flag, several = f"--{name.replace('_', '-')}", isinstance(value, list)
        if value is True:
            argv.append(flag)
        elif value is not None and value is not False:
            argv += [flag, *map(str, value)] if several else [f"{flag}={value}"]

    def refuse(problem):
        raise ValueError(f"{file}: {problem}")
    fail, parser.error = parser.error, refuse
    try:
        return vars(parser.parse_args(argv))
    finally:
        parser.error = fail


def adapted(parser, argv, s):
    """Settings that start from the run or PEFT adapter s.adapter: what was not given is as it was there. Its
    adapters are what they are: ValueError for flags that would have them otherwise."""
    folder, flags = Path(s.adapter), given(argv)
    finish_writing(folder)
    about = read_about(folder)
    own = {"c"} if (folder / "mixing.safetensors").exists() else set()
    if odd := flags.keys() & {"peft", "targets", *kind_options(), *own}:
        raise ValueError(f"--{sorted(odd)[0].replace('_', '-')}: adapters and mixing are those of {folder}")
    if (folder / "config.json").exists():
        kind, own = FULL, {}
    else:
        kind, own, *_ = read_options(folder)
    there = {key: about[key] for key in ("method", "template", "c") if key in about}
    return argparse.Namespace(**vars(s) | own | {"peft": kind, "model": s.model or str(base_of(folder))}
                              | there | {key: flags[key] for key in there if key in flags})


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


def check(s):
    """ValueError for settings with which training cannot begin."""
    if missing := [f"--{k}" for k in ("model", "data", "out") if not getattr(s, k)]:
        raise ValueError(f"{', '.join(missing)} not given: see --help")
    if Path(s.out).exists() and not Path(s.out).is_dir():
        raise ValueError(f"--out {s.out} is a file: expected a folder, or a new name")
    for file in (s.data, s.val_data):
        if file is not None and (Path(file).is_dir() or not Path(file).exists()):     # a pipe will do
            found = "a folder" if Path(file).is_dir() else "not there"
            raise ValueError(f"{file!r} is {found}: expected a data file")
    made = Path(s.model) / "bitune.json"
    if made.exists() and s.model != s.adapter and read_json(made).get("method") != "causal":
        raise ValueError(f"{s.model} is a run with prompt passes, which need more than its checkpoint: "
                         "expected a base model, or a run of method causal")
    if s.base_bits and not issubclass(KINDS[s.peft], LoRA):
        raise ValueError(f"--base-bits {s.base_bits} goes with --peft lora or dora, not with {s.peft}")
    if KINDS[s.peft].trains_base and s.dtype not in (None, "float32"):
        raise ValueError(f"--dtype {s.dtype}: --peft {s.peft} trains the weights, which takes float32")
