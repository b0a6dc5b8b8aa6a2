"""What the README says of the code is so."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

import bitune
import sample
import train
from edits import ROOT, edited, edits
from tiny import ANSWERS, RAGGED, tiny_bitune

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_line_counts():
    counts = re.findall(r"^\| \[(\S+\.py)\]\(\S+\) \| (\d+) \|", README, re.M)
    assert len(counts) == 10
    for file, n in counts:  # room for a reader's own edits
        assert abs(len((ROOT / file).read_text().splitlines()) - int(n)) <= 20, file


def test_flags_and_links_exist():
    helps = train.make_parser().format_help() + sample.make_parser().format_help()
    own = "".join(f.read_text() for f in ROOT.glob("experiments/**/*.py"))
    known = re.findall(r"--[a-z][a-z-]+", helps) + re.findall(r'arg\("(--[a-z-]+)"', own)
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= {*known, "--reference"}
    assert [p for p in re.findall(r"\]\(((?!http)[^)#]+)\)", README) if not (ROOT / p).exists()] == []


@pytest.mark.parametrize("argv", [["--reference=FOLDER"], ["tests", "--reference", "FOLDER"]])
def test_other_reference_folders_are_found_by_the_commands_given(argv, tmp_path):
    """Numbers that lie outside the repository: there a word of pytest's command line can lead it astray."""
    shutil.copytree(ROOT / "tests/reference/base/qwen2", tmp_path / "mine/qwen2")
    assert f"python -m pytest {' '.join(argv)}" in README
    argv = [a.replace("FOLDER", str(tmp_path)) for a in argv]
    command = [sys.executable, "-m", "pytest", *argv, "--collect-only", "-k", "base_logits"]
    assert "[mine/qwen2]" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", edits())
def test_edits_apply_and_train(name, monkeypatch):
    module = edited(name)
    if hasattr(module, "may_attend") and not hasattr(module, "Bitune"):
        monkeypatch.setattr(bitune, "may_attend", module.may_attend)
        module = bitune
    torch.manual_seed(0)
    prompts = [p * 10 for p in RAGGED]
    before = bitune.Bitune(tiny_bitune().model)
    after = module.Bitune(before.model)
    losses = after.losses(prompts, ANSWERS)
    losses.sum().backward()
    assert losses.isfinite().all() and len(after.generate(prompts, 3)) == 4
    monkeypatch.undo()
    same = {"relu": True, "heads": True, "window": False, "values": False}[
        name
    ]  # at the start α is a half everywhere
    assert torch.allclose(losses, before.losses(prompts, ANSWERS)) == same


def test_a_theta_per_head_moves_each_head():
    after = edited("heads").Bitune(tiny_bitune().model)
    after.losses(RAGGED, ANSWERS).sum().backward()
    assert after.theta_key.shape == (3, 2, 1, 1) and after.theta_key.grad.unique().numel() == 6
