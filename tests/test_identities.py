"""What must always hold, whatever the weights: in float64, on ragged batches, with all that trains away from
where it starts. `identities.py` has what holds of any method, kind and mixing; here it is run on ours,
beside what is particular to them."""

from functools import partial

import pytest
import torch

from bitune import METHODS, Bitune, sample_token
from identities import F64, answer_logits, assert_same, failures
from lora import KINDS
from model import ALL, NONE, KVCache, Past
from tiny import ANSWERS, RAGGED, tiny_bitune

pytestmark = pytest.mark.identity

CONFIGS = {
    "grouped": {},
    "biased": {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True,
               "tie_word_embeddings": True},
    "parallel": {"num_hidden_layers": 2, "model_type": "phi", "num_key_value_heads": 4,
                 "partial_rotary_factor": 0.5}}
IDS = torch.tensor([RAGGED[3]])
AT = torch.arange(IDS.shape[1])[None]


# Each method with each kind, and each of both with each config: every pair of them once.
@pytest.mark.parametrize("method, kind, config", [(method, kind, [*CONFIGS][(i + j) % 3])
                                                  for i, method in enumerate(METHODS)
                                                  for j, kind in enumerate(KINDS)])
def test_identities(method, kind, config, tmp_path):
    assert failures(partial(tiny_bitune, method, kind, CONFIGS[config]), tmp_path) == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_of_one_token_is_a_plain_causal_pass(method):
    bitune = tiny_bitune(method, dtype=F64)
    plain = Bitune(bitune.model, "causal")
    assert_same(*(answer_logits(b, [[4], [9]], ANSWERS[:2]) for b in (bitune, plain)))


def test_the_context_runs_no_more_than_it_must():
    """keep=NONE gives the same keys and values; neither the last layer's MLP nor the head sees a token."""
    model, seen = tiny_bitune(dtype=F64).model, []
    last = model.model.layers[-1].mlp.down_proj
    last.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    (logits, kept), (full_logits, full) = (model(IDS, AT, adapter="answer", keep=k) for k in (NONE, ALL))
    assert logits.shape[1] == 0 and seen == [0, IDS.shape[1]]
    assert all(torch.equal(a, b) for pair, whole in zip(kept, full) for a, b in zip(pair, whole))
    assert_same(model(IDS, AT, adapter="answer", keep=slice(4, 7))[0], full_logits[:, 4:7])


def test_a_cache_overwrites_only_where_no_gradient_flows():
    with pytest.raises(AssertionError, match="use Past while gradients flow"):
        KVCache(Past([(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))], AT[:, :3]), 5)


# ---- decoding --------------------------------------------------------------------------------------------

def test_stop_ids_end_a_row_and_are_not_yielded():
    bitune = tiny_bitune()
    free = bitune.generate(RAGGED, 12)
    stop = {free[0][4], free[3][0]}
    cut = [row[:next((i for i, t in enumerate(row) if t in stop), 12)] for row in free]
    assert bitune.generate(RAGGED, 12, stop_ids=stop) == cut and cut[3] == []


def test_answers_end_at_the_models_limit():
    bitune = tiny_bitune()
    assert len(bitune.generate([[7] * 250], 100)[0]) == 6
    for prompt, message in (([7] * 256, "257 tokens are more than the model's max_position_embeddings of"),
                            ([], "the prompt has no tokens")):
        with pytest.raises(ValueError, match=message):
            bitune.generate([prompt], 1)


def test_sampling_follows_the_seed_and_narrows_to_greedy():
    ask = partial(tiny_bitune().generate, RAGGED, 8)
    assert ask(temperature=1.0, seed=1) == ask(temperature=1.0, seed=1) != ask(temperature=1.0, seed=2)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert ask(**{"temperature": 1.0} | narrow) == ask()


@pytest.mark.parametrize("options, want", [
    ({}, [0.05, 0.4, 0.1, 0.25, 0.2]), ({"top_k": 2}, [0, 0.4, 0, 0.25, 0]),
    ({"top_p": 0.6}, [0, 0.4, 0, 0.25, 0]),             # 0.4 is not yet 0.6, 0.65 is
    ({"temperature": 0.5}, [0.0025, 0.16, 0.01, 0.0625, 0.04])])
def test_sample_token_draws_from_the_distribution_it_should(options, want):
    logits, seeded = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]).log(), torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    ids = sample_token(logits.expand(40000, 5), **options, generator=seeded)
    want = torch.tensor(want) / sum(want)
    torch.testing.assert_close(ids.bincount(minlength=5) / 40000, want, atol=0.01, rtol=0)
