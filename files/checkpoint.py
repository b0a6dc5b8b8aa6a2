"""Checkpoints as they are published: config.json, safetensors and the tokenizer, in one folder.

A folder is read as a whole, `load_base`, or refused in one line that names what is missing or not supported.
"""

from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from files.disk import differences, json_bytes, tensor_bytes
from files.int8 import eight_bits
from lora import KINDS, Full, adapters, fold
from model import ACTIVATIONS, Config, Llama
from text.tokenizer import Tokenizer
from text.words import check_fields, digest, listed, read_json


def above_0(value):
    """a number above 0"""
    return type(value) in (int, float) and 0 < value < 1e12


def whole(value):
    """a whole number above 0"""
    return type(value) is int and above_0(value)


ROPE_TYPES = {       # and the numbers that each needs besides rope_theta
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}
# Every field that counts, and what transformers 5.24 has for one that a config.json leaves out: see
# `words.check_fields`. (Where it is null: as many key/value heads as heads, the width shared among them.)
FIELDS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads"), (whole, ...)),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), ((whole, None), None)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
                    ((bool, None), False)),
    **dict.fromkeys(("qk_layernorm", "use_bidirectional_attention"), ((False, None), False)),
    "is_causal": ((True, None), None),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), ((dict, None), None)),
    "model_type": (str, ...), "hidden_act": (tuple(ACTIVATIONS), "silu"),
    "max_position_embeddings": (whole, 2048),
    "rms_norm_eps": (above_0, 1e-6), "layer_norm_eps": (above_0, 1e-5), "rope_theta": (above_0, 10000.0),
    "partial_rotary_factor": (above_0, 0.5), "original_max_position_embeddings": (above_0, None),
}
ROPE_FIELDS = {
    **dict.fromkeys(("rope_type", "type"), (tuple(ROPE_TYPES), None)),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
                     "original_max_position_embeddings"), (above_0, None)),
}
# The model types that are read, and where their config classes have other defaults.
QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
DEFAULTS = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": QWEN,
    "qwen3": QWEN | {"head_dim": 128},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
              "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "phi": {"hidden_act": "gelu_new"},
}
NOTHING = (None, False, 0, 0.0, "", [], {})         # what a field that is not known may hold all the same
# Fields that stand in published files and change no logits: who wrote it, how it was trained, which tokens
# are special, how transformers runs it and generates with it.
NEUTRAL = set("""
    architectures auto_map transformers_version dtype torch_dtype transformers.js_config unsloth_version
    unsloth_fixed is_llama_config model_name name_or_path initializer_range use_cache pretraining_tp
    attention_dropout embd_pdrop resid_pdrop hidden_dropout attn_pdrop layer_types max_window_layers
    hidden_activation bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    decoder_start_token_id tokenizer_class
    id2label label2id num_labels problem_type finetuning_task task_specific_params chunk_size_feed_forward
    return_dict output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss
    gradient_checkpointing use_flash_attention attn_implementation max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences suppress_tokens begin_suppress_tokens remove_invalid_values
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id prefix
""".split())
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BESIDE = ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json",
          "tokenizer.model", "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt",
          "vocab.json")         # what of a folder says how to read its weights' tokens


# ----------------------------------------------------------------------------------------------------------
# config.json

def parse_config(c):
    """The Config of a config.json's contents; ValueError names what is missing or not supported."""
    kind = c.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ValueError(f"model_type {kind!r} is not supported: expected {' or '.join(DEFAULTS)}")
    if quantised := c.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(f"it is quantised, by {str(method)[:40]}: expected weights as they were trained")
    table = FIELDS | {name: (FIELDS[name][0], default) for name, default in DEFAULTS[kind].items()}
    private = {name for name in c if name.startswith("_")}
    c = check_fields(c, "it", table, NEUTRAL | private, NOTHING)
    if kind == "gemma" and c["hidden_act"] == "gelu":       # as it was published, and never meant
        c["hidden_act"] = "gelu_pytorch_tanh"

    rope = c["rope_scaling"] or c["rope_parameters"] or {}      # of both, the first counts
    check_fields(rope, "its RoPE", ROPE_FIELDS, nothing=NOTHING)
    heads = c["num_attention_heads"]
    groups = c["num_key_value_heads"] or heads
    head_dim = turned = c["head_dim"] or c["hidden_size"] // heads
    if kind == "phi":
        turned = int(head_dim * rope.get("partial_rotary_factor", c["partial_rotary_factor"]))
    if heads % groups or turned % 2 or not 0 < turned <= head_dim:
        raise ValueError(f"{heads} heads of {head_dim} numbers, of which RoPE turns {turned}, and {groups} "
                         "key/value heads do not go together")
    bias = kind == "phi" or kind in ("llama", "qwen3", "gemma") and bool(c["attention_bias"])
    as_it_stands = {field.name: c[field.name] for field in fields(Config) if field.name in c}
    return Config(**as_it_stands | dict(
        num_key_value_heads=groups,
        head_dim=head_dim,
        rope=parse_rope(rope, c),
        rotary_dim=turned,
        activation=c["hidden_act"],
        norm={"gemma": "rms + 1", "phi": "layer"}.get(kind, "rms"),
        norm_eps=c["layer_norm_eps"] if kind == "phi" else c["rms_norm_eps"],
        qk_norm=kind == "qwen3",
        sliding_window=c["sliding_window"] if kind == "mistral" or c["use_sliding_window"] else None,
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias,
        mlp_bias=kind == "phi" or kind == "llama" and bool(c["mlp_bias"]),
        tie_word_embeddings=bool(c["tie_word_embeddings"]),
    ))


def parse_rope(rope, c):
    """RoPE's type with its numbers, from rope_scaling (up to transformers 4, "type" an older word in it) or
    rope_parameters; what is not in there stands in the config c itself."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    length = "original_max_position_embeddings"         # in the config itself, it comes first
    rope = {"rope_theta": c["rope_theta"], length: c["max_position_embeddings"]} | rope
    rope |= {length: c[length]} if c[length] else {}
    if lacking := [k for k in ROPE_TYPES[kind] if k not in rope]:
        raise ValueError(f"RoPE type {kind!r} needs {', '.join(lacking)} in config.json")
    own = {k: rope[k] for k in ROPE_TYPES[kind]}
    if kind == "llama3" and own["low_freq_factor"] >= own["high_freq_factor"]:
        raise ValueError("of RoPE, low_freq_factor is not below high_freq_factor")
    return {"rope_type": kind, "rope_theta": float(rope["rope_theta"])} | own


def read_config(folder):
    path = Path(folder) / "config.json"
    config = read_json(path)
    try:
        return parse_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ----------------------------------------------------------------------------------------------------------
# Weights

def load_base(folder, device=None, dtype=None, bits=None):
    """The model of a checkpoint folder and its tokenizer, where and in what dtype `placed` says, its linears
    in 8 bits if so many are asked for."""
    device, dtype = placed(device, dtype)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype, "cpu" if bits else device)
    if bits:
        eight_bits(model)
        model.to(device)
    return model, tokenizer


def load_tokenizer(folder):
    """The tokenizer of a checkpoint folder, without special tokens that the model does not have."""
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.limit(read_config(folder).vocab_size)
    return tokenizer


def placed(device, dtype):
    """The device and the dtype that two words stand for; None: a GPU if there is one; bfloat16 on a GPU,
    else float32. ValueError for a device that cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected cpu, cuda or mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"device {device!r} cannot be used: {str(problem).splitlines()[0]:.200}") from None
    return torch.device(device), DTYPES[dtype or ("bfloat16" if device.startswith("cuda") else "float32")]


def load_model(folder, dtype=torch.float32, device="cpu"):
    """Read config.json and model.safetensors, or shards with their index, into a Llama. It is built without
    memory, then filled tensor by tensor: the host holds no more than the weights and the largest tensor. All
    missing, unexpected and misshapen tensors are in one ValueError, raised before any is read."""
    folder = Path(folder)
    config, stored = read_config(folder), {}            # tensor name -> its file, and itself, not yet read
    for file in checkpoint_files(folder):
        try:
            f = safe_open(file, framework="pt")         # mapped into memory: what is read takes no room
            stored |= {name: (file, f.get_slice(name)) for name in f.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({error}): is the download complete?") from None
    for name, (file, tensor) in stored.items():
        if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{file}: {name} is {tensor.get_dtype()}, expected floats")
    config = rename_tensors(config, stored)
    with torch.device("meta"):
        model = Llama(config)
    want = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    have = {name: tuple(tensor.get_shape()) for name, (_, tensor) in stored.items()}
    if wrong := differences(want, have):
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit its config.json: {listed(wrong)}")

    state = {}
    for name in want:
        file, tensor = stored[name]
        state[name] = tensor[:].to(device, dtype, copy=True)
        if not torch.stack(state[name].aminmax()).isfinite().all():
            raise ValueError(f"{file}: {name} holds NaN or infinity: the base itself is damaged")
    model.load_state_dict(state, assign=True)
    model.digest = base_digest(config, state)
    return model


def base_digest(config, state):
    """Tells a base from others, whatever the dtype it is loaded in: a digest of its config, and of some
    numbers of each tensor, as bfloat16."""
    numbers = torch.cat([t.flatten()[::max(1, t.numel() // 16)].bfloat16() for t in state.values()])
    return digest((config, numbers.tolist()))


def rename_tensors(config, stored):
    """Bring the tensors of a checkpoint, by name, under the names of a Llama; returns the config, whose head
    is its own where the file has one that is not the embedding."""
    for name in [n for n in stored if n.endswith("rotary_emb.inv_freq")]:        # in old exports
        del stored[name]
    if not any(n.startswith("model.") for n in stored):     # as LlamaModel.save_pretrained writes them
        for name in [n for n in stored if not n.startswith("lm_head.")]:
            stored[f"model.{name}"] = stored.pop(name)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings and head in stored:
        one = stored.pop(head)
        other = stored.setdefault(embedding, one)
        if one is not other and not (one[1].get_shape() == other[1].get_shape()
                                     and torch.equal(one[1][:], other[1][:])):
            stored[head] = one                              # a merged finetune whose flag is stale
            return replace(config, tie_word_embeddings=False)
    return config


def checkpoint_files(folder):
    """The safetensors files of a checkpoint folder: model.safetensors, before the shards of an index, as
    transformers has it. ValueError if any are missing."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [one]
    if index.is_file() and not one.is_file():
        names = check_fields(read_json(index), index, {"weight_map": (dict, ...)}, nothing=object)
        files = sorted({folder / str(name) for name in names["weight_map"].values()})
    if lacking := [f.name for f in files if not f.is_file()]:
        raise ValueError(f"{folder} lacks {listed(lacking)}: expected safetensors, named as published")
    return files


def checkpoint_dtype(folder):
    """The dtype that a checkpoint's weights are stored in; float32 where there are several."""
    files = [safe_open(file, framework="pt") for file in checkpoint_files(Path(folder))]
    dtypes = {f.get_slice(name)[:0].dtype for f in files for name in f.keys() if "inv_freq" not in name}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def merged_tensors(model, name):
    """The tensors, by name, of a model without adapters that computes what this one does with a set, which
    is folded."""
    fold(model, name)
    if KINDS[kind := model.sets[name][0]] is not Full:
        raise ValueError(f"adapters of the kind {kind} cannot be merged: there is no plain layer like them")
    tensors = {n: t for n, t in model.state_dict().items() if ".sets." not in n}
    for path, adapter in adapters(model, name).items():
        own = {f"{path}.{part}": t for part, t in adapter.state_dict().items()}
        if unknown := own.keys() - tensors.keys():
            raise ValueError(f"merged, the model has {min(unknown)}: checkpoints have no place for it")
        tensors |= own
    return tensors


def checkpoint_bytes(weights, base):
    """The files, name to bytes, of a checkpoint with these weights, and with all that says how to read them
    as it lies in the folder `base`."""
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = read_json(Path(base) / "config.json")
    config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    beside = {n: (Path(base) / n).read_bytes() for n in BESIDE if (Path(base) / n).is_file()}
    return {"model.safetensors": tensor_bytes(weights), **beside, "config.json": json_bytes(config)}
