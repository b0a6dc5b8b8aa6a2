"""Answers sooner, by the same numbers: `quick` makes of a Bitune one that writes as fast as a bare base.

What takes time, when one token is made after another, is to read every weight once for each. So the set
"answer" goes into the weights, and these are read at full speed (fast/product.py).
"""

import copy
import os
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn as nn

from bitune import Bitune
from fast import linear as fast_linear
from fast.product import product
from fast.small import small_bitune, small_model
from lora import DoRA, linears, merge
from model import ALL, Block, KVCache, may_attend, rotate


def quick(bitune):
    """A Bitune that answers as `bitune` does, up to the rounding of merged weights to their dtype: its
    passes read the prompt as they are, the answer is written by weights with the set "answer" merged in. If
    the memory has no room for a second copy of the weights, that set stays apart."""
    apart = bitune
    norms_once(bitune.model)
    if bitune.answer_set and fits(bitune.model):
        bitune = merged(bitune)
        if not all_alike(apart, bitune):
            kind, _ = apart.model.sets[apart.answer_set]
            raise ValueError(f"merged into the weights, the set {apart.answer_set!r} computes something "
                             f"else: do forward and merged of the kind {kind}, in lora.py, go together? "
                             "(--unmerged asks it as it is)")
    if not bitune.answer_set and single_tokens_agree(bitune):
        hasten(bitune.model)
    return bitune


def norms_once(model):
    """Keep the gains of DoRA as they are now, for as long as nothing trains any more."""
    for linear in linears(model).values():
        for adapter in linear.sets.values():
            if isinstance(adapter, DoRA):
                adapter.gain = lambda linear, gain=adapter.gain(linear).detach(): gain


@torch.inference_mode()
def logits(bitune, cached=0):
    """Of a few tokens, the last ones of which come one by one."""
    ids = torch.arange(8, device=bitune.device)[None] % bitune.model.config.vocab_size
    at, cut = torch.arange(8, device=bitune.device)[None], 8 - cached
    mask = may_attend(at, at)
    rows, new = bitune.model(ids[:, :cut], at[:, :cut], mask[:, :, :cut, :cut], adapter=bitune.answer_set)
    cache = KVCache(new, 8)
    for i in range(cut, 8):
        one = slice(i, i + 1)
        row, _ = bitune.model(ids[:, one], at[:, one], None, cache, bitune.answer_set)
        rows = torch.cat((rows, row), dim=1)
    return rows


@torch.inference_mode()
def all_alike(apart, bitune):
    """Whether every linear computes merged what it computes apart. Each by itself: in bfloat16, the rounding
    of one can grow through the layers behind it to any size."""
    plain, drawn = linears(bitune.model), torch.Generator().manual_seed(0)
    for name, linear in linears(apart.model).items():
        x = torch.randn(8, linear.in_features, generator=drawn).to(linear.weight)
        if not alike(linear(x, apart.answer_set), plain[name](x)):
            return False
    return True


def alike(want, got):
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(want.dtype, 0.1)
    return bool((want - got).abs().max() <= tolerance * max(1, want.abs().max()))


def merged(bitune):
    """A twin that shares all with `bitune` but the model of its answer pass."""
    plain = merge(bitune.model, bitune.answer_set)
    if not bitune.passes:               # then nothing else reads, and base and adapters can go
        return Bitune(plain, bitune.method).train(bitune.training)
    twin = copy.copy(bitune)
    twin._modules = bitune._modules | {"model": plain}      # else a copied module shares them
    twin.answer_set, twin.encode = None, reader(bitune).encode
    return twin


@torch.inference_mode()
def reader(bitune):
    """A twin on the same numbers whose linears run as fast/linear.py has them, if that gives the same."""
    small, some = small_bitune(bitune), ([[0, 1, 2, 3, 4], [2, 1, 0]], [[5], [3, 6]])
    want = small(*some)[0]
    fast_linear.hasten(small.model)
    if not alike(want, small(*some)[0]):
        return bitune
    twin = copy.deepcopy(bitune, {id(t): t for t in (*bitune.parameters(), *bitune.buffers())})
    fast_linear.hasten(twin.model)
    return twin


def fits(model):
    """Whether the memory has room for two more copies of the weights: one to use, one to spare."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.model.embed_tokens.weight.is_cuda:
        return 2 * size < torch.cuda.mem_get_info()[0]
    known = {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"} <= getattr(os, "sysconf_names", {}).keys()
    return not known or 2 * size < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def hasten(model):
    """Let the blocks take single tokens as `QuickBlock` does, and all multiply as `product` does."""
    if model.config.tie_word_embeddings:        # a head of its own, on the same weight
        model.config = replace(model.config, tie_word_embeddings=False)
        model.lm_head = nn.Linear(1, 1, bias=False)
        model.lm_head.weight = model.model.embed_tokens.weight
    for linear in [*linears(model).values(), model.lm_head]:
        linear.__class__ = QuickLinear
    for block in model.model.layers:
        if type(block) is Block:
            a, m = block.self_attn, block.mlp
            block.qkv = as_one(a.q_proj, a.k_proj, a.v_proj)
            block.gate_up = as_one(m.gate_proj, m.up_proj)
            block.__class__ = QuickBlock


def single_tokens_agree(bitune):
    """Whether `QuickBlock` computes what a Block does, on a small model: an edit of model.py may have
    changed that."""
    small = Bitune(small_model(bitune.model), "causal")
    want = logits(small, cached=2)
    hasten(small.model)
    return alike(want, logits(small, cached=2))


def as_one(*linears):
    """The weights and biases of linears with the same input as one (out, in) and (out,), of which theirs
    become parts."""
    weight = torch.cat([linear.weight for linear in linears])
    for linear, part in zip(linears, weight.split([linear.out_features for linear in linears])):
        linear.weight.data = part
    return weight, None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])


@lru_cache(maxsize=1)                           # the layers turn a token by the same angles
def whole(cos, sin):
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def turn(x, cos, sin):
    """`rotate` of all of x at once: a cos - b sin, b cos + a sin."""
    half = cos.shape[-1]
    if x.shape[-1] != 2 * half:
        return rotate(x, cos, sin)
    cos, sin = whole(cos, sin)
    return torch.addcmul(x * cos, x.roll(half, -1), sin)


class QuickLinear(nn.Linear):
    def forward(self, x, adapter=None):
        return product(x, self.weight, self.bias)


class QuickBlock(Block):
    """A Block of plain linears that takes a single token through fewer and larger operations."""

    def forward(self, x, rope, mask, past, layer, adapter, keep):
        if x.shape[1] > 1 or not isinstance(past, KVCache):
            return super().forward(x, rope, mask, past, layer, adapter, keep)
        a, m = self.self_attn, self.mlp
        heads = product(self.input_layernorm(x), *self.qkv).view(len(x), -1, 1, a.D)    # (B, H + 2 G, 1, D)
        if isinstance(a.q_norm, nn.Identity):
            q, k = turn(heads[:, :a.n_q + a.n_kv], *rope).split([a.n_q, a.n_kv], dim=1)
        else:
            q, k = (turn(norm(t), *rope) for norm, t in ((a.q_norm, heads[:, :a.n_q]),
                                                         (a.k_norm, heads[:, a.n_q:-a.n_kv])))
        if x.dtype == torch.bfloat16 and not x.is_cuda:     # of which a CPU's attention is many times slower
            past.buffers[layer] = tuple(t.float() for t in past.buffers[layer])
        k_all, v_all = past.join(layer, k, heads[:, -a.n_kv:])
        y = a.attend(q.to(k_all.dtype), k_all, v_all, mask, ALL).to(x.dtype)                # (B, H, 1, D)
        x = x + product(y.view(len(x), 1, -1), a.o_proj.weight, a.o_proj.bias)
        gate, up = product(self.post_attention_layernorm(x), *self.gate_up).chunk(2, dim=-1)
        return x + product(m.activation(gate) * up, m.down_proj.weight, m.down_proj.bias), None
