"""Random config.json files: each is read as transformers reads it, or refused in one line.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

import fuzzing
from files.checkpoint import load_model, parse_config
from model import Llama, may_attend

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity(50)
transformers.logging.disable_progress_bar()
NEEDED = {"model_type": ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi"], "vocab_size": [50, 177, 300],
          "num_hidden_layers": [2], "hidden_size": [16, 32], "intermediate_size": [24],
          "num_attention_heads": [4]}
SLIDING, FULL = "sliding_attention", "full_attention"
ROPES = [("default", {}), ("linear", {"factor": 2.0}), ("dynamic", {"factor": 2.0}), ("proportional", {}),
         ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64}),
         ("llama3", {"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}),
         ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32}), ("mrope", {"factor": 2.0}),
         ("longrope", {"short_factor": [1.5] * 4, "long_factor": [3.0] * 4, "factor": 2.0,
                       "original_max_position_embeddings": 32}), (None, {}), (None, {"factor": 3.0})]
USUAL = {       # field -> its values: those that published files have
    "num_key_value_heads": [1, 2, 4], "head_dim": [8, 16], "attention_bias": [True, False],
    "hidden_act": ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "swish", "gelu_fast"],
    "rms_norm_eps": [1e-6, 0.1, 1], "layer_norm_eps": [1e-5, 0.1], "mlp_bias": [True, False],
    "tie_word_embeddings": [True, False], "sliding_window": [4, 16, 4096],
    "max_window_layers": [0, 1, 2, 28], "use_sliding_window": [True, False],
    "rope_theta": [10000, 500.0, 1e6], "rope_scaling": "rope", "rope_parameters": "rope",
    "partial_rotary_factor": [0.5, 0.25, 1.0], "use_cache": [True, False],
    "max_position_embeddings": [16, 128, 4096], "initializer_range": [0.02], "attention_dropout": [0.0, 0.5],
    "layer_types": [[FULL, FULL], [FULL, SLIDING], [SLIDING, SLIDING]],
    "torch_dtype": ["float16", "bfloat16"], "original_max_position_embeddings": [16], "bos_token_id": [1],
    "eos_token_id": [2, [2, 3]], "pad_token_id": [0, 999, -1],
    "architectures": [["LlamaForCausalLM"], ["PhiForSequenceClassification"], ["LlamaModel"]],
}
RARE = {       # those that hardly any file has, those of other models, and odd values of the others
    "hidden_activation": ["gelu", "silu"], "qk_layernorm": [True, False], "pretraining_tp": [1, 2],
    "use_bidirectional_attention": [True, False], "dtype": ["float32", "bfloat16"], "scale_attn": [3.0],
    "attn_logit_softcapping": [5.0], "final_logit_softcapping": [5.0], "logit_scale": [0.5], "bias": [True],
    "embedding_multiplier": [3.0], "residual_multiplier": [0.2], "attention_multiplier": [0.3],
    "logits_scaling": [4.0], "scale_attn_weights": [False], "query_pre_attn_scalar": [64], "rotary_dim": [4],
    "scale_attn_by_inverse_layer_idx": [True], "is_decoder": [True, False], "use_qk_norm": [True],
    "add_cross_attention": [True], "is_encoder_decoder": [True], "cross_attention_hidden_size": [32],
    "quantization_config": [{}, {"quant_method": "gptq", "bits": 4}, "gptq"], "rotary_pct": [0.25],
    "auto_map": [{"AutoModelForCausalLM": "modeling_x.X"}], "transformers_version": ["4.30.0", "5.24.0"],
    "resid_pdrop": [0.3], "embd_pdrop": [0.3], "num_labels": [3], "return_dict": [False],
    "qkv_bias": [False], "output_hidden_states": [True], "chunk_size_feed_forward": [4],
    "tie_encoder_decoder": [True], "no_rope_layers": [[0, 1]], "num_experts": [4],
    "per_layer_config": [{"1": {"intermediate_size": 16}}, {"1": {"sliding_window": 4}}],
    "text_config": [{"hidden_size": 16}], "attn_implementation": ["sdpa"], "made_up": [1, {"a": []}],
    "num_attention_heads": [3, 8], "hidden_size": [30, 33], "vocab_size": [0, "300"],
    "head_dim": [7, 6, 0, 8.0, "8"], "sliding_window": [0, 1], "rms_norm_eps": [0, "1e-6"],
    "rope_theta": ["1e4", 0], "num_key_value_heads": [3, 0, 32, -2], "max_position_embeddings": [8, 0, 64.0],
}
JUNK = [True, -1, 0, 1.5, "x", [], [1], {}, {"a": 1}]


def random_rope(rng):
    """What stands under rope_scaling or rope_parameters."""
    kind, own = rng.choice([*ROPES, *ROPES[:2], ROPES[4], ROPES[4]])
    words = rng.choice([["rope_type"], ["type"], ["type", "rope_type"]])
    rope = own | {word: kind for word in words if kind}
    for field, values in (("rope_theta", [300.0, 20000, None]), ("partial_rotary_factor", [0.5, 1.0, None])):
        if rng.random() < 0.2:
            rope[field] = rng.choice(values)
    if own and rng.random() < 0.15:
        rope[rng.choice([*own])] = rng.choice([None, 1, 3.0, "2", 0.5])
    if own and rng.random() < 0.1:
        del rope[rng.choice([*own])]
    return rng.choice([{FULL: rope}, {FULL: rope, SLIDING: rope}]) if rng.random() < 0.05 else rope


def random_config(rng):
    c = {field: rng.choice(values) for field, values in NEEDED.items()} | {"num_key_value_heads": 2}
    share, none = rng.choice([0.1, 0.3]), rng.choice([0, 0, 0.1])
    for field, values in USUAL.items():
        if rng.random() < share:
            c[field] = random_rope(rng) if values == "rope" else rng.choice(values)
    for field in rng.sample([*RARE], rng.choice([0, 0, 1, 2, 4])):
        c[field] = rng.choice(RARE[field])
    if rng.random() < 0.05:
        del c["num_key_value_heads"]
    if rng.random() < 0.1:
        c[rng.choice([*c][1:])] = rng.choice(JUNK)
    return {field: None if field not in NEEDED and rng.random() < none else c[field] for field in c}


def write_weights(folder, config):
    """Weights for the config.json there, by the reference or else by us, drawn wide so that errors show."""
    torch.manual_seed(0)
    try:
        theirs = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").float()
    except Exception:
        model = Llama(parse_config(config))
    state = {name: torch.randn(p.shape) * 0.3 + (p.dim() == 1) for name, p in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):     # a head that is the same or, unlike, none
        embedding = state["model.embed_tokens.weight"]
        state |= {name: embedding.clone() for name in state if name == "lm_head.weight"}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@torch.inference_mode()
def test_random_configs(tmp_path, request):
    ids = torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(0))

    def ours():
        model = load_model(tmp_path)
        at = torch.arange(max(1, min(24, model.config.max_length)))[None]
        return model(ids[:, :at.shape[1]], at, may_attend(at, at))[0]

    def reference(length):
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(tmp_path, dtype=torch.float32, attn_implementation="eager")
        return model(ids[:, :length], return_dict=True).logits

    def judge(config):
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            write_weights(tmp_path, config)
        except Exception:       # neither makes a model of it: then it has to be refused
            save_file({"model.norm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
        return fuzzing.verdict(tmp_path, ours, reference)

    n = request.config.getoption("--fuzz")
    assert not fuzzing.run(random_config, [*NEEDED, "num_key_value_heads"], judge, n)
