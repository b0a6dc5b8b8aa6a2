"""What the tests run on: folders of reference numbers below tests/reference and each `--reference=FOLDER`.

    base models   config.json and reference_logits.safetensors (and greedy*.json)
    Bitune        cases.json beside a checkpoint, and VARIANT.safetensors
    encodings     golden*.json beside a tokenizer.json or tokenizer.model

Published checkpoints' files are not in this repository: where a folder `shared` lies beside it, its models
and tokenizers are tested too.
"""

import json
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # and those of the commands run by the tests


def pytest_addoption(parser):
    parser.addoption(
        "--reference",
        action="append",
        default=[],
        metavar="FOLDER",
        help="also test against every folder of reference numbers below FOLDER (repeatable)",
    )


def references(config):
    roots = [
        HERE / "reference",
        SHARED / "models",
        SHARED / "tokenizers",
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
