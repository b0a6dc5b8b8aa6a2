"""Answers sooner, by the same numbers: `quick` makes of a Bitune one that writes as fast as a bare base.

What takes time, when one token is made after another, is to read every weight once for each. So the set
"answer" goes into the weights, and on a CPU float32 weights are stored so that they are read at full speed.
"""

import copy
import os

import torch

from bitune import Bitune
from lora import linears, merge
from model import may_attend


def quick(bitune):
    """A Bitune that answers as `bitune` does, up to the rounding of merged weights to their dtype: its
    passes read the prompt as they are, the answer is written by weights with the set "answer" merged in. If
    the memory has no room for a second copy of the weights, that set stays apart."""
    if bitune.answer_set and fits(bitune.model):
        apart, bitune = bitune, merged(bitune)
        check(apart, bitune)
    lay_out(bitune.model)
    return bitune


@torch.inference_mode()
def check(apart, bitune):
    """ValueError if the merged weights compute something else on a few tokens: then an edit has changed how
    adapters run, and not how they are merged."""
    ids = torch.arange(8, device=apart.device)[None] % apart.model.config.vocab_size
    at = torch.arange(8, device=apart.device)[None]
    want, got = (b.model(ids, at, may_attend(at, at), adapter=b.answer_set)[0] for b in (apart, bitune))
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(want.dtype, 0.1)
    if (want - got).abs().max() > tolerance * max(1, want.abs().max()):
        kind, _ = apart.model.sets[apart.answer_set]
        raise ValueError(f"merged into the weights, the set {apart.answer_set!r} computes something else: "
                         f"do forward and merged of the kind {kind}, in lora.py, go together? (--unmerged "
                         "asks it as it is)")


def merged(bitune):
    """A twin that shares all with `bitune` but the model of its answer pass."""
    plain = merge(bitune.model, bitune.answer_set)
    if not bitune.passes:               # then nothing else reads, and base and adapters can go
        return Bitune(plain, bitune.method).train(bitune.training)
    twin = copy.copy(bitune)
    twin._modules = bitune._modules | {"model": plain}      # else a copied module shares them
    twin.answer_set, twin.encode = None, bitune.encode
    return twin


def fits(model):
    """Whether the memory has room for two more copies of the weights: one to use, one to spare."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.model.embed_tokens.weight.is_cuda:
        return 2 * size < torch.cuda.mem_get_info()[0]
    known = {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"} <= getattr(os, "sysconf_names", {}).keys()
    return not known or 2 * size < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def lay_out(model):
    """On a CPU, store the float32 weights that are at least as wide out as in column by column: shape and
    values stay, and a single token is multiplied by them up to twice as fast. (bfloat16 would be slower.)"""
    head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    for layer in [*linears(model).values(), head]:
        weight = layer.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and \
                weight.shape[0] >= weight.shape[1]:
            weight.data = weight.t().contiguous().t()
