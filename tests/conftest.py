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
import struct
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from edits import edits
from tiny import write_checkpoint, write_data

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # and those of the commands run by the tests
os.fsync = lambda file: None  # no test cuts the power, and a disk may take its time


@pytest.fixture
def flags(tmp_path):
    """The flags of a short run; `flags("--lr", 1)` adds some."""
    model, data = write_checkpoint(tmp_path / "model"), write_data(tmp_path / "data.jsonl")
    line = (f"--model {model} --data {data} --out {tmp_path}/run --steps 6 --batch-size 4 --lr 0.01 "
            "--save-every 2 --eval-every 3")
    return lambda *more: [*line.split(), *map(str, more)]


def pytest_addoption(parser):
    parser.addoption(
        "--reference", action="append", default=[], metavar="FOLDER",
        help="also test against every folder of reference numbers below FOLDER (repeatable)",
    )
    parser.addoption("--edits", action="store_true", help="take every edit of docs/edits.md through every "
                     "command, and the whole suite through every edit (half an hour)")
    parser.addoption("--fuzz", type=int, default=20, metavar="N", help="random files of a kind")


def pytest_runtestloop(session):
    """Run the tests in two processes, if there are many: each is one thread, and most machines have two
    cores. Each takes the next test when it is through with one; the child's reports are shown at the end."""
    config, items = session.config, session.items
    if len(items) < 50 or config.option.collectonly or config.option.usepdb or not hasattr(os, "fork"):
        return None
    tests, fill = os.pipe()                     # the tests that nobody has taken, by number
    os.write(fill, struct.pack(f"{len(items)}H", *range(len(items))))
    os.close(fill)

    def take():
        n = os.read(tests, 2)
        return items[struct.unpack("H", n)[0]] if n else None

    importlib.import_module("torch._dynamo")    # checkpointing would, in each of the two
    with tempfile.TemporaryFile("w+") as reports:
        child = os.fork()
        if not child:
            capture = config.pluginmanager.getplugin("capturemanager")
            capture.stop_global_capturing()     # the parent's, and its files
            capture.start_global_capturing()
            config.pluginmanager.unregister(name="terminalreporter")
            config.pluginmanager.register(Reports(config, reports))
        item, mine = take(), 0
        while item:
            following = take()
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            item, mine = following, mine + 1
        if not child:
            reports.flush()
            os._exit(0)
        os.waitpid(child, 0)
        reports.seek(0)
        read = partial(config.hook.pytest_report_from_serializable, config=config)
        theirs = [read(data=json.loads(line)) for line in reports]
        for report in theirs:
            if isinstance(report.longrepr, list):       # of a skipped test; JSON knows no tuples
                report.longrepr = tuple(report.longrepr)
            config.hook.pytest_runtest_logreport(report=report)
        if len({report.nodeid for report in theirs}) + mine != len(items):
            raise pytest.UsageError("the second process of the tests died before it was through")
    return True


class Reports:
    """Writes test reports to a file, a line each."""

    def __init__(self, config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(data), file=self.file)


def pytest_collection_modifyitems(items):
    """What is no identity and no reference is about a command."""
    for item in items:
        if not {"identity", "reference"} & {mark.name for mark in item.iter_markers()}:
            item.add_marker("command")


def references(config):
    roots = [
        HERE / "reference", SHARED / "models", SHARED / "tokenizers",
        *map(Path, config.getoption("--reference")),
    ]
    if absent := [str(r) for r in roots[3:] if not r.is_dir()]:
        raise pytest.UsageError(f"--reference {', '.join(absent)}: no such folder")
    return [f for root in roots for f in sorted(root.rglob("*")) if f.is_file()]


def pytest_generate_tests(metafunc):
    files = (
        references(metafunc.config)
        if {"base", "variant", "golden", "greedy"} & set(metafunc.fixturenames)
        else []
    )

    def parametrize(name, values):
        metafunc.parametrize(name, [v for _, v in values], ids=[i for i, _ in values])

    if "edit" in metafunc.fixturenames:
        all_of_them = metafunc.config.getoption("--edits")
        metafunc.parametrize("edit", edits() if all_of_them else ["token", "opening"])
    if "whole" in metafunc.fixturenames:
        metafunc.parametrize("whole", edits() if metafunc.config.getoption("--edits") else [])
    if "base" in metafunc.fixturenames:
        parametrize(
            "base",
            [
                (f"{f.parent.parent.name}/{f.parent.name}", f.parent)
                for f in files
                if f.name == "reference_logits.safetensors"
            ],
        )
    if "greedy" in metafunc.fixturenames:
        parametrize("greedy", [(f"{f.parent.name}/{f.name}", f) for f in files if f.match("greedy*.json")])
    if "variant" in metafunc.fixturenames:
        parametrize(
            "variant",
            [
                (f"{f.parent.name}/{v}", (f.parent, v))
                for f in files
                if f.name == "cases.json"
                for v in json.loads(f.read_text())["variants"]
            ],
        )
    if "golden" in metafunc.fixturenames:
        parametrize(
            "golden",
            [
                (f"{f.parent.name}/{t}", (f, f.parent / t))
                for f in files
                if f.match("golden*.json")
                for t in ("tokenizer.json", "tokenizer.model")
                if (f.parent / t).is_file()
            ],
        )
