"""What is in fast/ gives the same numbers as the plain forms in the five files."""

import sys

import pytest
import torch

from bitune import METHODS, Bitune
from fast import decoding, memory
from fast.optimizer import AdamW
from lora import KINDS, LoRA
from experiments.cost import kept
from tiny import ANSWERS, RAGGED, tiny_bitune, tiny_model

F64 = torch.float64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_answers_are_the_unmerged_ones(method, kind):
    bitune = tiny_bitune(method, kind, dtype=F64).eval()
    before = {name: t.clone() for name, t in bitune.state_dict().items()}
    with torch.inference_mode():
        want = bitune(RAGGED, ANSWERS)[0]
        quick = decoding.quick(bitune)
        torch.testing.assert_close(quick(RAGGED, ANSWERS)[0], want, atol=1e-10, rtol=1e-10)
        assert torch.equal(bitune(RAGGED, ANSWERS)[0], want) and quick.answer_set is None
    assert quick.generate(RAGGED, 6) == bitune.generate(RAGGED, 6) and not quick.training
    assert all(torch.equal(t, before[name]) for name, t in bitune.state_dict().items())


def test_without_room_the_set_stays_apart(monkeypatch):
    monkeypatch.setattr(decoding, "fits", lambda model: False)
    bitune = tiny_bitune().eval()
    assert decoding.quick(bitune) is bitune and bitune.answer_set == "answer"
    assert decoding.fits(bitune.model) is False


def test_an_edit_of_lora_is_not_passed_over(monkeypatch):
    """One of what merging does is refused, one of the low-rank part is left as it is."""
    monkeypatch.setattr(LoRA, "merged", lambda self, linear: (linear.weight.detach(), linear.bias))
    with pytest.raises(ValueError, match="do forward and merged of the kind lora, in lora.py, go together"):
        decoding.quick(tiny_bitune().eval())
    plain = LoRA.low_rank
    monkeypatch.setattr(LoRA, "low_rank", lambda self, x: plain(self, x).tanh())
    want = gradients(tiny_bitune())
    bitune = tiny_bitune()
    memory.lean(bitune.model)
    assert all(map(torch.equal, gradients(bitune), want))


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"model_type": "phi"}])
def test_laid_out_anew_weights_are_the_same(config):
    bitune = Bitune(tiny_model(**config), "causal").eval()
    with torch.inference_mode():
        want = bitune(RAGGED, ANSWERS)[0]
        state = {name: t.clone() for name, t in bitune.state_dict().items()}
        decoding.lay_out(bitune.model)
        torch.testing.assert_close(bitune(RAGGED, ANSWERS)[0], want, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(t, state[name]) for name, t in bitune.state_dict().items())
    names = {name for name, p in bitune.model.named_parameters() if p.dim() > 1 and not p.is_contiguous()}
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    assert head in names and any("up_proj" in name or "fc1" in name for name in names)
    assert not any("down_proj" in name or "fc2" in name for name in names)
    model = tiny_model(torch.bfloat16)
    decoding.lay_out(model)
    assert all(p.is_contiguous() for p in model.parameters())


# ---- memory ----------------------------------------------------------------------------------------------

def gradients(bitune):
    losses = bitune.losses(RAGGED, ANSWERS)
    losses.sum().backward()
    return [losses, *(p.grad for p in bitune.parameters() if p.grad is not None)]


def test_the_low_rank_part_s_gradient():
    torch.manual_seed(0)
    x, A, B = (torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (6, 4)))
    assert torch.autograd.gradcheck(memory.LowRank.apply, (x, A, B))
    assert torch.autograd.gradcheck(memory.LowRank.apply, (x.detach(), A, B))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("method", ["bitune", "shared-weights", "causal"])
def test_lean_adapters_have_the_same_gradients(method, kind):
    want = gradients(tiny_bitune(method, kind, dtype=F64))
    bitune = tiny_bitune(method, kind, dtype=F64)
    memory.lean(bitune.model)
    for one, other in zip(gradients(bitune), want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_lean_adapters_leave_dropout_alone():
    bitune = tiny_bitune(adapters={"dropout": 0.5})
    torch.manual_seed(1)
    want = gradients(bitune)
    bitune.zero_grad()
    memory.lean(bitune.model)
    torch.manual_seed(1)
    assert all(map(torch.equal, gradients(bitune), want))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["bitune", "causal"])
def test_checkpointing_changes_no_bit(method, kind):
    more = {"dropout": 0.1} if kind == "lora" else {}
    plain, short = (tiny_bitune(method, kind, adapters=more, dtype=F64) for _ in range(2))
    memory.checkpointing(short.model)
    results = []
    for bitune in (plain, short):
        torch.manual_seed(1)
        results.append(gradients(bitune))
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))


def test_what_they_keep():
    """Of a bfloat16 base: the float32 copies go, then all but the blocks' inputs, K and V."""
    sizes = []
    for step in (None, memory.lean, memory.checkpointing):
        bitune = tiny_bitune("bitune", dtype=torch.float32)
        for name, p in bitune.model.named_parameters():
            p.data = p.data if ".sets." in name else p.data.bfloat16()
        if step:
            memory.lean(bitune.model)
        if step == memory.checkpointing:
            memory.checkpointing(bitune.model)
        sizes.append(kept(bitune, lambda: bitune.losses([[5] * 90], [[7] * 60]).sum()))
    assert sizes[1] < 0.8 * sizes[0] and sizes[2] < sizes[1] / 3, sizes


def test_adamw_is_torch_s_without_its_compiler(monkeypatch):
    def steps(kind):
        weight = torch.nn.Parameter(torch.arange(12.).view(3, 4).sin())
        optimizer = kind([{"params": [weight], "weight_decay": 0.1}], lr=0.1, eps=1e-6, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            (weight ** 3).sum().backward()
            optimizer.step()
        return weight, *optimizer.state[weight].values()

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch._dynamo", None)         # to import it is an error
        ours = steps(AdamW)
    assert all(map(torch.equal, ours, steps(torch.optim.AdamW)))
