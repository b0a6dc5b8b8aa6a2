"""What must always hold, whatever the weights: in float64, on ragged batches, with all that trains away from
where it starts. `identities.py` has what holds of any method, kind and mixing; here it is run on ours,
beside what is particular to them."""

from functools import partial

import pytest
import torch

from bitune import METHODS, Bitune, sample_token
from identities import F64, answer_logits, assert_same, failures
from lora import KINDS
from model import ALL, NONE, KVCache, Past, may_attend
from tiny import ANSWERS, RAGGED, tiny_bitune, tiny_model

pytestmark = pytest.mark.identity

CONFIGS = {
    "grouped": {}, "biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "parallel": {"model_type": "phi", "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
}


# Each method with each kind, and each of both with each config: every pair of them once.
PAIRS = [(method, kind, [*CONFIGS][(i + j) % 3])
         for i, method in enumerate(METHODS) for j, kind in enumerate(KINDS)]


@pytest.mark.parametrize("method, kind, config", PAIRS)
def test_identities(method, kind, config, tmp_path):
    make = partial(tiny_bitune, method, kind, CONFIGS[config])
    assert failures(make, tmp_path) == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_of_one_token_is_a_plain_causal_pass(method):
    bitune = tiny_bitune(method, dtype=F64)
    assert_same(
        answer_logits(bitune, [[4], [9]], ANSWERS[:2]),
        answer_logits(Bitune(bitune.model, "causal"), [[4], [9]], ANSWERS[:2]),
    )


@pytest.mark.parametrize("sees", ["causal", "bidirectional", "anticausal"])
def test_a_token_moves_only_the_keys_and_values_that_see_it(sees):
    model, j = tiny_bitune(dtype=F64).model, 6
    ids, other = torch.tensor([RAGGED[3]]), torch.tensor([RAGGED[3]])
    other[0, j] = 123
    positions = torch.arange(ids.shape[1])[None]
    passes = [
        model(t, positions, may_attend(positions, positions, sees), adapter="prompt", keep=NONE)[1]
        for t in (ids, other)
    ]
    at = torch.arange(ids.shape[1])
    for layer, ((k, v), (k2, v2)) in enumerate(zip(*passes)):
        moved = ((k - k2).abs() + (v - v2).abs()).sum(dim=(0, 1, 3)) > 1e-9
        reach = {"causal": at >= j, "anticausal": at <= j, "bidirectional": at >= 0}[sees]
        assert moved.tolist() == (at == j if layer == 0 else reach).tolist()  # layer 0 has seen nobody yet


def test_the_context_runs_no_more_than_it_must():
    """keep=NONE gives the same keys and values, and neither the last layer's MLP nor the head sees a
    token."""
    model = tiny_bitune(dtype=F64).model
    ids = torch.tensor([RAGGED[3]])
    positions = torch.arange(ids.shape[1])[None]
    seen = []
    model.model.layers[-1].mlp.down_proj.register_forward_hook(
        lambda m, args, out: seen.append(args[0].shape[1])
    )
    logits, kv = model(ids, positions, adapter="answer", keep=NONE)
    full_logits, full_kv = model(ids, positions, adapter="answer")
    assert logits.shape[1] == 0 and seen == [0, ids.shape[1]]
    for pair, full in zip(kv, full_kv):
        assert torch.equal(pair[0], full[0]) and torch.equal(pair[1], full[1])
    some, _ = model(ids, positions, adapter="answer", keep=slice(4, 7))
    assert_same([some], [full_logits[:, 4:7]])


class OnCard(torch.Tensor):
    """A tensor that says it lies on a GPU."""
    is_cuda = True


def test_heads_spelled_out_for_a_gpu_are_the_grouped_ones():
    attention = tiny_model().model.layers[0].self_attn
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 5, 5).tril().bool()
    spelled_out = attention.attend(q.as_subclass(OnCard), k, v, mask, ALL)
    torch.testing.assert_close(spelled_out.as_subclass(torch.Tensor), attention.attend(q, k, v, mask, ALL))


def test_a_past_joins_with_gradients_and_a_cache_refuses_them():
    kv = [(torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 3, 4))]
    past = Past(kv, torch.arange(3)[None])
    assert past.join(0, torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))[0].requires_grad and len(past) == 3
    with pytest.raises(AssertionError, match="use Past while gradients flow"):
        KVCache(past, 8)


# ---- decoding --------------------------------------------------------------------------------------------


def test_stop_ids_end_a_row_and_are_not_yielded():
    bitune = tiny_bitune()
    free = bitune.generate(RAGGED, 12)
    stop = {free[0][4], free[3][0]}
    cut = [row[: next((i for i, t in enumerate(row) if t in stop), 12)] for row in free]
    assert bitune.generate(RAGGED, 12, stop_ids=stop) == cut and cut[3] == []


def test_answers_end_at_the_models_limit():
    bitune = tiny_bitune()
    assert len(bitune.generate([[7] * 250], 100)[0]) == 6
    with pytest.raises(
        ValueError, match="257 tokens are more than the model's max_position_embeddings of 256"
    ):
        bitune.generate([[7] * 256], 1)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        bitune.generate([[]], 1)


def test_sampling_follows_the_seed_and_narrows_to_greedy():
    bitune = tiny_bitune()
    ask = lambda **options: bitune.generate(RAGGED, 8, **options)
    assert ask(temperature=1.0, seed=1) == ask(temperature=1.0, seed=1) != ask(temperature=1.0, seed=2)
    assert (
        ask(temperature=1.0, top_k=1)
        == ask(temperature=1.0, top_p=1e-6)
        == ask(temperature=1e-4)
        == ask()
    )


def test_sample_token_draws_from_the_distribution_it_should():
    p = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])

    def frequencies(**options):
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
        ids = sample_token(p.log().expand(40000, 5), **options, generator=torch.Generator().manual_seed(0))
        return ids.bincount(minlength=5) / 40000

    def close(got, want):
        torch.testing.assert_close(got, torch.tensor(want) / sum(want), atol=0.01, rtol=0)

    close(frequencies(), p.tolist())
    close(frequencies(top_k=2), [0, 0.4, 0, 0.25, 0])
    close(frequencies(top_p=0.6), [0, 0.4, 0, 0.25, 0])  # 0.4 is not yet 0.6, 0.65 is
    close(frequencies(temperature=0.5), (p**2).tolist())
