"""What holds of the paper's formula: its limit cases, where θ starts, what gets no gradient, and its dtype.
An edit of the method may turn these red."""

import pytest
import torch

from bitune import Bitune
from identities import F64, answer_logits, assert_same
from lora import add_adapter
from model import may_attend
from tiny import ANSWERS, RAGGED, fresh_bitune, tiny_bitune, tiny_model

pytestmark = pytest.mark.reference


def with_theta(value, method="bitune"):
    bitune = tiny_bitune(method, dtype=F64)
    for theta in (bitune.theta_key, bitune.theta_value):
        theta.data.fill_(value)
    return bitune


@pytest.mark.parametrize("theta, method", [(0.0, "causal"), (1e30, "no-mixing")])   # α = 0, 1 to the bit
def test_alpha_0_is_the_plain_causal_model_and_alpha_1_is_no_mixing(theta, method):
    bitune, half = with_theta(theta), with_theta(0.01)
    plain = answer_logits(Bitune(bitune.model, method))
    assert_same(answer_logits(bitune), plain)
    assert (answer_logits(half)[0] - plain[0]).abs().max() > 0.1


def test_alpha_1_with_equal_adapters_is_one_forward_under_a_prefix_mask():
    bitune = with_theta(1e30, "shared-weights")
    for prompt, answer, logits in zip(RAGGED, ANSWERS, answer_logits(bitune)):
        ids, P = torch.tensor([prompt + answer]), len(prompt)
        positions = torch.arange(ids.shape[1])[None]
        prefix = positions < P - 1                      # the context sees all of itself
        mask = may_attend(positions, positions) | (prefix[:, None, :, None] & prefix[:, None, None, :])
        one, _ = bitune.model(ids, positions, mask, adapter="answer")
        assert_same([logits], [one[0, P - 1:-1]])


def test_at_the_start_theta_of_layer_0_has_no_gradient():
    bitune = tiny_bitune(dtype=F64)
    for name, p in bitune.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    bitune.losses(RAGGED, ANSWERS).sum().backward()
    for theta in (bitune.theta_key, bitune.theta_value):
        assert theta.grad[0] == 0 and theta.grad[1:].all()


def test_mixing_is_float32_on_a_bfloat16_base():
    model, thetas = tiny_model(torch.bfloat16), {"key": [0.03, -0.002, 0.01], "value": [0.5, -0.01, 0.001]}
    for name in ("answer", "prompt"):
        add_adapter(model, name)
    bitune = Bitune(model)
    assert {p.dtype for p in bitune.parameters() if p.requires_grad} == {torch.float32}
    for name, numbers in thetas.items():
        getattr(bitune, f"theta_{name}").data.copy_(torch.tensor(numbers))
    assert bitune.losses(RAGGED, ANSWERS).dtype == torch.float32
    c, b = torch.randn(2, 3, 2, 2, 2, 5, 8).bfloat16()                  # of 3 layers, (k, v)
    for layer, mixed in enumerate(bitune.mix([c, b], None)):
        for got, theta, x, y in zip(mixed, thetas.values(), c[layer], b[layer]):
            alpha = torch.tensor(theta[layer]).abs() / (torch.tensor(theta[layer]).abs() + 0.01)
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, (x.float() * (1 - alpha) + y.float() * alpha).bfloat16())


@pytest.mark.parametrize("c", [0.1, 0.01, 0.001])
def test_alpha_starts_at_a_half_whatever_c_is(c):
    assert all((a == 0.5).all() for a in fresh_bitune(c=c).alpha(None, None).values())
