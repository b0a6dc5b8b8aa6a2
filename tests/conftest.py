"""What the tests run on: folders of reference numbers below tests/reference and each `--reference=FOLDER`.

    base models   config.json and reference_logits.safetensors (and greedy*.json)
    Bitune        cases.json beside a checkpoint, and VARIANT.safetensors
    encodings     golden*.json beside a tokenizer.json or tokenizer.model

Published checkpoints' files are not in this repository: where a folder `shared` lies beside it, its models
and tokenizers are tested too.
"""

import importlib
import json
import os
import pickle
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from edits import edits
from text.tokenizer import Tokenizer
from tiny import call, write_checkpoint, write_data

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
pytest.register_assert_rewrite("identities")        # so that these say, too, what they have found
torch.set_num_threads(1)                # the models are tiny: threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"     # and those of the commands run by the tests
os.fsync = lambda file: None            # no test cuts the power, and a disk may take its time


@pytest.fixture
def flags(tmp_path):
    """The flags of a short run; `flags("--lr", 1)` adds some."""
    model, data = write_checkpoint(tmp_path / "model"), write_data(tmp_path / "data.jsonl")
    line = (f"--model {model} --data {data} --out {tmp_path}/run --steps 6 --batch-size 4 --lr 0.01 "
            "--save-every 3 --eval-every 3")
    return lambda *more: [*line.split(), *map(str, more)]


@pytest.fixture
def exits(capsys):
    """The one line that a command says on standard error as it ends: exits(2, train, "--lr", 0)."""
    def line_of(code, command, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            call(command, *argv)
        assert end.value.code == code
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: "), line
        return line
    return line_of


@pytest.fixture
def says(capsys):
    """What a command says, on standard output (.out) and standard error (.err)."""
    def both(command, *argv):
        capsys.readouterr()
        call(command, *argv)
        return capsys.readouterr()
    return both


@pytest.fixture
def tokenizer(tmp_path):
    """Of bytes, <s> and </s>."""
    return Tokenizer.from_pretrained(write_checkpoint(tmp_path / "bytes"))


def pytest_addoption(parser):
    parser.addoption("--reference", action="append", default=[], metavar="FOLDER",
                     help="also test against every folder of reference numbers below FOLDER (repeatable)")
    parser.addoption("--edits", action="store_true", help="take every edit of docs/edits.md through every "
                     "command, and the whole suite through every edit (half an hour)")
    parser.addoption("--fuzz", type=int, default=20, metavar="N", help="random files of a kind")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Run the tests in two processes, every other one in a child, if there are many: a test is one thread,
    and most machines have two cores. The child's reports are shown at the end."""
    config, items, manager = session.config, session.items, session.config.pluginmanager
    if len(items) < 50 or config.option.collectonly or config.option.usepdb or not hasattr(os, "fork"):
        return (yield)
    importlib.import_module("torch._dynamo")    # checkpointing would, in each of the two

    def keep(report):
        pickle.dump(config.hook.pytest_report_to_serializable(config=config, report=report), file)

    with tempfile.TemporaryFile() as file, suppress(EOFError):
        child = os.fork()
        items[:] = items[child > 0::2]
        if not child:
            capture = manager.getplugin("capturemanager")
            capture.stop_global_capturing()     # the parent's, and its files
            capture.start_global_capturing()
            manager.unregister(name="terminalreporter")
            manager.register(SimpleNamespace(pytest_runtest_logreport=keep))
        try:
            yield
        finally:
            if not child:
                file.flush()
                os._exit(0)
            _, died = os.waitpid(child, 0)
        if died:
            raise pytest.UsageError("the second process of the tests died before it was through")
        file.seek(0)
        while data := pickle.load(file):
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            config.hook.pytest_runtest_logreport(report=report)
    return True


def pytest_collection_modifyitems(items):
    """What is no identity and no reference is about a command."""
    for item in items:
        if not {"identity", "reference"} & {mark.name for mark in item.iter_markers()}:
            item.add_marker("command")


def references(config, pattern):
    """The files of that name in all folders of reference numbers."""
    given = [Path(folder) for folder in config.getoption("--reference")]
    if absent := [str(folder) for folder in given if not folder.is_dir()]:
        raise pytest.UsageError(f"--reference {', '.join(absent)}: no such folder")
    roots = [HERE / "reference", SHARED / "models", SHARED / "tokenizers", *given]
    return [file for root in roots for file in sorted(root.rglob(pattern)) if file.is_file()]


def every(few):
    return lambda config: [(e, e) for e in (edits() if config.getoption("--edits") else few)]


# An argument of tests -> (what such a test is called, its value) of each.
ARGUMENTS = {
    "edit": every(["token", "opening"]),
    "whole": every([]),
    "base": lambda config: [(f"{f.parts[-3]}/{f.parts[-2]}", f.parent)
                            for f in references(config, "reference_logits.safetensors")],
    "greedy": lambda config: [("/".join(f.parts[-2:]), f) for f in references(config, "greedy*.json")],
    "variant": lambda config: [(f"{f.parent.name}/{v}", (f.parent, v))
                               for f in references(config, "cases.json")
                               for v in json.loads(f.read_text())["variants"]],
    "golden": lambda config: [(f"{f.parent.name}/{t}", (f, f.parent / t))
                              for f in references(config, "golden*.json")
                              for t in ("tokenizer.json", "tokenizer.model") if (f.parent / t).is_file()]}


def pytest_generate_tests(metafunc):
    for name in ARGUMENTS:
        if name in metafunc.fixturenames:
            called = ARGUMENTS[name](metafunc.config)
            metafunc.parametrize(name, [pytest.param(value, id=word) for word, value in called])
