"""Adapters on the model's linears: several named sets on one frozen base.

    LoRA (2106.09685)   y = W x + s B A x                       A (r, in) Kaiming-uniform, B (out, r) zero
    DoRA (2402.09353)   y = m / |W + s B A| (W x + s B A x)     m (out,) starts as |W|: one norm a row
    IA3  (2205.05638)   y = l W x, in the MLP y = W (l x)       l ones; it scales outputs or inputs
    full finetuning     y = W' x                                W' a copy of W

with s = alpha / r. In full finetuning the set "causal" is the base itself, which trains, and only a second
set is a copy. Each starts at the base model. Which set runs is an argument of the call,
`linear(x, adapter)`: there is no switch that a later call, or a recomputation in the backward pass, could
read stale. Adapters are float32 on a base of any dtype (a full copy has the base's): in bfloat16 a step of
3e-4 on a weight of 0.1 would be rounded away. Files are PEFT's, so other tools read and write the same
adapters.
"""

import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from model import Linear, Llama

PREFIX = "base_model.model."        # PEFT's tensor names: this, the module's name, .lora_A.weight (or B)


@dataclass(frozen=True)
class AdapterConfig:
    """How a set is made: a kind of ADAPTERS, and for LoRA and DoRA rank, alpha and dropout. The defaults are
    the paper's: rank 8, alpha 1 (so the scale is 1/8), no dropout."""
    kind: str = "lora"
    rank: int = 8
    alpha: float = 1.0
    dropout: float = 0.0
    targets: tuple = ()         # names of linears; none stands for all that end in _proj


class LoRA(nn.Module):
    """What one set does to one linear layer, here and in the other three: `forward` is the adapted layer, W
    and bias being `linear`'s, and `merged` the weight and bias of a plain layer that does the same."""

    def __init__(self, linear, config, path):
        super().__init__()
        new = dict(dtype=torch.float32, device=linear.weight.device)
        self.config, self.s = config, config.alpha / config.rank
        self.lora_A = nn.Parameter(torch.empty(config.rank, linear.in_features, **new))        # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.rank, **new))       # (out, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def low_rank(self, x):                                                                     # B A x
        x = x.to(self.lora_A.dtype)
        if self.config.dropout and self.training:
            x = F.dropout(x, self.config.dropout)
        return F.linear(F.linear(x, self.lora_A), self.lora_B)

    def forward(self, x, linear):
        y = F.linear(x, linear.weight, linear.bias)
        return torch.add(y, self.low_rank(x), alpha=self.s).to(y.dtype)

    def merged(self, linear):
        weight = linear.weight.to(self.lora_A.dtype) + self.s * self.lora_B @ self.lora_A
        return weight.to(linear.weight.dtype), linear.bias


class DoRA(LoRA):
    def __init__(self, linear, config, path):
        super().__init__(linear, config, path)
        norm = linear.weight.detach().to(self.lora_A.dtype).norm(dim=1)
        self.lora_magnitude_vector = nn.Parameter(norm)                                        # (out,)

    def gain(self, linear):
        """m / |W + s B A| (out,), the norm a constant to the backward pass, as in the paper's 4.3."""
        with torch.no_grad():
            norm = (linear.weight.to(self.lora_A.dtype) + self.s * self.lora_B @ self.lora_A).norm(dim=1)
        return self.lora_magnitude_vector / norm

    def forward(self, x, linear):
        y = F.linear(x, linear.weight)
        y = (self.gain(linear) * torch.add(y, self.low_rank(x), alpha=self.s)).to(y.dtype)
        return y if linear.bias is None else y + linear.bias

    def merged(self, linear):
        weight = linear.weight.to(self.lora_A.dtype) + self.s * self.lora_B @ self.lora_A
        return (self.gain(linear)[:, None] * weight).to(linear.weight.dtype), linear.bias


class IA3(nn.Module):
    def __init__(self, linear, config, path):
        super().__init__()
        self.config, self.of_input = config, ".mlp." in path
        shape = (1, linear.in_features) if self.of_input else (linear.out_features, 1)         # PEFT's
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=linear.weight.device))

    def forward(self, x, linear):
        if self.of_input:
            return F.linear((x * self.ia3_l.flatten()).to(x.dtype), linear.weight, linear.bias)
        return (F.linear(x, linear.weight, linear.bias) * self.ia3_l.flatten()).to(x.dtype)

    def merged(self, linear):
        weight = (linear.weight * self.ia3_l).to(linear.weight.dtype)      # columns or rows, by its shape
        if self.of_input or linear.bias is None:
            return weight, linear.bias
        return weight, (linear.bias * self.ia3_l.flatten()).to(linear.bias.dtype)


class Full(nn.Module):
    def __init__(self, linear, config, path):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(linear.weight.detach().clone())                             # (out, in)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x, linear):
        return F.linear(x, self.weight, self.bias)

    def merged(self, linear):
        return self.weight.detach(), None if self.bias is None else self.bias.detach()


ADAPTERS = {"lora": LoRA, "dora": DoRA, "ia3": IA3, "full": Full}


class AdaptedLinear(Linear):
    """A linear layer with adapter sets beside it. A subclass, so that the weight keeps its name."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.sets = nn.ModuleDict()             # set name -> one of ADAPTERS

    def forward(self, x, adapter=None):
        if adapter in self.sets:
            return self.sets[adapter](x, self)
        return super().forward(x)               # no such set here: the base itself


# ----------------------------------------------------------------------------------------------------------
# Sets of adapters on a whole model

def linears(model):
    """The layers that can be adapted, by module name."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Linear)}


def adapted(model, name=None):
    """The layers that carry the set `name` (any set if None), by module name."""
    return {path: m for path, m in linears(model).items()
            if isinstance(m, AdaptedLinear) and (name is None or name in m.sets)}


def add_adapter(model, name, config=AdapterConfig()):
    """Freeze the base and give every linear named in `config.targets` a new set `name`, in place of one it
    has. ValueError if no linear bears a target's name. In full finetuning all of the base trains instead of
    the set "causal"."""
    layers = linears(model)
    here = {p.split(".")[-1] for p in layers}
    if unknown := set(config.targets) - here:
        expected = ", ".join(sorted(here))
        raise ValueError(f"no linear is named {' or '.join(sorted(unknown))}: expected {expected}")
    if config.kind == "full" and name == "causal":
        model.requires_grad_(True)
        return
    targets = config.targets or [n for n in here if n.endswith("_proj")]
    paths = [p for p in layers if p.split(".")[-1] in targets]
    attach(model, name, {p: ADAPTERS[config.kind](layers[p], config, p) for p in paths})


def attach(model, name, adapters):
    full = any(isinstance(adapter, Full) for adapter in adapters.values())
    if not adapted(model) and not full:
        model.requires_grad_(False)
    for path, adapter in adapters.items():
        linear = model.get_submodule(path)
        if not isinstance(linear, AdaptedLinear):
            linear = AdaptedLinear(linear)
            model.set_submodule(path, linear)
        linear.sets[name] = adapter


def base_weights(model):
    return {n: t for n, t in model.state_dict().items() if ".sets." not in n}


@torch.no_grad()
def merge(model, name):
    """A plain model with the set `name` merged into a copy of the weights it adapts; the rest is shared."""
    weights = base_weights(model)
    for path, linear in adapted(model, name).items():
        weight, bias = linear.sets[name].merged(linear)
        weights |= {f"{path}.weight": weight} | ({} if bias is None else {f"{path}.bias": bias})
    with torch.device("meta"):
        plain = Llama(model.config)
    plain.load_state_dict(weights, assign=True)
    return plain.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------
# Files: adapter_config.json and adapter_model.safetensors, as PEFT writes them; plain checkpoints

def plain_files(model, base):
    """The files of a plain checkpoint, for `write_files`: the model's own weights, its sets left away, and
    what says how to read them, as it lies in the folder `base`."""
    weights = base_weights(model)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = read_json(Path(base) / "config.json")
    config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    names = ("generation_config.json", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json",
             "tokenizer.model")
    beside = {n: (Path(base) / n).read_bytes() for n in names if (Path(base) / n).is_file()}
    return {"model.safetensors": tensor_bytes(weights), **beside, "config.json": json_bytes(config)}


def file_names(path, adapter):
    """The names of a layer's tensors in adapter_model.safetensors: file name -> parameter."""
    halves = ("lora_A", "lora_B")               # layers of their own in PEFT
    return {f"{PREFIX}{path}.{n}" + ".weight" * (n in halves): p for n, p in adapter.named_parameters()}


def adapter_files(model, name, base=""):
    """The files of the set `name`, for `write_files`: `peft.PeftModel.from_pretrained` reads them too.
    `base` names the base model."""
    carriers = {path: linear.sets[name] for path, linear in adapted(model, name).items()}
    config = next(iter(carriers.values())).config
    targets = sorted({path.split(".")[-1] for path in carriers})
    settings = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
                "target_modules": targets, "fan_in_fan_out": False}
    if config.kind == "full":                   # not one of PEFT's, in its form all the same
        settings |= {"peft_type": "FULL"}
    elif config.kind == "ia3":
        mlp = sorted({path.split(".")[-1] for path in carriers if carriers[path].of_input})
        settings |= {"peft_type": "IA3", "feedforward_modules": mlp}
    else:
        settings |= {"peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha,
                     "lora_dropout": config.dropout, "bias": "none", "use_rslora": False,
                     "use_dora": config.kind == "dora"}
    tensors = {}
    for path, adapter in carriers.items():
        tensors |= file_names(path, adapter)
    return {"adapter_model.safetensors": tensor_bytes(tensors), "adapter_config.json": json_bytes(settings)}


def read_config(folder):
    """The AdapterConfig of an adapter folder, without targets. ValueError for what ADAPTERS do not do."""
    c = read_json(folder / "adapter_config.json", "peft_type")
    if c["peft_type"] not in ("LORA", "IA3", "FULL"):
        raise ValueError(f"{folder} holds an adapter of kind {c['peft_type']!r}: expected LORA or IA3")
    extras = ("use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias",
              "layer_replication", "use_qalora", "alora_invocation_tokens")
    odd = [k for k in extras if c.get(k)] + (["bias"] if c.get("bias", "none") != "none" else [])
    if str(c.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        odd.append("init_lora_weights")         # starts that change the base as well
    if odd:
        raise ValueError(f"{folder} uses {', '.join(odd)}, which is not supported: expected plain LoRA, "
                         "DoRA or IA3")
    if c["peft_type"] != "LORA":
        return AdapterConfig(c["peft_type"].lower())
    read_json(folder / "adapter_config.json", "r", "lora_alpha")
    kind = "dora" if c.get("use_dora") else "lora"
    return AdapterConfig(kind, c["r"], c["lora_alpha"], c.get("lora_dropout", 0.0))


def load_adapter(model, name, folder):
    """Add the set saved in `folder` to the model under `name`; returns how many tensors were read.

    Loads strictly: a tensor for a layer that the model lacks, a missing half or another shape is a
    ValueError that lists them all, and so is an adapter of a kind that is not of ADAPTERS.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), read_tensors(folder / "adapter_model.safetensors")
    parts = r"\.(lora_[AB]\.weight|lora_magnitude_vector|ia3_l|weight|bias)$"
    paths = sorted({re.sub(parts, "", n.removeprefix(PREFIX)) for n in tensors})
    config = replace(config, targets=tuple(sorted({p.split(".")[-1] for p in paths})))
    layers, want = linears(model), {}
    new = {p: ADAPTERS[config.kind](layers[p], config, p) for p in paths if p in layers}
    for p in new:
        want |= file_names(p, new[p])
    wrong = [f"missing {n}" for n in want.keys() - tensors.keys()]
    wrong += [f"unexpected {n}" for n in tensors.keys() - want.keys()]
    wrong += [f"{n} is {tuple(tensors[n].shape)}, expected {tuple(want[n].shape)}"
              for n in want.keys() & tensors.keys() if tensors[n].shape != want[n].shape]
    if wrong or not paths:
        raise ValueError(f"{folder} does not fit the model: {'; '.join(sorted(wrong)) or 'no tensors'}")

    for n, parameter in want.items():
        parameter.data.copy_(tensors[n])
    attach(model, name, new)
    return len(tensors)


def write_files(folder, files):
    """Write files, name to bytes, into a folder, all or none: whenever the process dies, the folder holds
    either what it held before or, once `finish_writing` has looked at it, all of the new. A full disk
    leaves the old."""
    folder = Path(folder)
    drafts = [folder / f"{name}.part" for name in files]
    try:
        for draft, data in zip(drafts, files.values()):
            draft.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        (folder / "renaming.part").write_bytes(json_bytes(list(files)))
        os.replace(folder / "renaming.part", folder / "renaming.json")  # from here on, the new ones count
    except BaseException:
        for draft in [*drafts, folder / "renaming.part"]:
            draft.unlink(missing_ok=True)
        raise
    finish_writing(folder)


def finish_writing(folder):
    """Give the files of a complete `write_files` their names, if it died before it had."""
    if (folder / "renaming.json").exists():
        for name in read_json(folder / "renaming.json", kind=list):
            if (folder / f"{name}.part").exists():
                os.replace(folder / f"{name}.part", folder / name)
        (folder / "renaming.json").unlink()


def json_bytes(value):
    return (json.dumps(value, indent=2) + "\n").encode()


def tensor_bytes(tensors):
    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"format": "pt"})


def read_json(path, *needs, kind=dict):
    """The contents of a JSON file. ValueError if it is absent, not of the kind, or lacks a key it needs."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        expected = "object" if kind is dict else "list"
        raise ValueError(f"{path} is not what it should be: expected a JSON {expected}")
    if lacking := [k for k in needs if value.get(k) is None]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}")
    return value


def read_tensors(path):
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
