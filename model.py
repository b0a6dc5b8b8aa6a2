"""A Llama-style decoder, and reading public safetensors checkpoints into it.

Shapes, here and in every other file:

    B  batch                          H  query heads             C  width (hidden_size)
    T  new tokens                     G  key/value heads         V  vocabulary
    T' those that are read on         D  size of one head        L  layers
    S  tokens before

The model keeps nothing between calls. Tokens, positions, the mask, the keys and values of earlier tokens
and the name of the adapter set come in as arguments; logits and the new tokens' keys and values go out.
Modules carry the checkpoint's own names, so a Hugging Face checkpoint loads without a rename table.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi")
gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh}
ROPE_TYPES = {       # and the numbers of config.json that each needs besides rope_theta
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
}
ALL = slice(None)    # rows: logits for every token
NONE = slice(0)      # rows: no logits, the keys and values are all that is wanted


# ----------------------------------------------------------------------------------------------------------
# Configuration: config.json, under its own field names

@dataclass(frozen=True)
class Config:
    """What shapes the computation, read from config.json. `rope` holds `rope_type`, `rope_theta` and that
    type's own numbers, whichever of the two ways config.json spells them."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: dict
    rotary_dim: int             # of head_dim: those that are turned
    activation: str             # of ACTIVATIONS
    norm: str                   # of NORMS
    norm_eps: float
    qk_norm: bool = False       # queries and keys are normalised before they are turned
    sliding_window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, c):
        """Config from the contents of a config.json; ValueError names what is missing or not supported."""
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

        # Up to transformers 4: rope_theta + rope_scaling ("type" is the older word); then rope_parameters.
        rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
        turned = rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
        rope["rope_theta"] = float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0)
        if rope["rope_type"] not in ROPE_TYPES:
            kinds = " or ".join(ROPE_TYPES)
            raise ValueError(f"RoPE type {rope['rope_type']!r} is not supported: expected {kinds}")
        wanted = ROPE_TYPES[rope["rope_type"]]
        if lacking := [k for k in wanted if k not in rope]:
            raise ValueError(f"RoPE type {rope['rope_type']!r} needs {', '.join(lacking)} in config.json")
        rope = {k: rope[k] for k in ["rope_type", "rope_theta", *wanted]}

        heads = c["num_attention_heads"]
        head_dim = c.get("head_dim") or c["hidden_size"] // heads
        bias = bool(c.get("attention_bias", False)) or kind == "phi"
        slides = c.get("use_sliding_window", kind == "mistral")
        return cls(
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

    @classmethod
    def from_pretrained(cls, folder):
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no config.json: expected a Hugging Face checkpoint folder")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:  # the last two: a value of another kind
            raise ValueError(f"{path}: {error}") from None

    @property
    def max_length(self):
        """The longest text, in tokens, that the model can read."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    def check_length(self, n):
        if n > self.max_length:
            name = "sliding_window" if self.max_length == self.sliding_window else "max_position_embeddings"
            raise ValueError(f"{n} tokens are more than the model's {name} of {self.max_length}: use fewer")


# ----------------------------------------------------------------------------------------------------------
# Positions, masks, and what earlier tokens left behind

def rotary(config, positions, dtype):
    """Cosines and sines of RoPE (2104.09864) at `positions` (B, T): two tensors (B, 1, T, R/2), where R is
    the part of D that is turned, mostly all of it."""
    rope, R = config.rope, config.rotary_dim
    freq = rope["rope_theta"] ** -(torch.arange(0, R, 2, device=positions.device).float() / R)     # (R/2,)
    if rope["rope_type"] == "linear":
        freq = freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * torch.pi)       # in the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / rope["factor"])
    angle = positions[:, None, :, None].float() * freq                                    # (B, 1, T, R/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + R/2}) of x (B, heads, T, D) by its position's angle."""
    a, b, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def may_attend(query_pos, key_pos, sees="causal"):
    """The attention mask from positions alone: (B, T) and (B, S) to (B, 1, T, S), True = may attend.

    Position -1 marks padding. Padding sees only padding, so that no softmax row is empty, and nothing else
    sees it.
    """
    q, k = query_pos[:, None, :, None], key_pos[:, None, None, :]
    sight = {"causal": k <= q, "anticausal": k >= q, "bidirectional": torch.ones_like(k <= q)}[sees]
    return sight & ((q >= 0) == (k >= 0))


class Past:
    """Keys and values of earlier tokens: one (k, v) a layer, each (B, G, S, D). Joining makes new tensors,
    so that gradients flow back into the pass that made them."""

    def __init__(self, layers):
        self.layers = layers

    def __len__(self):
        return self.layers[0][0].shape[2]

    def join(self, layer, k, v):
        past_k, past_v = self.layers[layer]
        return torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)


class KVCache:
    """The same for decoding, without copying: buffers of `size` tokens, filled from the left and written in
    place. Only where no gradient flows: overwriting would destroy what a backward pass needs."""

    def __init__(self, layers, size):
        self.length = 0
        self.buffers = [tuple(t.new_empty(*t.shape[:2], size, t.shape[3]) for t in kv) for kv in layers]
        for i, (k, v) in enumerate(layers):
            self.join(i, k, v)

    def __len__(self):
        return self.length

    def join(self, layer, k, v):
        assert not torch.is_grad_enabled(), "KVCache overwrites its buffers: use Past while gradients flow"
        start, end = self.length, self.length + k.shape[2]
        k_all, v_all = self.buffers[layer]
        k_all[:, :, start:end] = k
        v_all[:, :, start:end] = v
        if layer == len(self.buffers) - 1:      # the last layer has seen the new tokens: they are now past
            self.length = end
        return k_all[:, :, :end], v_all[:, :, :end]


# ----------------------------------------------------------------------------------------------------------
# The decoder, from the smallest part up

class Linear(nn.Linear):
    """A linear layer that is told which adapter set to use, and has none; lora.py swaps in those that do."""

    def forward(self, x, adapter=None):
        return F.linear(x, self.weight, self.bias)


class OffsetRMSNorm(nn.RMSNorm):
    """Gemma's: the weight is stored less one, and is applied in float32."""

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).to(x.dtype)


NORMS = {"rms": nn.RMSNorm, "rms + 1": OffsetRMSNorm, "layer": nn.LayerNorm}


def make_norm(c, size):
    return NORMS[c.norm](size, eps=c.norm_eps)


class Attention(nn.Module):
    out = "o_proj"                              # the name of the output projection

    def __init__(self, c):
        super().__init__()
        self.n_q, self.n_kv, self.D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.n_q * self.D, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, self.n_kv * self.D, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, self.n_kv * self.D, bias=c.qkv_bias)
        self.add_module(self.out, Linear(self.n_q * self.D, c.hidden_size, bias=c.o_bias))
        self.q_norm = make_norm(c, self.D) if c.qk_norm else nn.Identity()
        self.k_norm = make_norm(c, self.D) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, past, layer, adapter, rows):
        """x (B, T, C). Keys and values are made for all T tokens, queries only for `rows`, T' of them."""
        cos, sin = rope
        k = self.k_proj(x, adapter).unflatten(-1, (self.n_kv, self.D)).transpose(1, 2)    # (B, G, T, D)
        v = self.v_proj(x, adapter).unflatten(-1, (self.n_kv, self.D)).transpose(1, 2)    # (B, G, T, D)
        k = rotate(self.k_norm(k), cos, sin)
        q = self.q_proj(x[:, rows], adapter).unflatten(-1, (self.n_q, self.D))
        q = q.transpose(1, 2)                                                             # (B, H, T', D)
        q = rotate(self.q_norm(q), cos[:, :, rows], sin[:, :, rows])

        k_all, v_all = (k, v) if past is None else past.join(layer, k, v)                 # (B, G, S + T, D)
        mask = None if mask is None else mask[:, :, rows]                                 # (B, 1, T', S + T)
        grouped = self.n_q != self.n_kv
        if grouped and mask is not None and x.is_cuda:      # no fused kernel takes both: spell the heads out
            k_all, v_all = (t.repeat_interleave(self.n_q // self.n_kv, dim=1) for t in (k_all, v_all))
            grouped = False
        y = F.scaled_dot_product_attention(q, k_all, v_all, mask, enable_gqa=grouped)     # (B, H, T', D)
        o_proj = getattr(self, self.out)
        return o_proj(y.transpose(1, 2).flatten(-2), adapter), (k, v)                     # (B, T', C)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x, adapter):
        gate = self.activation(self.gate_proj(x, adapter))
        return self.down_proj(gate * self.up_proj(x, adapter), adapter)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = make_norm(c, c.hidden_size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = make_norm(c, c.hidden_size)
        self.mlp = MLP(c)

    def forward(self, x, rope, mask, past, layer, adapter, rows):
        """x (B, T, C) to (B, T', C), and the layer's new (k, v). Arguments as in Llama.forward."""
        y, kv = self.self_attn(self.input_layernorm(x), rope, mask, past, layer, adapter, rows)
        x = x[:, rows] + y
        return x + self.mlp(self.post_attention_layernorm(x), adapter), kv


class PhiAttention(Attention):
    out = "dense"


class PhiMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.fc2 = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x, adapter):
        return self.fc2(self.activation(self.fc1(x, adapter)), adapter)


class PhiBlock(nn.Module):
    """Attention and MLP side by side, on the same normed input."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = make_norm(c, c.hidden_size)
        self.self_attn = PhiAttention(c)
        self.mlp = PhiMLP(c)

    def forward(self, x, rope, mask, past, layer, adapter, rows):
        normed = self.input_layernorm(x)
        y, kv = self.self_attn(normed, rope, mask, past, layer, adapter, rows)
        return x[:, rows] + y + self.mlp(normed[:, rows], adapter), kv


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        phi = config.model_type == "phi"
        block, self.final = (PhiBlock, "final_layernorm") if phi else (Block, "norm")
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(block(config) for _ in range(config.num_hidden_layers)),
            self.final: make_norm(config, config.hidden_size),
        })
        if not config.tie_word_embeddings:      # a tied head is the embedding itself
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=phi)

    def forward(self, tokens, positions, mask=None, past=None, adapter=None, rows=ALL):
        """Logits (B, T', V) of the tokens in `rows`, and the new keys and values: L pairs (B, G, T, D).

        tokens, positions: (B, T), position -1 for padding. mask: (B, 1, T, S + T) as `may_attend` makes it;
        None lets every token attend to all. past: a Past or KVCache. adapter: the name of the adapter set
        to run, None for the bare base. rows: a slice of the T tokens. Nobody reads the last layer's output
        elsewhere, so its attention and MLP, the final norm and the head run for these rows only: with NONE,
        for no token at all.
        """
        if self.config.sliding_window:          # beyond it the mask would have to hide the oldest keys
            self.config.check_length(tokens.shape[1] + (len(past) if past is not None else 0))
        x = self.model.embed_tokens(tokens)                                               # (B, T, C)
        if self.config.model_type == "gemma":
            x = x * x.new_tensor(self.config.hidden_size ** 0.5)
        rope = rotary(self.config, positions, x.dtype)
        keys_values = []
        last = len(self.model.layers) - 1
        for i, block in enumerate(self.model.layers):
            x, kv = block(x, rope, mask, past, i, adapter, rows if i == last else ALL)
            keys_values.append(kv)
        x = self.model[self.final](x)
        if self.config.tie_word_embeddings:
            return F.linear(x, self.model.embed_tokens.weight), keys_values
        return self.lm_head(x), keys_values

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Read a checkpoint folder: config.json and model.safetensors, or shards with their index.

        Built without memory, then filled tensor by tensor, so the host holds little more than the weights.
        All missing, unexpected and misshapen tensors are in one ValueError, raised before any is read.
        """
        folder = Path(folder)
        config = Config.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
        want = {name: tuple(p.shape) for name, p in model.state_dict().items()}

        where, have = {}, {}                    # tensor name -> its file, its shape
        for file in checkpoint_files(folder):
            try:
                with safe_open(file, framework="pt") as f:
                    for name in f.keys():
                        entry = f.get_slice(name)
                        where[name], have[name] = file, tuple(entry.get_shape())
                        if name in want and "F" not in entry.get_dtype():       # F32, F16, BF16
                            raise ValueError(f"{file}: {name} is {entry.get_dtype()}, expected floats")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}): is the download complete?") from None
        have = {n: s for n, s in have.items() if not n.endswith("rotary_emb.inv_freq")}    # in old exports
        if config.tie_word_embeddings:
            have.pop("lm_head.weight", None)                                     # the embedding once more
        wrong = [f"missing {n} {want[n]}" for n in want.keys() - have.keys()]
        wrong += [f"unexpected {n} {have[n]}" for n in have.keys() - want.keys()]
        both = want.keys() & have.keys()
        wrong += [f"{n} is {have[n]}, expected {want[n]}" for n in both if have[n] != want[n]]
        if wrong:
            listed = "; ".join(sorted(wrong))
            raise ValueError(f"{folder}: {len(wrong)} tensors do not fit its config.json: {listed}")

        state = {}
        for file in sorted(set(where.values())):
            with safe_open(file, framework="pt") as f:
                state |= {n: f.get_tensor(n).to(device, dtype) for n in want if where[n] == file}
        model.load_state_dict(state, assign=True)
        return model


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
