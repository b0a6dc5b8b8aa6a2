"""A Llama-style decoder, as public checkpoints have it.

Shapes, here and in every other file:

    B  batch                          H  query heads             C  width (hidden_size)
    T  new tokens                     G  key/value heads         V  vocabulary
    T' of these, the ones kept        D  size of one head        L  layers
    S  tokens before

The model keeps nothing between calls: all that it computes from comes in as arguments, and logits and the
new tokens' keys and values go out. Modules carry the checkpoint's own names.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh}
ALL = slice(None)    # keep: logits for every token
NONE = slice(0)      # keep: no logits, only the keys and values are wanted


@dataclass(frozen=True)
class Config:
    """What shapes the computation, as files/checkpoint.py reads it from a config.json. `rope` holds
    `rope_type` ("default", "linear" or "llama3"), `rope_theta` and that type's own numbers."""
    model_type: str             # "llama", "mistral", "qwen2", "qwen3", "gemma" or "phi"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: dict
    rotary_dim: int             # how much of head_dim is turned
    activation: str             # of ACTIVATIONS
    norm: str                   # of NORMS
    norm_eps: float
    qk_norm: bool = False       # queries and keys are normalised before they are turned
    sliding_window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

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
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones are not, those between in part.
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * torch.pi)       # in the old context
        short = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (short + (1 - short) / rope["factor"])
    angle = positions[:, None, :, None].float() * freq                                    # (B, 1, T, R/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + R/2}) of x (B, heads, T, D) by its position's angle."""
    a, b, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def may_attend(query_pos, key_pos, sees="causal"):
    """The attention mask from positions alone: (B, T) and (B, S) to (B, 1, T, S), True = may attend.
    Padding stands at -1: no token sees it but padding itself, as no softmax may be empty."""
    q, k = query_pos[:, None, :, None], key_pos[:, None, None, :]
    sight = {"causal": k <= q, "anticausal": k >= q, "bidirectional": torch.ones_like(k <= q)}[sees]
    return sight & ((q >= 0) == (k >= 0))


class Past:
    """Keys and values of earlier tokens: one (k, v) a layer, (B, G, S, D) each, at positions (B, S). Joining
    makes new tensors, so gradients flow back into the pass that made them. (Whatever has positions, a length
    and `join` may take its place.)"""

    def __init__(self, layers, positions):
        self.layers, self.positions = layers, positions

    def __len__(self):
        return self.positions.shape[1]

    def join(self, layer, k, v):
        past_k, past_v = self.layers[layer]
        return torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)


def extended(past, new, positions):
    """A Past with the new (k, v) of each layer behind those of a past, if there is one."""
    if past is None:
        return Past(new, positions)
    layers = [past.join(i, *kv) for i, kv in enumerate(new)]
    return Past(layers, torch.cat((past.positions, positions), dim=1))


class KVCache(Past):
    """A Past for decoding, where no gradient flows: buffers with room for `more` tokens, filled in place."""

    def __init__(self, past, more):
        self.positions, size = past.positions[:, :0], len(past) + more
        self.buffers = [tuple(t.new_empty(*t.shape[:2], size, t.shape[3]) for t in kv) for kv in past.layers]
        for i, (k, v) in enumerate(past.layers):
            self.join(i, k, v)
        self.advance(past.positions)

    def join(self, layer, k, v):
        assert not torch.is_grad_enabled(), "KVCache overwrites its buffers: use Past while gradients flow"
        start, end = len(self), len(self) + k.shape[2]
        k_all, v_all = self.buffers[layer]
        k_all[:, :, start:end] = k
        v_all[:, :, start:end] = v
        return k_all[:, :, :end], v_all[:, :, :end]

    def advance(self, positions):
        """The tokens that every layer has joined, at these positions (B, T), are now past."""
        self.positions = torch.cat((self.positions, positions), dim=1)

    def keep(self, rows):
        """Go on with these rows of the batch."""
        self.positions = self.positions[rows]
        self.buffers = [(k[rows], v[rows]) for k, v in self.buffers]


# ----------------------------------------------------------------------------------------------------------
# The decoder, from the smallest part up

class Linear(nn.Linear):
    """A linear layer with adapter sets beside it, which lora.py makes, told by name which one to use."""

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features, out_features, bias)
        self.sets = nn.ModuleDict()

    def forward(self, x, adapter=None):
        if adapter in self.sets:
            return self.sets[adapter](x, self)
        return self.product(x, self.bias)               # the bare base, or a set that is on other linears

    def product(self, x, bias=None):
        """W x + bias, which adapters ask their layer for. (files/int8.py overrides it: W in 8 bits.)"""
        return F.linear(x, self.weight, bias)


class OffsetRMSNorm(nn.RMSNorm):
    """Gemma's: the weight is stored less one, and is applied in float32."""
    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).to(x.dtype)


NORMS = {"rms": nn.RMSNorm, "rms + 1": OffsetRMSNorm, "layer": nn.LayerNorm}


def make_norm(c, size):
    return NORMS[c.norm](size, eps=c.norm_eps)


class Attention(nn.Module):
    def __init__(self, c, out="o_proj"):        # out: the checkpoint's name of the output projection
        super().__init__()
        self.out, self.n_q, self.n_kv, self.D = out, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.n_q * self.D, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, self.n_kv * self.D, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, self.n_kv * self.D, bias=c.qkv_bias)
        self.add_module(out, Linear(self.n_q * self.D, c.hidden_size, bias=c.o_bias))
        self.q_norm = make_norm(c, self.D) if c.qk_norm else nn.Identity()
        self.k_norm = make_norm(c, self.D) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, past, layer, adapter, keep):
        """x (B, T, C). Keys and values are made for all T tokens, queries for the T' tokens of `keep`."""
        cos, sin = rope
        k = self.k_proj(x, adapter).unflatten(-1, (self.n_kv, self.D)).transpose(1, 2)    # (B, G, T, D)
        v = self.v_proj(x, adapter).unflatten(-1, (self.n_kv, self.D)).transpose(1, 2)    # (B, G, T, D)
        k = rotate(self.k_norm(k), cos, sin)
        q = self.q_proj(x[:, keep], adapter).unflatten(-1, (self.n_q, self.D)).transpose(1, 2)
        q = rotate(self.q_norm(q), cos[:, :, keep], sin[:, :, keep])                      # (B, H, T', D)

        k_all, v_all = (k, v) if past is None else past.join(layer, k, v)                 # (B, G, S + T, D)
        y = self.attend(q, k_all, v_all, mask, keep)                                      # (B, H, T', D)
        y = y.transpose(1, 2).flatten(-2)                                                 # (B, T', H D)
        return getattr(self, self.out)(y, adapter), (k, v)                                # (B, T', C)

    def attend(self, q, k, v, mask, keep):
        mask = None if mask is None else mask[:, :, keep]                                 # (B, 1, T', S + T)
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":    # where bfloat16's backward pass is slow
            return self.attend(q.float(), k.float(), v.float(), mask, ALL).to(q.dtype)
        grouped = self.n_q != self.n_kv
        if grouped and mask is not None and q.is_cuda:      # no fused kernel takes them with a mask
            k, v = (t.repeat_interleave(self.n_q // self.n_kv, dim=1) for t in (k, v))
            grouped = False
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)


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

    def forward(self, x, rope, mask, past, layer, adapter, keep):
        """x (B, T, C) to (B, T', C), and the layer's new (k, v). Arguments as in Llama.forward."""
        y, kv = self.self_attn(self.input_layernorm(x), rope, mask, past, layer, adapter, keep)
        x = x[:, keep] + y
        return x + self.mlp(self.post_attention_layernorm(x), adapter), kv


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
        self.self_attn = Attention(c, out="dense")
        self.mlp = PhiMLP(c)

    def forward(self, x, rope, mask, past, layer, adapter, keep):
        normed = self.input_layernorm(x)
        y, kv = self.self_attn(normed, rope, mask, past, layer, adapter, keep)
        return x[:, keep] + y + self.mlp(normed[:, keep], adapter), kv


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.sets = {}          # the adapter sets that its layers carry, by name: see lora.py
        self.digest = ""        # tells the checkpoint it was read from: see files/checkpoint.py
        self.checkpointing = False      # let each block keep its input alone for the backward pass
        phi = config.model_type == "phi"
        block, self.final = (PhiBlock, "final_layernorm") if phi else (Block, "norm")
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(block(config) for _ in range(config.num_hidden_layers)),
            self.final: make_norm(config, config.hidden_size),
        })
        if not config.tie_word_embeddings:      # a tied head is the embedding itself
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=phi)

    def forward(self, tokens, positions, mask=None, past=None, adapter=None, keep=ALL):
        """Logits (B, T', V) of the tokens in `keep`, and the new keys and values: L pairs (B, G, T, D).
        tokens, positions: (B, T), position -1 for padding. mask: (B, 1, T, S + T) as `may_attend` makes it;
        None lets every token attend to all. past: a Past or KVCache. adapter: the set to run, None for the
        bare base; ValueError if no layer carries it. keep: the slice of the T tokens whose logits are asked
        for: in the last layer, attention, MLP, final norm and head run for these T' alone."""
        x, keys_values = self.states(tokens, positions, mask, past, adapter, keep)
        return self.head(x), keys_values

    def states(self, tokens, positions, mask=None, past=None, adapter=None, keep=ALL):
        """The same without the head: the final hidden states, (B, T', C)."""
        if adapter is not None and adapter not in self.sets:
            raise ValueError(f"no layer carries an adapter set {adapter!r}: the model has {[*self.sets]}")
        if self.config.sliding_window:          # a longer text needs a mask that hides old keys
            self.config.check_length(tokens.shape[1] + (len(past) if past is not None else 0))
        x = self.model.embed_tokens(tokens)                                               # (B, T, C)
        if self.config.model_type == "gemma":
            x = x * x.new_full((), self.config.hidden_size ** 0.5)
        rope = rotary(self.config, positions, x.dtype)
        keys_values, last = [], len(self.model.layers) - 1
        for i, block in enumerate(self.model.layers):
            run = partial(checkpoint, block, use_reentrant=False) if self.checkpointing else block
            x, kv = run(x, rope, mask, past, i, adapter, keep if i == last else ALL)
            keys_values.append(kv)
        return self.model[self.final](x), keys_values

    def head(self, x):
        """Logits (..., V) of hidden states (..., C)."""
        if self.config.tie_word_embeddings:
            return F.linear(x, self.model.embed_tokens.weight)
        return self.lm_head(x)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        from files.checkpoint import load_model             # which says what is read, and how
        return load_model(folder, dtype, device)
