"""Adapter sets on disk, as PEFT writes them: adapter_config.json and adapter_model.safetensors.

What is particular to a kind of adapters, its fields and its tensors' names, stands in its class in lora.py.
"""

from pathlib import Path

from files.checkpoint import differences
from files.disk import json_bytes, read_json, read_tensors, tensor_bytes
from lora import KINDS, adapters, add_adapter, linears

PREFIX = "base_model."          # PEFT's model around the base
REFUSED = ("modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication",
           "use_qalora", "alora_invocation_tokens")
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")    # init_lora_weights that change the base as well


def tensors_on_disk(carriers):
    """The tensors of a set, path -> adapter, by their names in the file."""
    found = {}
    for path, adapter in carriers.items():
        for name, tensor in [*adapter.named_parameters(), *adapter.named_buffers()]:
            form = adapter.tensor_names.get(name, f"model.{{path}}.{name}")
            found[PREFIX + form.format(path=path)] = tensor
    return found


def adapter_bytes(model, name, base=""):
    """The files, name to bytes, of the set `name`; `base` names the base model."""
    carriers, (kind, options) = adapters(model, name), model.sets[name]
    targets = sorted({path.split(".")[-1] for path in carriers})
    fields = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
              "target_modules": targets, "fan_in_fan_out": False,
              "peft_type": KINDS[kind].peft["peft_type"]}
    for key, option in KINDS[kind].options.items():
        listed = isinstance(option.default, tuple)
        fields[option.field] = [n for n in targets if n in options[key]] if listed else options[key]
    fields |= KINDS[kind].peft
    return {"adapter_model.safetensors": tensor_bytes(tensors_on_disk(carriers)),
            "adapter_config.json": json_bytes(fields)}


def read_options(folder):
    """The kind and options of the adapters in a folder. ValueError for what no kind of lora.KINDS does."""
    file = folder / "adapter_config.json"
    c = read_json(file, "peft_type")
    odd = {kind: [field for field, value in maker.peft.items() if c.get(field, value) not in (value, None)]
           for kind, maker in KINDS.items() if maker.peft["peft_type"] == c["peft_type"]}
    if not odd:
        known = " or ".join(sorted({maker.peft["peft_type"] for maker in KINDS.values()}))
        raise ValueError(f"{folder} holds an adapter of kind {c['peft_type']!r}: expected {known}")
    kind = min(odd, key=lambda kind: len(odd[kind]))
    refused = odd[kind] + [field for field in REFUSED if c.get(field)]
    if str(c.get("init_lora_weights")).startswith(STARTS):
        refused.append("init_lora_weights")
    if refused:
        raise ValueError(f"{folder} uses {', '.join(refused)}, which is not supported: expected plain "
                         f"{KINDS[kind].__name__}")
    options = KINDS[kind].options
    read_json(file, *(o.field for o in options.values() if o.default))      # what may be absent is 0
    values = {key: c.get(o.field, o.default) for key, o in options.items()}
    return kind, {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def load_adapter(model, name, folder):
    """Add the set saved in `folder` to the model under `name`; returns how many tensors were read.

    Loads strictly: a tensor for a layer that the model lacks, a missing half or another shape is a
    ValueError that lists them all, and so is an adapter of a kind that is not of lora.KINDS.
    """
    folder = Path(folder)
    kind, options = read_options(folder)
    have = read_tensors(folder / "adapter_model.safetensors")
    paths = [p for p in linears(model) if any(n.startswith(f"{PREFIX}model.{p}.") for n in have)]
    if not paths:
        raise ValueError(f"{folder} does not fit the model: no tensors of its layers")
    want = tensors_on_disk(add_adapter(model, name, kind, paths, **options))
    shapes = [{n: tuple(t.shape) for n, t in tensors.items()} for tensors in (want, have)]
    if wrong := differences(*shapes):
        raise ValueError(f"{folder} does not fit the model: {'; '.join(wrong)}")
    for n, tensor in want.items():
        tensor.data.copy_(have[n])
    return len(have)
