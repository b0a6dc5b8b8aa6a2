"""What holds of the paper's formula: its limit cases, where θ starts, what gets no gradient, and the dtype it is
computed in. An edit of the method may turn these red."""

import pytest
import torch
import torch.nn.functional as F

from bitune import Bitune, adapter_sets
from identities import F64, answer_logits, assert_same
from lora import add_adapter
from model import may_attend
from tiny import ANSWERS, RAGGED, tiny_bitune, tiny_model

pytestmark = pytest.mark.reference


def set_theta(bitune, value):
    bitune.theta_key.data.fill_(value)
    bitune.theta_value.data.fill_(value)


def test_alpha_0_is_the_plain_causal_model():
    bitune = tiny_bitune(dtype=F64)
    set_theta(bitune, 0.0)
    assert_same(answer_logits(bitune), answer_logits(Bitune(bitune.model, "causal")))
    set_theta(bitune, 0.01)
    assert (answer_logits(bitune)[0] - answer_logits(Bitune(bitune.model, "causal"))[0]).abs().max() > 0.1


def test_alpha_1_with_equal_adapters_is_one_forward_under_a_prefix_mask():
    bitune = tiny_bitune("shared-weights", dtype=F64)
    set_theta(bitune, 1e30)  # α = 1 to the last bit
    for prompt, answer, logits in zip(RAGGED, ANSWERS, answer_logits(bitune)):
        ids, P = torch.tensor([prompt + answer]), len(prompt)
        positions = torch.arange(ids.shape[1])[None]
        prefix = positions < P - 1  # the context sees all of itself
        mask = may_attend(positions, positions) | (prefix[:, None, :, None] & prefix[:, None, None, :])
        one, _ = bitune.model(ids, positions, mask, adapter="answer")
        assert_same([logits], [one[0, P - 1 : -1]])


def test_alpha_1_is_no_mixing():
    bitune = tiny_bitune(dtype=F64)
    set_theta(bitune, 1e30)
    assert_same(answer_logits(bitune), answer_logits(Bitune(bitune.model, "no-mixing")))


def test_full_finetuning_of_two_equal_sets_splits_the_gradient_of_one():
    """By the chain rule: what a weight gets that both passes use is the sum of what its two copies get."""
    weight = "model.layers.1.self_attn.k_proj.{}weight"
    grads = {}
    for method in ("shared-weights", "bitune"):
        model = tiny_model(F64)
        for name in adapter_sets(method):
            add_adapter(model, name, "full")
        Bitune(model, method).losses(RAGGED, ANSWERS).sum().backward()
        grads[method] = {n: p.grad for n, p in model.named_parameters()}
    one, two = grads["shared-weights"], grads["bitune"]
    base, copy = two[weight.format("")], two[weight.format("sets.prompt.")]
    assert_same([base + copy], [one[weight.format("")]])
    assert copy.abs().max() > 1e-3 and base.abs().max() > 1e-3
    assert_same([two["model.embed_tokens.weight"]], [one["model.embed_tokens.weight"]])


def test_at_the_start_theta_of_layer_0_has_no_gradient():
    bitune = tiny_bitune(dtype=F64)
    for name, p in bitune.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    bitune.losses(RAGGED, ANSWERS).sum().backward()
    assert bitune.theta_key.grad[0] == 0 and bitune.theta_value.grad[0] == 0
    assert bitune.theta_key.grad[1:].all() and bitune.theta_value.grad[1:].all()


def test_mixing_is_float32_on_a_bfloat16_base():
    model = tiny_model(torch.bfloat16)
    for name in ("answer", "prompt"):
        add_adapter(model, name)
    bitune = Bitune(model)
    assert {p.dtype for p in bitune.parameters() if p.requires_grad} == {torch.float32}
    bitune.theta_key.data.copy_(torch.tensor([0.03, -0.002, 0.01]))
    assert bitune.losses(RAGGED, ANSWERS).dtype == torch.float32
    bitune.theta_value.data.copy_(torch.tensor([0.5, -0.01, 0.001]))
    c, b = (
        [(torch.randn(2, 2, 5, 8).bfloat16(), torch.randn(2, 2, 5, 8).bfloat16()) for _ in range(3)]
        for _ in range(2)
    )
    for layer, (k, v) in enumerate(bitune.mix([c, b], None)):
        for got, theta, x, y in (
            (k, bitune.theta_key, c[layer][0], b[layer][0]),
            (v, bitune.theta_value, c[layer][1], b[layer][1]),
        ):
            alpha = theta[layer].abs() / (theta[layer].abs() + 0.01)
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, (x.float() * (1 - alpha) + y.float() * alpha).bfloat16())


def test_alpha_starts_at_a_half_whatever_c_is():
    for c in (0.1, 0.01, 0.001):
        bitune = Bitune(tiny_bitune().model, c=c)
        assert all((a == 0.5).all() for a in bitune.alpha(None, None).values())


def test_a_loss_is_each_examples_mean_over_its_answer():
    bitune = tiny_bitune(dtype=F64)
    want = [F.cross_entropy(x.float(), torch.tensor(a)) for x, a in zip(answer_logits(bitune), ANSWERS)]
    torch.testing.assert_close(bitune.losses(RAGGED, ANSWERS), torch.stack(want), atol=1e-6, rtol=1e-6)
