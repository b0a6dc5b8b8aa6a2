"""Reading checkpoints and adapters, what is supported and what is said of the rest; how adapters start and
what they adapt; and files written whole or not at all."""

import math
import os
import shutil
from itertools import count

import pytest
import torch

from bitune import Bitune
from files.checkpoint import load_model, parse_config
from files.disk import finish_saves, json_bytes, write_files
from lora import add_adapter
from model import ACTIVATIONS, may_attend, rotary
from tiny import ANSWERS, CONFIG, RAGGED, rewrite, scatter, tiny_model, write_checkpoint


def logits(model, ids=RAGGED[3]):
    positions = torch.arange(len(ids))[None]
    with torch.inference_mode():
        return model(torch.tensor([ids]), positions, may_attend(positions, positions))[0]


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "m")


# ---- the config ------------------------------------------------------------------------------------------

@pytest.mark.reference
def test_rope_s_angles_are_not_rounded_before_their_cosine():
    """2104.09864's, p θ^(-2i/d), of a bfloat16 model: bfloat16 itself has 17.25 for 173 / 10."""
    at = torch.tensor([[1, 173, 1001]])
    angle = at.T * 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    for got, want in zip(rotary(parse_config(CONFIG), at, torch.bfloat16), (angle.cos(), angle.sin())):
        torch.testing.assert_close(got[0, 0].double(), want, atol=2**-8, rtol=0)


@pytest.mark.reference
def test_activations_are_the_published_ones():
    """At 1: the sigmoid of 1; the normal distribution's Φ(1), and what 1606.08415 has for it with tanh."""
    at_1 = {"silu": 0.73106, "gelu": 0.84134, "gelu_new": 0.84119, "gelu_pytorch_tanh": 0.84119}
    assert {name: round(f(torch.ones(())).item(), 5) for name, f in ACTIVATIONS.items()} == at_1


def test_a_text_longer_than_the_sliding_window_is_refused():
    model = tiny_model(model_type="mistral", sliding_window=12)
    logits(model, [1] * 12)
    with pytest.raises(ValueError, match="13 tokens are more than the model's sliding_window of 12"):
        logits(model, [1] * 13)


# ---- checkpoints -----------------------------------------------------------------------------------------

def test_every_tensor_that_does_not_fit_is_in_one_error(folder):
    def spoil(state):
        del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
        state |= {"model.layers.0.extra": torch.zeros(2), "lm_head.weight": torch.zeros(299, 32)}

    rewrite(folder / "model.safetensors", spoil)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    for part in ("4 tensors do not fit", "missing model.norm.weight (32,)",
                 "missing model.layers.1.mlp.up_proj.weight (48, 32)",
                 "unexpected model.layers.0.extra (2,)", "lm_head.weight is (299, 32), expected (300, 32)"):
        assert part in str(error.value)


def test_other_files_are_refused_by_name(folder, tmp_path, request):
    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            load_model(folder)

    norm = {"model.norm.weight": torch.ones(32, dtype=torch.int8)}
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update(norm))
    refused(folder, "model.norm.weight is I8, expected floats")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "lacks model.safetensors: expected safetensors")
    (folder / "model.safetensors").write_bytes(b"half a downl")
    refused(folder, "cannot be read .*is the download complete?")
    refused(tmp_path, "has no config.json")
    sharded = shutil.copytree(request.path.parent / "reference/base/llama3.2", tmp_path / "sharded")
    (sharded / "model-00003-of-00005.safetensors").unlink()
    refused(sharded, "lacks model-00003-of-00005.safetensors")


def test_bfloat16_weights_are_read_into_the_dtype_asked_for(folder):
    """Beside RoPE's frequencies, which old exports hold."""
    want, more = logits(load_model(folder)), {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    half = lambda tensors: {name: t.bfloat16() for name, t in (tensors | more).items()}
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update(half(tensors)))
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert (logits(model) - want).norm() < 0.05 * want.norm()


@torch.no_grad()
def test_weights_that_are_written_to_leave_the_file_alone(folder):
    want = tiny_model().state_dict()
    for p in load_model(folder).parameters():           # stored in float32: not copied
        p.zero_()
    assert all(torch.equal(t, want[name]) for name, t in load_model(folder).state_dict().items())


# ---- adapters --------------------------------------------------------------------------------------------

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


@pytest.mark.reference
def test_dropout_drops_inputs():
    """x, and not what A makes of it: of an input with a single 1, all of B A x goes or all of it stays."""
    (adapter, *_) = add_adapter(tiny_model(), "answer", targets=["q_proj"], dropout=0.5).values()
    scatter(adapter)
    dropped, whole = adapter.low_rank(torch.eye(32)), adapter.eval().low_rank(torch.eye(32))
    stays = dropped.any(dim=1)
    torch.testing.assert_close(dropped, 2 * whole * stays[:, None])
    assert 0 < stays.sum() < 32


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
