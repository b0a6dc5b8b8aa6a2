"""Frozen weights in 8 bits (--base-bits 8): half the memory of bfloat16, slower, a little off."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import linears
from model import Linear


class Product8(torch.autograd.Function):
    """W x of a Linear8. W is made from its 8 bits twice, forward and backward, and never kept."""

    @staticmethod
    def forward(ctx, x, linear, bias):
        ctx.linear = linear
        return F.linear(x, linear.weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.linear.weight, None, None


class Linear8(Linear):
    """A Linear whose W[o] is int8 times a scale, |W[o]| / 127, where |W[o]| is the largest magnitude in the
    row: each number is rounded to the nearest of 255 steps."""

    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.sets, self.dtype = linear.bias, linear.sets, linear.weight.dtype
        scale = linear.weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127        # (out, 1)
        rounded = (linear.weight / scale).round().to(torch.int8)
        self.weight_int8 = nn.Parameter(rounded, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    @property
    def weight(self):
        return self.weight_int8.to(self.dtype).mul_(self.weight_scale)

    def product(self, x, bias=None):
        return Product8.apply(x, self, bias)


@torch.no_grad()
def eight_bits(model):
    """Put a Linear8 in the place of each linear of a model that has no adapters yet. Embedding, head, norms
    and biases stay."""
    for path, linear in linears(model).items():
        parent, name = path.rsplit(".", 1)
        model.get_submodule(parent).add_module(name, Linear8(linear))
