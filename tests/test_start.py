"""Commands answer --help and wrong flags without torch, by the same words as with it."""

import os
import re
import subprocess
import sys

import pytest

import sample
import train
from edits import ROOT, copy_project
from experiments import ablate, benchmark, cost, curves, evaluate, merge
from experiments.demo import __main__ as demo
from experiments.demo import pretrain

COMMANDS = {"train": train, "sample": sample, "evaluate": evaluate, "ablate": ablate, "merge": merge,
            "cost": cost, "curves": curves, "benchmark": benchmark, "demo": demo,
            "demo.pretrain": pretrain}


@pytest.fixture
def typed(tmp_path):
    """Type a command where every package from outside says that it is imported, and ends the process."""
    for name in ("torch", "numpy", "tiktoken", "safetensors"):
        (tmp_path / f"{name}.py").write_text('raise SystemExit("imported for real")')

    def run(name, *argv, root=ROOT):
        file = [f"{name}.py"] if name in ("train", "sample") else ["-m", f"experiments.{name}"]
        return subprocess.run([sys.executable, "-S", *file, *argv], cwd=root, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "80"})
    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_same_without_torch(name, typed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        COMMANDS[name].main(["--help"])
    done, want = typed(name, "--help"), capsys.readouterr().out
    words = lambda text: re.sub(r"usage: .*?\[-h\]", "", text, flags=re.S).split()     # less its own name
    assert done.returncode == 0 and not done.stderr and words(done.stdout) == words(want)


@pytest.mark.parametrize("command", [
    "train --no-such-flag", "train --steps 0", "train --method none", "evaluate", "ablate --out x --rank 0",
])
def test_wrong_flags_are_refused_without_torch(command, typed, capsys):
    name, *argv = command.split()
    with pytest.raises(SystemExit) as end:
        COMMANDS[name].main(argv)
    done, want = typed(name, *argv), capsys.readouterr().err
    assert done.returncode == end.value.code == 2 and done.stderr == want and want.startswith("error: ")


def test_what_is_in_order_is_imported_for_real(typed):
    assert typed("train", "--steps", "3").stderr == "imported for real\n"
    assert typed("ablate", "--out", "x", "--steps", "3").stderr == "imported for real\n"


@pytest.mark.parametrize("slip", [
    ("model.py", "NONE = slice(0) ", "LARGEST = 2 * torch.pi\nNONE = slice(0) "),
    ("lora.py", "Option(8,", "Option(8 if torch.cuda.is_available() else 4,"),
    ("lora.py", "Option(8,", "Option(8 if torch.get_default_dtype() == torch.float32 else 4,"),
    ("bitune.py", "c=0.01)", "c=torch.finfo(torch.float32).eps)"),
], ids=["counted with", "true or false", "compared", "shown"])
def test_what_is_beyond_a_stand_in_is_imported_for_real(slip, typed, tmp_path):
    copy = copy_project(tmp_path / "copy", slips=[slip])
    assert typed("train", "--help", root=copy).stderr == "imported for real\n"
