"""What is in fast/ gives the same numbers as the plain forms in the five files."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bitune import METHODS, Bitune
from fast import decoding, linear, training, traversal
from fast.optimizer import AdamW
from fast.product import product
from experiments.cost import kept
from lora import KINDS, DoRA, LoRA, linears
from model import MLP, Block, Linear, Llama
from tiny import ANSWERS, RAGGED, fresh_bitune, tiny_bitune, tiny_model

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


def test_an_edit_of_merging_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(LoRA, "merged", lambda self, linear: (linear.weight.detach(), linear.bias))
    with pytest.raises(ValueError, match="do forward and merged of the kind lora, in lora.py, go together"):
        decoding.quick(tiny_bitune().eval())


def test_a_set_of_which_the_memory_holds_no_copy_decodes_dora_s_norms_once(monkeypatch):
    monkeypatch.setattr(decoding, "fits", lambda model: False)
    bitune = tiny_bitune(kind="dora").eval()
    want = bitune.generate(RAGGED, 5)
    quick = decoding.quick(bitune)
    monkeypatch.setattr(DoRA, "weight", None)               # what the norm is of
    assert quick.generate(RAGGED, 5) == want


@pytest.mark.parametrize("config", [{}, {"model_type": "qwen2"}, {"model_type": "qwen3"},
                                    {"model_type": "gemma"}])
def test_single_tokens_go_through_fewer_operations(config, monkeypatch):
    """And give the same, unless model.py has been edited."""
    bitune = Bitune(tiny_model(F64, **config), "causal").eval()
    want = bitune.generate(RAGGED, 8)
    steps = decoding.logits(bitune, cached=8 - 1)
    quick = decoding.quick(bitune)
    assert {type(block) for block in quick.model.model.layers} == {decoding.QuickBlock}
    torch.testing.assert_close(decoding.logits(quick, cached=8 - 1), steps, atol=1e-10, rtol=1e-10)
    assert quick.generate(RAGGED, 8) == want
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x, adapter: forward(self, x, adapter).tanh())
    edited = decoding.quick(Bitune(tiny_model(F64, **config), "causal").eval())
    assert {type(block) for block in edited.model.model.layers} == {Block}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("config", [
    {}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, {"model_type": "phi"}])
def test_prompts_and_single_tokens_go_through_the_quick_linears(config, dtype, tolerance):
    """In bfloat16 over float32 keys and values."""
    bitune = Bitune(tiny_model(dtype, **config), "causal").eval()
    want = decoding.logits(bitune, cached=7)
    quick = decoding.quick(bitune)
    linear_layers = {type(m) for m in quick.model.modules() if isinstance(m, torch.nn.Linear)}
    assert linear_layers == {decoding.QuickLinear}
    got = decoding.logits(quick, cached=7)
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("rows", [(), (1, 1), (2, 3), (1, 0)])
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_product_is_f_linear(rows, dtype, tolerance):
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((*rows, 24), (40, 24), (40,)))
    for w in (weight, weight.t().contiguous().t()):
        for b in (None, bias):
            with torch.no_grad():
                got, want = product(x, w, b), F.linear(x, w, b)
            assert got.shape == want.shape and got.dtype == dtype
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    assert product(x, weight.requires_grad_()).requires_grad            # where gradients flow, they do


def test_an_answer_that_has_ended_leaves_the_batch(monkeypatch):
    bitune = tiny_bitune().eval()
    ends = [ids[2 + i] for i, ids in enumerate(bitune.generate(RAGGED, 8))]
    want = [ids[:min([*(ids.index(e) for e in ends if e in ids), 8])] for ids in bitune.generate(RAGGED, 8)]
    seen, forward = [], Llama.forward
    monkeypatch.setattr(Llama, "forward", lambda self, tokens, *more, **named: seen.append(len(tokens)) or
                        forward(self, tokens, *more, **named))
    assert bitune.generate(RAGGED, 8, stop_ids=set(ends)) == want
    assert seen == sorted(seen, reverse=True) and len(set(seen)) > 2


# ---- training --------------------------------------------------------------------------------------------

def gradients(bitune, losses, prompts=RAGGED, answers=ANSWERS):
    """Losses and gradients; no gradient is one of zero."""
    bitune.zero_grad()
    values = losses(prompts, answers)
    values.sum().backward()
    return [values.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone()
                               for p in bitune.parameters() if p.requires_grad)]


def exact(bitune):
    """`Bitune.losses` in float64 throughout."""
    def losses(prompts, answers):
        logits, labels = bitune(prompts, answers)
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return nll.sum(1) / (labels >= 0).sum(1)
    return losses


def assert_alike(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


FORMS = [("lora", {}), ("dora", {}), ("ia3", {}), ("lora", {"model_type": "gemma"}),
         ("dora", {"model_type": "phi"}), ("lora", {"model_type": "qwen3"}),
         ("lora", {"model_type": "mistral", "sliding_window": 20})]


@pytest.mark.parametrize("kind, config", FORMS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_one_traversal_equals_the_passes(method, kind, config):
    """Of ragged prompts, prompts of one length, and one that has no context."""
    plain, fast = (tiny_bitune(method, kind, config=config, dtype=F64) for _ in range(2))
    training.change_classes(fast.model)
    for prompts, answers in ((RAGGED, ANSWERS), ([[1, 2, 3, 4]] * 2, [[5, 6], [7, 8]]), ([[3]], [[4, 5]])):
        assert_alike(gradients(fast, partial(traversal.losses, fast), prompts, answers),
                     gradients(plain, exact(plain), prompts, answers), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_trains(method, kind):
    """In float32 as in bfloat16, with the adapters as they start; nothing is moved by finding out."""
    for dtype in (torch.float32, torch.bfloat16)[:1 if kind == "full" else 2]:
        plain, fast = (with_base_in(dtype, fresh_bitune(method, kind)) for _ in range(2))
        assert training.hasten(fast) and fast.losses.func is traversal.losses and fast.training
        assert all(map(torch.equal, fast.state_dict().values(), plain.state_dict().values()))
        if dtype == torch.float32:
            assert_alike(gradients(fast, fast.losses), gradients(plain, plain.losses), 1e-4)


def with_base_in(dtype, bitune):
    for name, p in bitune.model.named_parameters():
        p.data = p.data if ".sets." in name else p.data.to(dtype)
    return bitune


EDITS = {
    "mix": lambda old: lambda self, read, at: old(self, [pairs[::-1] for pairs in read], at),
    "encode": lambda old: lambda self, context: old(self, (context.ids, context.positions * 2)),
    "losses": lambda old: lambda self, prompts, answers: old(self, prompts, answers) * 2,
    "forward": lambda old: lambda self, *batch: (old(self, *batch)[0].tanh(), old(self, *batch)[1]),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_trains_by_the_passes(name, monkeypatch):
    """What the traversal would pass over in silence. (An edit of alpha, or of mix by layer, it goes along
    with.)"""
    monkeypatch.setattr(Bitune, name, EDITS[name](getattr(Bitune, name)))
    bitune = fresh_bitune()
    assert not training.hasten(bitune) and bitune.losses.__func__ is Bitune.losses


def test_an_edit_of_the_adapters_trains_as_it_is(monkeypatch):
    plain = LoRA.low_rank
    monkeypatch.setattr(LoRA, "low_rank", lambda self, x: plain(self, x).tanh())
    want = gradients(bitune := tiny_bitune(), bitune.losses)
    assert training.hasten(bitune)
    assert_alike(gradients(bitune, bitune.losses), want, 1e-4)


def test_the_gradients_of_its_own_functions(monkeypatch):
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=F64, requires_grad=True)
    x, halves = randn(5, 4), (randn(2, 4), randn(6, 2), None, None, randn(3, 4), randn(6, 3))
    layer = Linear(4, 6, bias=True).double().requires_grad_(False)
    parts = [(2, 0.5), (1, 1), (2, 2.0)]
    adapted = lambda x, *halves: linear.Adapted.apply(x, layer, layer.bias, False, parts, *halves)
    assert torch.autograd.gradcheck(adapted, (x, *halves))
    assert torch.autograd.gradcheck(adapted, (x.detach(), *halves))
    monkeypatch.setattr(traversal.NLL, "ELEMENTS", 20)                  # two rows of logits at a time
    head, bias, labels = randn(10, 4).detach(), randn(10).detach(), torch.tensor([3, 0, 9, 3, 1])
    nll = lambda x: traversal.NLL.apply(x, head, bias, labels)
    assert torch.autograd.gradcheck(nll, (x,))
    want = torch.nn.functional.cross_entropy(x @ head.t() + bias, labels, reduction="none")
    torch.testing.assert_close(nll(x), want)


def test_dropout_is_left_alone():
    bitune = tiny_bitune("causal", adapters={"dropout": 0.5})
    torch.manual_seed(1)
    want = gradients(bitune, bitune.losses, [[1, 2, 3]], [[4, 5]])
    training.hasten(bitune)
    torch.manual_seed(1)
    assert_alike(gradients(bitune, bitune.losses, [[1, 2, 3]], [[4, 5]]), want, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["bitune", "causal"])
def test_checkpointing_changes_no_bit(method, kind):
    more = {"dropout": 0.1} if kind == "lora" else {}
    for plain in (True, False):
        results = []
        for checkpointing in (False, True):
            bitune = tiny_bitune(method, kind, adapters=more, dtype=F64)
            training.hasten(bitune, plain, checkpointing)
            torch.manual_seed(1)
            results.append(gradients(bitune, bitune.losses))
        assert all(map(torch.equal, *results))


def test_eight_bits():
    """The weights expanded where they are used, forward and backward, and kept nowhere else."""
    bitune = tiny_bitune("bitune", "dora")
    weights = {path: layer.weight.clone() for path, layer in linears(bitune.model).items()}
    linear.eight_bits(bitune.model)
    for path, layer in linears(bitune.model).items():
        step = weights[path].abs().amax(1, keepdim=True) / 127
        assert ((layer.weight - weights[path]).abs() <= step / 2 + 1e-6).all() and linear.frozen(layer)
    assert training.hasten(bitune)
    rounded = tiny_bitune("bitune", "dora")
    for path, layer in linears(rounded.model).items():
        layer.weight.data = linears(bitune.model)[path].weight
    assert_alike(gradients(bitune, bitune.losses), gradients(rounded, rounded.losses), 1e-4)
    assert all(layer.weight_int8.dtype == torch.int8 for layer in linears(bitune.model).values())


def test_what_is_kept():
    """Of a bfloat16 base: float32 copies and logits go, then all but the blocks' inputs, K and V."""
    sizes = []
    for how in ({"plain": True}, {}, {"checkpointing": True}):
        bitune = with_base_in(torch.bfloat16, fresh_bitune())
        training.hasten(bitune, **how)
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
