"""What train.py switches on: the same numbers sooner, or in less memory.

One traversal (fast/traversal.py) of linears that run together (fast/linear.py) instead of the passes one by
one. And what a step keeps for its backward pass grows with the tokens: with checkpointing, each block keeps
its input alone, and computes the rest a second time when the backward pass comes to it.
"""

import ctypes
import sys
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from fast import linear
from fast.small import small_bitune
from fast.traversal import FastAttention, losses
from model import Attention


def hasten(bitune, plain=False, checkpointing=False):
    """Let `bitune` train by one traversal, unless `plain`; returns whether it does. It does not if that
    gives other losses or gradients than the plain passes: then an edit of the five files has changed what
    they compute. checkpointing: each block keeps its input alone, and a step takes half more time."""
    fast = not plain and traverses(bitune)
    if checkpointing:
        for block in bitune.model.model.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return fast


def traverses(bitune):
    """Change the classes of linears and attentions, and `losses`, if the numbers stay."""
    if not agrees(bitune):
        return False
    change_classes(bitune.model)
    if bitune.device.type == "cpu":
        keep_memory()
    bitune.losses = partial(losses, bitune)
    return True


def change_classes(model):
    linear.hasten(model)
    for module in model.modules():
        if type(module) is Attention:
            module.__class__ = FastAttention


def agrees(bitune):
    """Whether both forms give the same losses and gradients, on a small model of the same make."""
    try:
        plain, fast = small_bitune(bitune), small_bitune(bitune)
        change_classes(fast.model)
        results = [by_both_lengths(form) for form in (plain.losses, partial(losses, fast))]
        for small, result in zip((plain, fast), results):
            result.sum().backward()
        pairs = zip(*([result.detach(), *(p.grad for p in small.parameters() if p.requires_grad)]
                      for small, result in zip((plain, fast), results)))
    except Exception:                           # the plain form will say itself what is wrong, if it is
        return False
    norm = lambda t: 0 if t is None else t.norm().item()
    off = lambda a, b: norm((0 if a is None else a) - (0 if b is None else b))
    return all(off(a, b) <= 1e-4 * (norm(a) + norm(b)) + 1e-6 for a, b in pairs if not a is b is None)


def by_both_lengths(form):
    """Losses of prompts of one length, and of two."""
    prompts, answers = [[0, 1, 2, 3, 4], [7, 6, 5, 4, 3], [2, 1, 0]], [[1, 2, 0], [5, 9], [3]]
    return torch.cat([form(prompts[:n], answers[:n]) for n in (2, 3)])


def keep_memory():
    """Have the C library keep large blocks that are freed. Else each goes back to the system at once, and
    every page of the next one comes anew and zeroed, which took a fifth of a step of 8,000 tokens."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3             # glibc's malloc.h
        for what in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(what, 2 ** 31 - 1)
