"""Adapters: how they start, what they adapt, and the files they share with PEFT."""

import json
import math
import os
from itertools import count

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitune import Bitune
from files.adapters import adapter_bytes, load_adapter
from files.disk import finish_saves, json_bytes, write_files
from lora import adapters, add_adapter
from tiny import ANSWERS, RAGGED, scatter, tiny_bitune, tiny_model


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_new_set_starts_at_the_base_model_and_only_it_trains(kind):
    """In float32, on a base of any dtype; the output keeps that dtype."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        model = tiny_model(dtype, model_type="qwen2")
        before = Bitune(model, "causal")(RAGGED, ANSWERS)[0]
        add_adapter(model, "answer", kind)
        after = Bitune(model, "causal")(RAGGED, ANSWERS)[0]
        assert after.dtype == dtype and (after - before).norm() <= tolerance * before.norm()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert all(p.requires_grad == (".sets.answer." in name) for name, p in model.named_parameters())


def test_lora_starts_as_peft_s():
    (adapter, *_) = add_adapter(tiny_model(), "answer", targets=["down_proj"]).values()
    A, most = adapter.lora_A, 1 / math.sqrt(48)
    assert A.shape == (8, 48) and 0.9 * most < A.abs().max() <= most


def test_targets_and_sets_are_independent():
    model = tiny_model()
    add_adapter(model, "answer", targets=("q_proj", "v_proj"))
    add_adapter(model, "prompt", rank=2, targets=("down_proj",))
    assert {p.split(".")[-1] for p in adapters(model, "answer")} == {"q_proj", "v_proj"}
    assert {p.split(".")[-1] for p in adapters(model, "prompt")} == {"down_proj"}
    Bitune(model)(RAGGED, ANSWERS)
    with pytest.raises(ValueError, match="no linear is named fc1: expected down_proj, gate_proj, k_proj"):
        add_adapter(tiny_model(), "answer", targets=("fc1", "q_proj"))


@pytest.mark.reference
def test_dropout_drops_inputs():
    """x, and not what A makes of it: of an input with a single 1, all of B A x goes or all of it stays."""
    (adapter, *_) = add_adapter(tiny_model(), "answer", targets=["q_proj"], dropout=0.5).values()
    scatter(adapter)
    dropped, whole = adapter.low_rank(torch.eye(32)), adapter.eval().low_rank(torch.eye(32))
    stays = dropped.any(dim=1)
    torch.testing.assert_close(dropped, 2 * whole * stays[:, None])
    assert 0 < stays.sum() < 32


NAME = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("spoil, message", [
    (lambda c, t: t.pop(NAME.format(0)), "missing .*layers.0.self_attn.q_proj.lora_A"),
    (lambda c, t: t.update({NAME.format(9): torch.zeros(4, 32)}), "unexpected .*layers.9"),
    (lambda c, t: c.update(r=5), r"is \(4, 32\), expected \(5, 32\)"),
    (lambda c, t: t.clear(), "no tensors"),
    (lambda c, t: c.update(peft_type="LOHA"), "an adapter of kind 'LOHA': expected FULL or IA3 or LORA"),
    (lambda c, t: c.update(modules_to_save=["x"], bias="all"), "has the modules_to_save .'x'., expected null or false"),
])
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, spoil, message):
    write_files(tmp_path, adapter_bytes(tiny_bitune("causal").model, "answer"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    spoil(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_model(), "answer", tmp_path)


# ---- to the disk -----------------------------------------------------------------------------------------

def test_files_are_written_all_or_none_wherever_the_process_dies(tmp_path, monkeypatch):
    """Fail at each system call in turn: afterwards all is old or, once finished, all is new."""
    old, new = ({name: data for name in ("a", "sub/b", "c")} for data in (b"old", b"new"))
    read = lambda folder: {name: (folder / name).read_bytes() for name in old}
    outcomes = []
    for moment in range(8):
        folder, calls = tmp_path / str(moment), count()
        write_files(folder, old)

        def dying(call):
            def wrapped(*args):
                if next(calls) == moment:
                    raise OSError(28, "No space left on device")
                call(*args)
            return wrapped

        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr("os.fsync", dying(os.fsync))
            patch.setattr("os.replace", dying(os.replace))
            write_files(folder, new)
        finish_saves(folder)
        assert read(folder) in (old, new)
        assert sum(f.is_file() and f.name != ".lock" for f in folder.rglob("*")) == 3
        outcomes.append(read(folder) == new)
    assert outcomes == [False] * 5 + [True] * 3     # three drafts, their list and its name; then the renames


def test_bytes_are_on_the_disk_before_a_name_changes(tmp_path, monkeypatch):
    """At each fsync the system has the whole file: nothing of it waits in Python's buffer."""
    done, replace = [], os.replace
    monkeypatch.setattr("os.fsync", lambda file: done.append(os.fstat(file).st_size))
    monkeypatch.setattr("os.replace", lambda old, new: (done.append(new.name), replace(old, new)))
    write_files(tmp_path, {"a": b"12", "b": b"345"})
    assert done == [2, 3, len(json_bytes(["a", "b"])), "renaming.json", "a", "b"]
