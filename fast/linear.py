"""Linear layers in training, by the same numbers: several adapter sets in one call, little kept for the
backward pass, and the frozen weights in 8 bits if asked for.

The plain form runs a layer once for each adapter set, and keeps of its input a float32 copy. Here the tokens
of all sets stand in one line: the frozen W is read once for all, each set's A and B for its own part.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from fast.product import product
from lora import DoRA, LoRA, linears
from model import Linear


class Sets(str):
    """The name of an adapter set, as model.py takes it, that knows more: the line of tokens it goes with has
    `parts`, pairs (name of a set, number of tokens). Fewer tokens than all of them are of the named set."""

    def __new__(cls, name, parts):
        self = super().__new__(cls, name)
        self.parts = parts
        return self


class Adapted(torch.autograd.Function):
    """y = W x + b, and on each part of the tokens + s B A x, with A and B of its own. x (N, in); parts: for
    each its number of tokens and its s; halves: A, B, A, B ... (None, None where a part has none). Kept for
    the backward pass: x as it is, A x; of the layer nothing, as its weight is frozen."""

    @staticmethod
    def forward(ctx, x, linear, bias, exact, parts, *halves):
        y = product(x, linear.weight, bias)                                             # (N, out)
        y = y.float() if exact and y.dtype != torch.float64 else y      # else rounded to the base's dtype
        sizes, low = [n for n, _ in parts], []
        for (_, s), x_part, y_part, A, B in zip(parts, x.split(sizes), y.split(sizes), *pairs(halves)):
            low.append(None if A is None else F.linear(x_part.to(A.dtype), A))          # (n, r)
            if A is not None:
                add(y_part, low[-1], B.t(), s)
        ctx.linear, ctx.parts = linear, parts
        ctx.save_for_backward(x, *halves, *low)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, *saved = ctx.saved_tensors
        sizes, n = [n for n, _ in ctx.parts], 2 * len(ctx.parts)
        wanted = ctx.needs_input_grad[0]
        grad_x = product(grad.to(x.dtype), ctx.linear.weight.t()) if wanted else None
        grads = []
        for i, ((_, s), x_part, grad_y, A, B, low) in enumerate(
                zip(ctx.parts, x.split(sizes), grad.split(sizes), *pairs(saved[:n]), saved[n:])):
            if A is None:
                grads += [None, None]
                continue
            grad_y = grad_y.to(A.dtype)
            grad_low = grad_y @ B * s                                                   # (n, r)
            grads += [grad_low.t() @ x_part.to(A.dtype), grad_y.t() @ low * s]
            if wanted:
                add(grad_x.split(sizes)[i], grad_low, A, 1)
        return grad_x, None, None, None, None, *grads


def pairs(halves):
    return halves[::2], halves[1::2]


def add(y, a, b, s):
    """y += s a b in place, summed in a's dtype before it is rounded to y's."""
    if y.dtype == a.dtype:
        y.addmm_(a, b, alpha=s)
    else:
        y.copy_(torch.add(y, a @ b, alpha=s))


class FastLinear(Linear):
    """A Linear of a model that `hasten` has been at. `joined`: the kinds of adapters that `together` can
    run, by the check of `joins`."""
    joined = frozenset()

    def forward(self, x, adapter=None):
        n = x.shape[:-1].numel()
        parts = [(adapter, n)]
        if isinstance(adapter, Sets):
            parts = adapter.parts if sum(size for _, size in adapter.parts) == n else [(str(adapter), n)]
        own = [self.sets[name] if name in self.sets else None for name, _ in parts]
        if frozen(self) and all(a is None or type(a) in self.joined and not dropping(a) for a in own):
            return self.together(x, own, [size for _, size in parts])
        if len(parts) == 1:
            return super().forward(x, parts[0][0])
        x_parts = x.split([size for _, size in parts], dim=-2)
        return torch.cat([super(FastLinear, self).forward(x_part, name)
                          for x_part, (name, _) in zip(x_parts, parts)], dim=-2)

    def together(self, x, own, sizes):
        """The layer on x (..., in), of which `sizes` tokens each go with the adapters `own`."""
        dora = any(isinstance(a, DoRA) for a in own)
        parts = [(size, a.s if a else 1) for size, a in zip(sizes, own)]
        halves = [half for a in own for half in ((a.lora_A, a.lora_B) if a else (None, None))]
        y = Adapted.apply(x.flatten(0, -2), self, None if dora else self.bias, dora, parts, *halves)
        if dora:
            y = torch.cat([a.gain(self) * y_part if a else y_part for a, y_part in zip(own, y.split(sizes))])
            y = y.to(x.dtype) if self.bias is None else y.to(x.dtype) + self.bias
        return y.view(*x.shape[:-1], y.shape[-1])


class Linear8(FastLinear):
    """One whose frozen weight W is kept as int8, with a scale for each output, and expanded where it is
    used: once in the forward pass and once in the backward pass, one layer at a time."""

    @property
    def weight(self):
        return self.weight_int8.to(self.dtype).mul_(self.weight_scale)


@torch.no_grad()
def eight_bits(model):
    """Round the linears' weights to int8: W[o] to the nearest of 255 steps from -|W[o]| to |W[o]|, where
    |W[o]| is the largest magnitude in the row. Embedding, head, norms and biases stay."""
    for linear in linears(model).values():
        weight = linear.weight
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127                # (out, 1)
        del linear.weight
        linear.__class__, linear.dtype = Linear8, weight.dtype
        linear.weight_int8 = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        linear.weight_scale = nn.Parameter(scale, requires_grad=False)


def frozen(linear):
    """Whether no gradient of its weight is wanted."""
    return isinstance(linear, Linear8) or not (linear.weight.requires_grad and torch.is_grad_enabled())


def dropping(adapter):
    return adapter.dropout and adapter.training


def hasten(model):
    """Let the model's linears run as this file does. A kind of adapters whose `forward` has been edited, and
    computes something else, runs as it stands."""
    joined = set()
    for linear in linears(model).values():
        linear.__class__ = Linear8 if isinstance(linear, Linear8) else FastLinear
        linear.joined = joined
    kinds = {type(a): (a, linear) for linear in linears(model).values() for a in linear.sets.values()}
    joined |= {kind for kind, (adapter, linear) in kinds.items() if joins(adapter, linear)}


@torch.no_grad()
def joins(adapter, linear):
    """Whether `together` computes what an adapter's forward does, by made-up numbers. (Without memory,
    nothing can be told.)"""
    if not isinstance(adapter, LoRA) or adapter.lora_A.is_meta:
        return isinstance(adapter, LoRA)
    adapter = copy.deepcopy(adapter).eval()
    drawn = torch.Generator().manual_seed(0)
    for half in (adapter.lora_A, adapter.lora_B):
        half.copy_(torch.rand(half.shape, generator=drawn))
    x = torch.rand(2, linear.in_features, generator=drawn).to(linear.weight)
    return torch.allclose(adapter(x, linear), linear.together(x, [adapter], [2]), 1e-2, 1e-2)
