"""Training in less memory, by the same numbers.

What a step keeps for its backward pass grows with the tokens. `lean` keeps, for each adapted linear, its
input as it is instead of a float32 copy; `checkpointing` keeps, for each block, its input alone, and
computes the rest a second time when the backward pass comes to it.
"""

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lora import LoRA


class LowRank(torch.autograd.Function):
    """B A x, computed in A's float32 from x (..., in) of any dtype, which is kept as it is."""

    @staticmethod
    def forward(ctx, x, A, B):
        h = F.linear(x.to(A.dtype), A)                                      # (..., r)
        ctx.save_for_backward(x, h, A, B)
        return F.linear(h, B)                                               # (..., out)

    @staticmethod
    def backward(ctx, grad):
        x, h, A, B = ctx.saved_tensors
        grad_h = grad @ B                                                   # (..., r)
        grad_x = (grad_h @ A).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad, h, inner, x = (t.flatten(0, -2) for t in (grad, h, grad_h, x))
        return grad_x, inner.t() @ x.to(A.dtype), grad.t() @ h


def low_rank(adapter, x):
    """LoRA.low_rank, as `lean` replaces it. (Dropout would make a copy of x of its own.)"""
    if adapter.dropout and adapter.training:
        return LoRA.low_rank(adapter, x)
    return LowRank.apply(x, adapter.lora_A, adapter.lora_B)


def lean(model):
    """Let the adapters of LoRA's kinds keep no float32 copies of their inputs. A kind whose `low_rank` has
    been edited, and computes something else, stays as it is."""
    known = {}                                          # kind -> whether its low_rank is B A x
    for module in model.modules():
        if isinstance(module, LoRA):
            if type(module) not in known:
                known[type(module)] = is_plain(module)
            if known[type(module)]:
                module.low_rank = partial(low_rank, module)


@torch.no_grad()
def is_plain(adapter):
    """Whether an adapter's low_rank is B A x, by made-up numbers. (Without memory, nothing can be told.)"""
    if adapter.lora_A.is_meta:
        return True
    probe = copy.deepcopy(adapter).eval()
    made_up = lambda *shape: torch.arange(math.prod(shape), device=adapter.lora_A.device).sin().view(shape)
    probe.lora_A.copy_(made_up(*probe.lora_A.shape)), probe.lora_B.copy_(made_up(*probe.lora_B.shape))
    x = made_up(2, probe.lora_A.shape[1])
    return torch.allclose(probe.low_rank(x), LowRank.apply(x, probe.lora_A, probe.lora_B), 1e-4, 1e-4)


def checkpointing(model):
    """Let each block keep its input alone: with a frozen base, a step takes half more time."""
    for block in model.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
