"""Adapter sets on disk, as PEFT writes them: adapter_config.json and adapter_model.safetensors.

What is particular to a kind of adapters, its fields and its tensors' names, stands in its class in lora.py.
"""

import re
from functools import partial
from pathlib import Path

import torch

from files.disk import fill, json_bytes, read_tensors, tensor_bytes
from lora import KINDS, adapters, add_adapter, linears
from text.words import check_fields, listed, number_within, read_json

PREFIX = "base_model."          # PEFT's model around the base


def list_of_names(value):
    """a list of names"""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# Fields of adapter_config.json besides those of a kind of adapters; see `words.check_fields`. Other ways to
# start than these change the base as well.
FIELDS = {
    **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"), ((None, []), None)),
    "peft_type": (str, ...), "target_modules": ((str, list_of_names), ...),
    "modules_to_save": ((None, False, []), None),
    "init_lora_weights": ((None, True, False, "gaussian", "eva", "orthogonal"), None),
}
# Those that change nothing once the tensors are there: who wrote it, where it goes, how it was started and
# trained. (On a plain linear, PEFT itself sets fan_in_fan_out to false.)
NEUTRAL = set("""
    task_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    fan_in_fan_out init_ia3_weights loftq_config eva_config corda_config lora_ga_config megatron_core
    qalora_group_size ensure_weight_tying
""".split())


def peft_type(maker):
    return maker.peft.get("peft_type", maker.__name__.upper())


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
              "peft_type": peft_type(KINDS[kind])}
    for key, option in KINDS[kind].options.items():
        listed = isinstance(option.default, tuple)
        fields[option.field] = [n for n in targets if n in options[key]] if listed else options[key]
        other = {path: a.made_with[key] for path, a in carriers.items() if a.made_with[key] != options[key]}
        if option.pattern and other:
            fields[option.pattern] = other
    fields |= KINDS[kind].peft
    return {"adapter_model.safetensors": tensor_bytes(tensors_on_disk(carriers)),
            "adapter_config.json": json_bytes(fields)}


def read_options(folder):
    """The kind of the adapters in a folder, their options, and two functions of a layer's path: its options,
    which may be others, and whether the file names it. ValueError for what no kind of lora.KINDS does."""
    file = folder / "adapter_config.json"
    c = read_json(file)
    theirs = c.get("peft_type")
    unlike = {kind: sum(c.get(field, value) not in (value, None) for field, value in maker.peft.items())
              for kind, maker in KINDS.items() if peft_type(maker) == theirs}
    if not unlike:
        known = " or ".join(sorted({peft_type(maker) for maker in KINDS.values()}))
        raise ValueError(f"{folder} holds an adapter of kind {theirs!r:.60}: expected {known}")
    kind = min(unlike, key=unlike.get)
    known, table = KINDS[kind].options, dict(FIELDS)
    for field, value in KINDS[kind].peft.items():       # rank-stabilised: its scale is lora_alpha / sqrt(r)
        table[field] = ((bool if field == "use_rslora" else value, None), value)
    for option in known.values():
        table[option.field] = (form_of(option), ... if option.default else option.default)
        table |= {option.pattern: ((dict, [], None), None)} if option.pattern else {}
    c = check_fields(c, file, table, NEUTRAL, (None, False, 0, 0.0))
    patterns = {key: c[option.pattern] or {} for key, option in known.items() if option.pattern}
    for key, values in patterns.items():
        where = f"the {known[key].pattern} of {file}"
        check_fields(values, where, dict.fromkeys(values, (form_of(known[key]), None)))
    values = {key: c[o.field] for key, o in known.items()}
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}

    def of(path):
        """A pattern names the end of a layer's path, as a regular expression; the first that fits counts."""
        own = dict(options)
        for key, values in patterns.items():
            fitting = [value for p, value in values.items() if re.match(rf"(.*\.)?({p})$", path)]
            own[key] = fitting[0] if fitting else own[key]
        if c.get("use_rslora"):
            own["lora_alpha"] *= own["rank"] ** 0.5
        return own

    return kind, options, of, partial(targeted, c["target_modules"])


def targeted(targets, path):
    """Whether an adapter_config.json's target_modules name the layer at a path, as PEFT has it."""
    if isinstance(targets, str):
        return targets == "all-linear" or bool(re.fullmatch(targets, path))
    return any(f".{path}".endswith(f".{name}") for name in targets)


def form_of(option):
    """What a value of an option must be: a form of `words.check_fields`."""
    if isinstance(option.default, tuple):
        return list_of_names
    return number_within(type(option.default), option.low, option.high)


def load_adapter(model, name, folder):
    """Add the set saved in `folder` to the model under `name`; returns how many tensors were read.
    ValueError for a kind that is not of lora.KINDS, and for tensors, which it lists, of layers that the
    model lacks, without their other half, or of another shape."""
    folder = Path(folder)
    kind, options, of, names = read_options(folder)
    have = read_tensors(folder / "adapter_model.safetensors")
    paths = [p for p in linears(model) if any(n.startswith(f"{PREFIX}model.{p}.") for n in have)]
    if not paths:
        raise ValueError(f"{folder} does not fit the model: no tensors of its layers")
    alike = {}                                  # layers by their options
    try:
        others = [p for p in paths if not names(p)]
        for path in paths:
            alike.setdefault(tuple(of(path).items()), []).append(path)
    except (re.error, OverflowError, RecursionError) as problem:
        raise ValueError(f"{folder}: its adapter_config.json names layers by no regular expression: "
                         f"{problem}") from None
    if others:
        raise ValueError(f"{folder} has tensors of layers that its adapter_config.json does not name, and "
                         f"PEFT would drop them: {listed(others)}")
    new = {}
    for own, group in alike.items():
        new |= add_adapter(model, name, kind, group, **dict(own))
    model.sets[name] = kind, options
    want = tensors_on_disk(new)
    fill(want, named_as_wanted(model, want, have, folder), folder)
    return len(want)


def named_as_wanted(model, want, have, folder):
    """The tensors `have` of a file under the names of `want`: PEFT knows some with "default", its name of a
    set, or with "weight", too. The base's own tensors may have been saved along; ValueError if they are not
    the base's."""
    base, settled = model.state_dict(), {}
    for name, tensor in have.items():
        plain = re.sub(r"(?<=_vector)(\.default)?\.weight$|(?<=ia3_l)\.default$|\.default(?=\.weight$)", "",
                       name)
        own = name.removeprefix(f"{PREFIX}model.")
        if own == "lm_head.weight" and own not in base:             # of a tied base: it is the embedding
            own = "model.embed_tokens.weight"
        if name not in want and own in base:
            theirs = base[own].cpu()
            if theirs.shape != tensor.shape or not torch.equal(theirs, tensor.to(theirs.dtype)):
                raise ValueError(f"{folder} brings its own {own}, which is not supported: expected the "
                                 "base's")
            continue
        settled[plain if plain in want else name] = tensor
    return settled
