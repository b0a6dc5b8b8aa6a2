"""Checkpoints as they are published: config.json, safetensors and the tokenizer, in one folder.

A folder is read as a whole, `load_base`, or refused in one line that names what is missing or not supported.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from files.disk import json_bytes, read_json, tensor_bytes
from model import ACTIVATIONS, Config, Llama
from text.tokenizer import Tokenizer

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi")
ROPE_TYPES = {       # and the numbers of config.json that each needs besides rope_theta
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BESIDE = ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json",
          "tokenizer.model")     # what of a folder says how to read its weights' tokens


# ----------------------------------------------------------------------------------------------------------
# config.json

def parse_config(c):
    """The Config of a config.json's contents; ValueError names what is missing or not supported."""
    kind = c.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type {kind!r} is not supported: expected {' or '.join(MODEL_TYPES)}")
    needed = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    if lacking := [k for k in needed if not isinstance(c.get(k), int) or c[k] < 1]:
        raise ValueError(f"it lacks a whole number above 0 for: {', '.join(lacking)}")
    # Gemma's hidden_act was published as "gelu", which was never meant; hidden_activation mends it.
    act = c.get("hidden_act", "silu")
    if kind == "gemma":
        act = c.get("hidden_activation") or "gelu_pytorch_tanh"
    if act not in ACTIVATIONS:
        raise ValueError(f"hidden_act {act!r} is not supported: expected {' or '.join(ACTIVATIONS)}")
    if c.get("qk_layernorm"):
        raise ValueError("qk_layernorm is not supported: expected a phi model without it")

    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    rope, turned = parse_rope(c)
    bias = bool(c.get("attention_bias", False)) or kind == "phi"
    slides = c.get("use_sliding_window", kind == "mistral")
    return Config(
        model_type=kind,
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=c.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=c.get("max_position_embeddings") or 2048,
        rope=rope,
        rotary_dim=int(head_dim * turned),
        activation=act,
        norm={"gemma": "rms + 1", "phi": "layer"}.get(kind, "rms"),
        norm_eps=c.get("layer_norm_eps", 1e-5) if kind == "phi" else c.get("rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3",
        sliding_window=c.get("sliding_window", 4096) if slides else None,
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias and kind != "qwen2",
        mlp_bias=bool(c.get("mlp_bias", False)) or kind == "phi",
        tie_word_embeddings=bool(c.get("tie_word_embeddings", kind == "gemma")),
    )


def parse_rope(c):
    """RoPE's type with its numbers, and the part of a head that is turned, in either of the two spellings:
    up to transformers 4 rope_theta and rope_scaling ("type" is the older word), then rope_parameters."""
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    kind = rope.pop("type", None) or rope.get("rope_type") or "default"
    turned = rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    theta = float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0)
    if kind not in ROPE_TYPES:
        raise ValueError(f"RoPE type {kind!r} is not supported: expected {' or '.join(ROPE_TYPES)}")
    if lacking := [k for k in ROPE_TYPES[kind] if k not in rope]:
        raise ValueError(f"RoPE type {kind!r} needs {', '.join(lacking)} in config.json")
    return {"rope_type": kind, "rope_theta": theta} | {k: rope[k] for k in ROPE_TYPES[kind]}, turned


def read_config(folder):
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: expected a Hugging Face checkpoint folder")
    try:
        return parse_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:  # the last two: a value of another kind
        raise ValueError(f"{path}: {error}") from None


# ----------------------------------------------------------------------------------------------------------
# Weights

def load_base(folder, device=None, dtype=None):
    """The model of a checkpoint folder and its tokenizer, on the device (None: a GPU if there is one) in
    the dtype (a word of DTYPES; None: bfloat16 on a GPU, float32 on a CPU)."""
    device = device or default_device()
    check_device(device)
    dtype = DTYPES[dtype] if dtype else default_dtype(device)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: expected a Hugging Face checkpoint")
    tokenizer = Tokenizer.from_pretrained(folder)
    model = load_model(folder, dtype, device)
    if tokenizer.n_ids > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer's ids go up to {tokenizer.n_ids - 1}, but the model's "
                         f"vocabulary has {model.config.vocab_size} tokens: they do not belong together")
    return model, tokenizer


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device):
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def check_device(device):
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected cpu, cuda or mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"device {device!r} cannot be used: {str(problem).splitlines()[0]}") from None


def load_model(folder, dtype=torch.float32, device="cpu"):
    """Read config.json and model.safetensors, or shards with their index, into a Llama.

    Built without memory, then filled tensor by tensor, so the host holds little more than the weights.
    All missing, unexpected and misshapen tensors are in one ValueError, raised before any is read.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"), no_drawing():
        model = Llama(config)
    want = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    where, have = {}, {}                        # tensor name -> its file, its shape
    for file in checkpoint_files(folder):
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    entry = f.get_slice(name)
                    where[name], have[name] = file, tuple(entry.get_shape())
                    if name in want and "F" not in entry.get_dtype():           # F32, F16, BF16
                        raise ValueError(f"{file}: {name} is {entry.get_dtype()}, expected floats")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({error}): is the download complete?") from None
    have = {n: s for n, s in have.items() if not n.endswith("rotary_emb.inv_freq")}        # in old exports
    if config.tie_word_embeddings:
        have.pop("lm_head.weight", None)                                         # the embedding once more
    if wrong := differences(want, have):
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit its config.json: {'; '.join(wrong)}")

    state = {}
    for file in sorted(set(where.values())):
        with safe_open(file, framework="pt") as f:
            state |= {n: f.get_tensor(n).to(device, dtype) for n in want if where[n] == file}
    model.load_state_dict(state, assign=True)
    return model


@contextmanager
def no_drawing():
    """Leave new embeddings undrawn: without memory, PyTorch takes two seconds to get ready for it."""
    reset, nn.Embedding.reset_parameters = nn.Embedding.reset_parameters, lambda self: None
    try:
        yield
    finally:
        nn.Embedding.reset_parameters = reset


def differences(want, have):
    """All that is wrong with tensors `have`, name -> shape, where `want` is expected, in words."""
    wrong = [f"missing {n} {want[n]}" for n in want.keys() - have.keys()]
    wrong += [f"unexpected {n} {have[n]}" for n in have.keys() - want.keys()]
    both = want.keys() & have.keys()
    return sorted(wrong + [f"{n} is {have[n]}, expected {want[n]}" for n in both if have[n] != want[n]])


def checkpoint_files(folder):
    """The safetensors files of a checkpoint folder; ValueError if any are missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]    # tensor name -> file name
            files = sorted({folder / name for name in where.values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is not an index of shards: expected a weight_map of names") from None
    else:
        files = [folder / "model.safetensors"]
    if lacking := [f.name for f in files if not f.is_file()]:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt"))
        hint = f" It has {', '.join(pickles)}: convert to safetensors, they are not read" if pickles else ""
        raise ValueError(f"{folder} lacks {', '.join(lacking)}.{hint}")
    return files


def checkpoint_dtype(folder):
    """The dtype that a checkpoint's weights are stored in."""
    with safe_open(checkpoint_files(Path(folder))[0], framework="pt") as f:
        return f.get_tensor(next(iter(f.keys()))).dtype


def checkpoint_bytes(model, base):
    """The files, name to bytes, of a checkpoint with a plain model's weights, and with all that says how to
    read them as it lies in the folder `base`."""
    weights = model.state_dict()
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = read_json(Path(base) / "config.json")
    config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    beside = {n: (Path(base) / n).read_bytes() for n in BESIDE if (Path(base) / n).is_file()}
    return {"model.safetensors": tensor_bytes(weights), **beside, "config.json": json_bytes(config)}
