"""Runs on disk outlive the names in the code: `tests/old` holds three that commit aad9752 made on
tiny.write_checkpoint and tiny.write_data, half of one of them, and what they answered."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from bitune import METHODS
from files.run import load_run
from tiny import write_checkpoint, write_data

OLD = Path(__file__).parent / "old"
SAID = json.loads((OLD / "said.json").read_text())


@pytest.fixture(autouse=True)
def todays_methods():
    """Reading an old run may add to METHODS what was a method then."""
    today = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(today)


@pytest.mark.parametrize("run", SAID)
def test_an_old_run_answers_as_it_did(run, tmp_path):
    bitune, _, _, about = load_run(OLD / run, write_checkpoint(tmp_path / "base"), "cpu")
    assert about["method"] == {"lora": "causal", "anticausal": "anticausal"}.get(run, "bitune")
    assert about.get("c", 0.01) == (0.1 if run == "anticausal" else 0.01)
    logits, labels = bitune([[256, 5, 9, 250, 3], [256, 4]], [[3, 2, 1], [9]])
    want = torch.tensor(SAID[run]["logits"])
    torch.testing.assert_close(logits[labels >= 0][:, :8], want, atol=1e-4, rtol=0)
    assert bitune.generate([[256, 5, 9, 250, 3], [256, 4]], 8) == SAID[run]["ids"]


def test_an_old_run_is_resumed_to_where_it_would_have_come(tmp_path):
    base, data = write_checkpoint(tmp_path / "base"), write_data(tmp_path / "data.jsonl")
    half = shutil.copytree(OLD / "half", tmp_path / "half")
    train.main(["--resume", str(half), "--model", str(base), "--data", str(data)])
    for file in ("adapter_model.safetensors", "bidirectional/adapter_model.safetensors"):
        for name, want in load_file(OLD / "whole" / file).items():
            torch.testing.assert_close(load_file(half / file)[name], want, atol=1e-5, rtol=1e-4)
    losses = [[json.loads(line).get("loss") for line in (f / "log.jsonl").read_text().splitlines()]
              for f in (half, OLD / "whole")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
