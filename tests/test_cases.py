"""Files of others, as they were met: each is read as its reference implementation reads it, or refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitune import Bitune
from files.checkpoint import load_base, load_model, parse_config
from model import may_attend
from text.examples import encode_prompt
from tiny import CONFIG, write_checkpoint

CASES = Path(__file__).parent / "cases"

# The first 8 logits of the last token, by transformers 5.24.
LOGITS = {
    "checkpoint-phi-defaults": [-0.57, -0.77, 1.57, -0.93, -1.26, 1.3, -1.02, -0.57],
    "checkpoint-rope-scaling-beside-rope-parameters": [0.69, 0.57, 0.78, -0.08, 1.32, 0.38, 0.01, -1.5],
    "checkpoint-stale-shards": [0.37, -0.71, -1.87, 0.05, -0.59, 0.06, 0.51, -0.32],
    "checkpoint-tied-flag-own-head": [-0.4, -0.1, 0.99, -0.45, -1.42, 0.77, 0.79, 1.59],
    "checkpoint-tied-head-only": [-1.08, 0.0, 0.71, 0.1, 1.32, -0.98, 1.23, 0.26],
    "checkpoint-without-prefix": [-0.54, -1.08, 1.08, -0.56, -1.02, 0.68, -0.97, -0.69],
}


def first_logits(model, **adapter):
    ids = torch.tensor([[1, 260, 270, 264, 281, 262, 275, 268]])
    at = torch.arange(8)[None]
    with torch.inference_mode():
        return model(ids, at, may_attend(at, at), **adapter)[0][0, -1, :8]


@pytest.mark.reference
@pytest.mark.parametrize("case", LOGITS)
def test_checkpoints(case):
    logits = first_logits(load_model(CASES / case))
    torch.testing.assert_close(logits, torch.tensor(LOGITS[case]), atol=0.011, rtol=0)


@pytest.mark.reference
def test_special_tokens_beyond_the_vocabulary_do_no_harm():
    model, tokenizer = load_base(CASES / "checkpoint-pad-beyond-vocabulary", "cpu")
    prompt = encode_prompt(tokenizer, "plain", [("user", "the all")])
    assert Bitune(model, "causal").generate([prompt], 6) == [[153, 190, 4, 119, 190, 38]]
    assert "<pad>" not in tokenizer.special and "<pad>" in tokenizer.names.values()


def test_quantised_checkpoints_are_refused_in_one_line():
    with pytest.raises(ValueError, match="it is quantised, by gptq: expected the weights") as error:
        load_model(CASES / "checkpoint-gptq-message")
    assert len(str(error.value)) < 200


def test_a_head_equal_to_the_embedding_stays_tied(tmp_path):
    folder = write_checkpoint(tmp_path, tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert load_model(folder).config.tie_word_embeddings
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    assert not load_model(folder).config.tie_word_embeddings


@pytest.mark.parametrize("kind, changes, want", [
    ("mistral", {"num_key_value_heads": None, "attention_bias": True}, {"num_key_value_heads": 4, "qkv_bias": False}),
    ("qwen2", {"mlp_bias": True}, {"qkv_bias": True, "o_bias": False, "mlp_bias": False, "sliding_window": None}),
    ("gemma", {"hidden_act": "gelu"}, {"activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    ("phi", {"rope_parameters": {"partial_rotary_factor": 0.25}}, {"rotary_dim": 2, "activation": "gelu_new"}),
    ("llama", {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2.0}},
     {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    ("llama", {"partial_rotary_factor": 0.5}, {"rotary_dim": 8}),       # which the reference does not look at
])
def test_configs(kind, changes, want):
    config = parse_config(CONFIG | {"model_type": kind, "head_dim": 8} | changes)
    assert {name: getattr(config, name) for name in want} == want


def test_defaults_are_those_of_the_config_classes():
    transformers = pytest.importorskip("transformers")
    bare = {k: CONFIG[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads")}
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi"):
        theirs = transformers.CONFIG_MAPPING[kind](**bare)
        ours = parse_config({"model_type": kind, **bare})
        assert ours == parse_config(json.loads(theirs.to_json_string()))
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.num_key_value_heads == theirs.num_key_value_heads
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8) and ours.activation == theirs.hidden_act
