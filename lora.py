"""Low-rank adapters (LoRA, 2106.09685) on the model's linears: several named sets on one frozen base.

    y = W x + (alpha / r) B A x       A (r, in) Kaiming-uniform, B (out, r) zero: it starts at the base model

Which set runs is an argument of the call, `linear(x, adapter)`: there is no switch that a later call, or a
recomputation in the backward pass, could read stale. Adapters are float32 on a base of any dtype: in
bfloat16 a step of 3e-4 on a weight of 0.1 would be rounded away. Files are PEFT's, so other tools read and
write the same adapters.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from model import Linear, Llama

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."        # PEFT's tensor names: this, the module's name, .lora_A.weight (or B)


@dataclass(frozen=True)
class LoRAConfig:
    """How a set is made. The defaults are the paper's: rank 8, alpha 1 (so the scale is 1/8), no dropout."""
    rank: int = 8
    alpha: float = 1.0
    dropout: float = 0.0
    targets: tuple = TARGETS


class LoRA(nn.Module):
    """What one set adds to one linear layer."""

    def __init__(self, linear, config):
        super().__init__()
        new = dict(dtype=torch.float32, device=linear.weight.device)
        self.config, self.scale = config, config.alpha / config.rank
        self.lora_A = nn.Parameter(torch.empty(config.rank, linear.in_features, **new))        # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.rank, **new))       # (out, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x, y):
        """y + (alpha / r) B A x in float32, then back to the dtype of y = W x."""
        x = x.to(self.lora_A.dtype)
        if self.config.dropout and self.training:
            x = F.dropout(x, self.config.dropout)
        return torch.add(y, F.linear(F.linear(x, self.lora_A), self.lora_B), alpha=self.scale).to(y.dtype)

    def merged(self, weight):
        """W + (alpha / r) B A in the dtype of W."""
        delta = self.scale * self.lora_B @ self.lora_A
        return (weight.to(delta.dtype) + delta).to(weight.dtype)


class AdaptedLinear(Linear):
    """A frozen linear layer with adapter sets beside it. A subclass, so that the weight keeps its name."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.sets = nn.ModuleDict()             # set name -> LoRA

    def forward(self, x, adapter=None):
        y = F.linear(x, self.weight, self.bias)
        return self.sets[adapter](x, y) if adapter in self.sets else y      # no such set here: the bare base


# ----------------------------------------------------------------------------------------------------------
# Sets of adapters on a whole model

def linears(model):
    """The layers that can be adapted, by module name."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Linear)}


def adapted(model, name=None):
    """The layers that carry the set `name` (any set if None), by module name."""
    return {path: m for path, m in linears(model).items()
            if isinstance(m, AdaptedLinear) and (name is None or name in m.sets)}


def add_adapter(model, name, config=LoRAConfig(), paths=None):
    """Freeze the base and give every linear named in `config.targets` (of these only `paths`, if given) a
    new set `name`, in place of one it has. ValueError if no linear bears a target's name."""
    if paths is None:
        paths = [p for p in linears(model) if p.split(".")[-1] in config.targets]
    if unknown := set(config.targets) - {p.split(".")[-1] for p in paths}:
        here = sorted({p.split(".")[-1] for p in linears(model)})
        raise ValueError(f"no linear is named {' or '.join(sorted(unknown))}: expected {', '.join(here)}")
    if not adapted(model):
        model.requires_grad_(False)
    for path in paths:
        linear = model.get_submodule(path)
        if not isinstance(linear, AdaptedLinear):
            linear = AdaptedLinear(linear)
            model.set_submodule(path, linear)
        linear.sets[name] = LoRA(linear, config)


def merge(model, name):
    """A plain model with the set `name` merged into a copy of the weights it adapts; the rest is shared."""
    weights = {n: t for n, t in model.state_dict().items() if ".sets." not in n}
    for path, linear in adapted(model, name).items():
        weights[f"{path}.weight"] = linear.sets[name].merged(linear.weight)
    with torch.device("meta"):
        plain = Llama(model.config)
    plain.load_state_dict(weights, assign=True)
    return plain.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------
# Files: adapter_config.json and adapter_model.safetensors, as PEFT writes them

def adapter_files(model, name, base=""):
    """The files of the set `name`, for `write_files`: `peft.PeftModel.from_pretrained` reads them too.
    `base` names the base model."""
    carriers = adapted(model, name)
    config = next(iter(carriers.values())).sets[name].config
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": sorted({path.split(".")[-1] for path in carriers}),
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
    }
    tensors = {}
    for path, linear in carriers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = linear.sets[name].lora_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = linear.sets[name].lora_B
    return {"adapter_model.safetensors": tensor_bytes(tensors), "adapter_config.json": json_bytes(settings)}


def load_adapter(model, name, folder):
    """Add the set saved in `folder` to the model under `name`; returns how many tensors were read.

    Loads strictly: a tensor for a layer that the model lacks, a missing half or another shape is a
    ValueError that lists them all, and so is an adapter of another kind than plain LoRA.
    """
    folder = Path(folder)
    c = read_json(folder / "adapter_config.json", "peft_type", "r", "lora_alpha")
    if c.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds an adapter of kind {c.get('peft_type')!r}: expected LORA")
    extras = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias",
              "layer_replication", "use_qalora", "alora_invocation_tokens")
    odd = [k for k in extras if c.get(k)] + (["bias"] if c.get("bias", "none") != "none" else [])
    if str(c.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        odd.append("init_lora_weights")         # starts that change the base as well
    if odd:
        raise ValueError(f"{folder} uses {', '.join(odd)}, which is not supported: expected plain LoRA")

    tensors = read_tensors(folder / "adapter_model.safetensors")
    paths = sorted({n.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for n in tensors})
    layers, r, want = linears(model), c["r"], {}
    for p in paths:
        if p in layers:
            want[f"{PREFIX}{p}.lora_A.weight"] = (r, layers[p].in_features)
            want[f"{PREFIX}{p}.lora_B.weight"] = (layers[p].out_features, r)
    wrong = [f"missing {n}" for n in want.keys() - tensors.keys()]
    wrong += [f"unexpected {n}" for n in tensors.keys() - want.keys()]
    wrong += [f"{n} is {tuple(tensors[n].shape)}, expected {want[n]}"
              for n in want.keys() & tensors.keys() if tuple(tensors[n].shape) != want[n]]
    if wrong or not paths:
        raise ValueError(f"{folder} does not fit the model: {'; '.join(sorted(wrong)) or 'no tensors'}")

    targets = tuple(sorted({p.split(".")[-1] for p in paths}))
    add_adapter(model, name, LoRAConfig(r, c["lora_alpha"], c.get("lora_dropout", 0.0), targets), paths)
    with torch.no_grad():
        for p in paths:
            lora = model.get_submodule(p).sets[name]
            lora.lora_A.copy_(tensors[f"{PREFIX}{p}.lora_A.weight"])
            lora.lora_B.copy_(tensors[f"{PREFIX}{p}.lora_B.weight"])
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
