"""Adapters on the model's linears: several named sets on one frozen base.

    LoRA (2106.09685)   y = W x + s B A x                       A (r, in) Kaiming-uniform, B (out, r) zero
    DoRA (2402.09353)   y = m / |W + s B A| (W x + s B A x)     m (out,) starts as |W|: one norm an output
    IA3  (2205.05638)   y = l W x, in the MLP y = W (l x)       l ones: it scales outputs or inputs
    full finetuning     y = W' x                                W' a copy of W

with s = lora_alpha / r; each starts at the base model. Which set runs is an argument, `linear(x, adapter)`,
and no switch. Adapters are float32 on a base of any dtype: in bfloat16, small steps are rounded away.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear


class Option(NamedTuple):
    """What a kind of adapters is made with: a flag of train.py, a field of PEFT's adapter_config.json."""
    default: object             # a number, or a tuple of names
    field: str                  # PEFT's name for it
    help: str
    low: float = 0              # of numbers
    high: float = math.inf
    pattern: str | None = None  # PEFT's field for layers that have another value


class Adapter(nn.Module):
    """What one set does to one linear layer. A subclass is a kind of adapters and says all about itself:
    what it is made with, its tensors (parameters train, buffers stay; both are saved), `forward(x, linear)`,
    the adapted layer, `merged(linear)`, the weight and bias of a plain layer that computes the same, if one
    does, and PEFT's names for it. Flags, files and experiments take all this from here."""
    options = {}                # name -> Option: the keyword arguments of __init__
    peft = {}                   # the fields of adapter_config.json by which the kind is known
    tensor_names = {}           # PEFT's name of a tensor, if not model.PATH.TENSOR
    trains_base = False         # the first set is then the base itself, whose weights train

    @classmethod
    def make(cls, linears, **options):
        """A new set: an adapter for each of these layers, by path."""
        return {path: cls(linear, path, **options) for path, linear in linears.items()}

    def merged(self, linear):
        return None, None           # none computes the same: then the set stays as it is


class LowRank(torch.autograd.Function):
    """B A x in float32. autograd by itself would keep a float32 copy of a bfloat16 x; this keeps x."""
    @staticmethod
    def forward(ctx, x, A, B):
        low = F.linear(x.to(A.dtype), A)                                                       # (..., r)
        ctx.save_for_backward(x, A, B, low)
        return F.linear(low, B)

    @staticmethod
    def backward(ctx, grad):
        x, A, B, low = ctx.saved_tensors
        grad_low, rows = grad @ B, lambda t: t.flatten(0, -2).to(A.dtype)
        return (grad_low @ A).to(x.dtype), rows(grad_low).t() @ rows(x), rows(grad).t() @ rows(low)


class LoRA(Adapter):
    options = {"rank": Option(8, "r", "rank of the low-rank part", 1, 65536, "rank_pattern"),
               "lora_alpha": Option(1.0, "lora_alpha", "its scale is this / rank", 0, 1e9, "alpha_pattern"),
               "dropout": Option(0.0, "lora_dropout", "dropout before it", 0, 0.99)}
    peft = {"peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False}
    tensor_names = {half: f"model.{{path}}.{half}.weight" for half in ("lora_A", "lora_B")}

    def __init__(self, linear, path, rank, lora_alpha, dropout):
        super().__init__()
        self.s, self.dropout = lora_alpha / rank, dropout
        new = dict(dtype=torch.float32, device=linear.weight.device)
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **new))               # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **new))              # (out, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def low_rank(self, x):                                                                     # B A x
        if self.dropout and self.training:
            x = F.dropout(x.to(self.lora_A.dtype), self.dropout)
        return LowRank.apply(x, self.lora_A, self.lora_B)

    def weight(self, linear):                                                                  # W + s B A
        return linear.weight.to(self.lora_A.dtype) + self.s * self.lora_B @ self.lora_A

    def forward(self, x, linear):
        y = linear.product(x, linear.bias)
        return torch.add(y, self.low_rank(x), alpha=self.s).to(y.dtype)

    def merged(self, linear):
        return self.weight(linear).to(linear.weight.dtype), linear.bias


class DoRA(LoRA):
    peft = LoRA.peft | {"use_dora": True}

    def __init__(self, linear, path, **options):
        super().__init__(linear, path, **options)
        norm = linear.weight.detach().to(self.lora_A.dtype).norm(dim=1)
        self.lora_magnitude_vector = nn.Parameter(norm)                                        # (out,)
        if not norm.is_meta and not norm.all():
            raise ValueError(f"{path}: a row of zeros has no direction that DoRA could turn")

    def gain(self, linear):
        """m / |W + s B A| (out,), the norm a constant to the backward pass, as in the paper's 4.3."""
        with torch.no_grad():
            norm = self.weight(linear).norm(dim=1)
        return self.lora_magnitude_vector / norm

    def forward(self, x, linear):
        y = (self.gain(linear) * torch.add(linear.product(x), self.low_rank(x), alpha=self.s)).to(x.dtype)
        return y if linear.bias is None else y + linear.bias

    def merged(self, linear):
        return (self.weight(linear) * self.gain(linear)[:, None]).to(linear.weight.dtype), linear.bias


class IA3(Adapter):
    options = {"feedforward": Option(("down_proj", "fc1", "fc2", "gate_proj", "up_proj"),
                                     "feedforward_modules", "linears whose inputs it scales")}
    peft = {"peft_type": "IA3"}

    def __init__(self, linear, path, feedforward):
        super().__init__()
        self.of_input = path.split(".")[-1] in feedforward
        shape = (1, linear.in_features) if self.of_input else (linear.out_features, 1)         # PEFT's
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=linear.weight.device))

    def forward(self, x, linear):
        if self.of_input:
            return linear.product((x * self.ia3_l.flatten()).to(x.dtype), linear.bias)
        return (linear.product(x, linear.bias) * self.ia3_l.flatten()).to(x.dtype)

    def merged(self, linear):
        weight = (linear.weight * self.ia3_l).to(linear.weight.dtype)      # columns or rows, by its shape
        if self.of_input or linear.bias is None:
            return weight, linear.bias
        return weight, (linear.bias * self.ia3_l.flatten()).to(linear.bias.dtype)


class Full(Adapter):
    """The first set is the base itself, all of which trains; a second one is a copy of its linears."""
    trains_base = True
    peft = {"peft_type": "FULL"}                # not one of PEFT's, in its form all the same

    def __init__(self, linear, path):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())                             # (out, in)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x, linear):
        return F.linear(x, self.weight, self.bias)

    def merged(self, linear):
        return self.weight.detach(), None if self.bias is None else self.bias.detach()


KINDS = {"lora": LoRA, "dora": DoRA, "ia3": IA3, "full": Full}


# ----------------------------------------------------------------------------------------------------------
# Sets of adapters on a whole model

def linears(model):
    """The layers that can be adapted, by module name."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Linear)}


def adapters(model, name):
    """The adapters of the set `name`, by their layers' module names."""
    return {path: linear.sets[name] for path, linear in linears(model).items() if name in linear.sets}


def is_target(name):
    """Whether linears of this name are adapted if nobody names any. (Phi-2's dense, fc1, fc2 are not.)"""
    return name.endswith("_proj")


def add_adapter(model, name, kind="lora", targets=(), **options):
    """Put a new set `name` of a kind of KINDS on the linears whose name, or path, is of `targets` (none: see
    `is_target`), and freeze the base; returns the adapters by path. ValueError for an unknown name."""
    maker, layers, first = KINDS[kind], linears(model), not model.sets
    names = {path.split(".")[-1] for path in layers}
    options = {key: option.default for key, option in maker.options.items()} | options
    lists = [(options[key], o.default) for key, o in maker.options.items() if isinstance(o.default, tuple)]
    asked = {n for given, usual in lists for n in given if n not in usual} | set(targets) - set(layers)
    if unknown := " or ".join(sorted(asked - names)):
        raise ValueError(f"no linear is named {unknown}: expected {', '.join(sorted(names))}")
    targets = targets or [name for name in names if is_target(name)]
    model.sets[name] = kind, options
    if first:
        model.requires_grad_(maker.trains_base)
    chosen = {p: layer for p, layer in layers.items() if p in targets or p.split(".")[-1] in targets}
    new = {} if first and maker.trains_base else maker.make(chosen, **options)
    for path, adapter in new.items():
        layers[path].sets[name], adapter.made_with = adapter, options
    return new


@torch.no_grad()
def fold(model, name):
    """Put merged weights, as full copies hold them, in the place of the adapters of the set `name`: a layer
    then takes one product, and trains no more. ValueError if it would compute something else."""
    for path, adapter in adapters(model, name).items():
        linear = model.get_submodule(path)
        weight, bias = adapter.merged(linear)
        if weight is None:
            return
        folded = Full(SimpleNamespace(weight=weight, bias=bias), path).requires_grad_(False)
        x = torch.linspace(-1, 1, linear.in_features).to(weight)[None]
        y, tolerance = adapter(x, linear), 0.1 if x.dtype == torch.bfloat16 else 1e-3
        if not (folded(x, linear) - y).norm() <= tolerance * y.norm():
            raise ValueError(f"{path}: merged in {weight.dtype}, it would not compute the same: do forward "
                             f"and merged of the kind {model.sets[name][0]}, in lora.py, go together?")
        linear.sets[name] = folded
    model.sets[name] = "full", {}
