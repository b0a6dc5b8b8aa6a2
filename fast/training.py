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
from fast.traversal import FastAttention, losses
from model import Attention, Linear


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
    plain = {m: type(m) for m in bitune.model.modules() if type(m) in (Linear, Attention)}
    linear.hasten(bitune.model)
    for m in plain:
        m.__class__ = FastAttention if type(m) is Attention else type(m)
    if not agrees(bitune):
        for m, kind in plain.items():
            m.__class__ = kind
        return False
    if bitune.device.type == "cpu":
        keep_memory()
    bitune.losses = partial(losses, bitune)
    return True


def agrees(bitune):
    """Whether both forms give the same losses and gradients for a few tokens, with all that trains moved
    away from where it starts. (Where the base trains, nothing is moved; without memory, nothing is told.)"""
    if bitune.device.type == "meta":
        return True
    base = bitune.model.model.embed_tokens.weight
    trained = [(name, p) for name, p in bitune.named_parameters() if p.requires_grad]
    moved = [] if base.requires_grad else trained
    before, training = [p.detach().clone() for _, p in moved], bitune.training
    prompts, answers, results = [[0, 1, 2, 3, 4], [2, 1, 0]], [[1, 2, 0], [3]], []
    try:
        with torch.no_grad():
            for i, (name, p) in enumerate(moved):
                wave = (torch.arange(p.numel(), device=p.device) + i).sin().view(p.shape)
                p.add_(wave, alpha=0.02 if name.startswith("model.") else 0.3)
        bitune.eval()                                       # no dropout, which is drawn anew each time
        for form in (bitune.losses, partial(losses, bitune)):
            bitune.zero_grad()
            both = torch.cat([form(prompts[:n], answers[:n]) for n in (1, 2)])
            both.sum().backward()
            results.append([both.detach(), *(p.grad for _, p in trained)])
    except Exception:
        if not results:
            raise                                           # the plain form itself does not run
        return False
    finally:
        with torch.no_grad():
            for (_, p), value in zip(moved, before):
                p.copy_(value)
        bitune.zero_grad()
        bitune.train(training)
    norm = lambda t: 0 if t is None else t.norm().item()
    tolerance, largest = 1e-3 if base.dtype.itemsize >= 4 else 0.1, max(map(norm, results[0]))
    return all(norm((0 if a is None else a) - (0 if b is None else b)) <= tolerance *
               (norm(a) + norm(b) + 1e-3 * largest) for a, b in zip(*results) if not a is b is None)


def keep_memory():
    """Have the C library keep large blocks that are freed. Else each goes back to the system at once, and
    every page of the next one comes anew and zeroed, which took a fifth of a step of 8,000 tokens."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3             # glibc's malloc.h
        for what in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(what, 2 ** 31 - 1)
