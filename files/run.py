"""A run's folder, everything that training leaves:

    bitune.json                 method, mixing, α, template, steps done, the base's name and its config
    mixing.safetensors          Bitune's own parameters
    adapter_config.json,
    adapter_model.safetensors   the set "answer", a PEFT adapter (in full finetuning a whole checkpoint)
    bidirectional/              the set "prompt", in the same form; any further set in a folder of its name
    settings.json, log.jsonl    every flag and derived number; a line a step
    state.safetensors           what `--resume` needs
    best/                       with --keep best: the same files as of the lowest validation loss

settings.json is written at the start, log.jsonl as it goes, all the others by each save. What would make a
run mean something else is written down and checked when it is loaded.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, replace
from itertools import count, takewhile
from pathlib import Path

import torch

from bitune import METHODS, Bitune, adapter_sets
from files.adapters import adapter_bytes, load_adapter
from files.checkpoint import checkpoint_bytes, differences, load_base, merged_tensors
from files.disk import check_types, finish_writing, hold, json_bytes, read_tensors, tensor_bytes
from files.disk import write_files
from lora import KINDS, add_adapter, linears
from model import Llama
from text.examples import TEMPLATES
from text.words import listed, read_json

FULL = next(kind for kind in KINDS if KINDS[kind].trains_base)
FOLDERS = {"answer": ".", "prompt": "bidirectional"}        # where a run's sets are, since its first version


def read_settings(folder):
    """The settings of the run in a folder, and its derived numbers."""
    file = Path(folder) / "settings.json"
    saved = read_json(file, "settings", "derived")
    check_types(saved, file, settings=dict, derived=dict)
    check_types(saved["derived"], file, data_hash=str, dtype=str, val_examples=int)
    if lacking := {"data_hash", "dtype", "val_examples"} - saved["derived"].keys():
        raise ValueError(f"{file} lacks {', '.join(sorted(lacking))}")
    return saved["settings"], saved["derived"]


# ----------------------------------------------------------------------------------------------------------
# A trained model: to files, and back

def own_tensors(bitune):
    """What Bitune holds beside the model: the mixing's parameters, and whatever an edit adds."""
    return {n: t for n, t in bitune.state_dict().items() if not n.startswith("model.")}


@torch.no_grad()
def fingerprint(bitune):
    """What a Bitune of this one's make computes from made-up numbers, in float64: where it cuts a prompt,
    what its passes and its mixing leave in the cache, and its logits. It is other wherever the code has come
    to compute something else: passes, opening, masks, mixing, adapters or the decoder itself."""
    c, waves = bitune.model.config, count()
    config = replace(c, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8,
                     num_attention_heads=4, num_key_value_heads=min(4, c.num_key_value_heads),
                     rotary_dim=8 if c.rotary_dim == c.head_dim else 4, max_position_embeddings=512,
                     sliding_window=None)

    def fill(module, but=()):
        """Every number of the module a wave, around 1 in norms, or around where training starts."""
        for name, p in module.named_parameters():
            wave = torch.sin(1.7 * next(waves) + torch.arange(p.numel()).view(p.shape))
            if p.dim() > 1:
                p.copy_(wave / p.shape[-1] ** 0.5)
            elif not but:
                p.copy_(wave / 4 + ("norm" in name))
            elif name.removeprefix("model.") not in but:
                p.copy_(p * (1 + 2 * wave) + 0.1 * wave * (p == 0))
        return module

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = fill(Llama(config))
        base = dict(model.named_parameters())
        targets = {path.split(".")[-1] for path, linear in linears(bitune.model).items() if linear.sets}
        for name, (kind, options) in bitune.model.sets.items():
            add_adapter(model, name, kind, targets, **options)
        small = fill(type(bitune)(model, bitune.method, bitune.c), base).double().eval()
    ids = [7 * i * i % 61 for i in range(90)]
    wave = lambda t: torch.cos(torch.arange(t.numel()).view(t.shape) * 0.37)
    past = small.encode(small.lay_out([ids], [[]])[0])
    cache = [(t * wave(t)).sum().item() for kv in past.layers for t in kv] if past else []
    logits, labels = small([ids, ids[:40]], [[5, 9, 8], [3]])
    return {"opening": len(small.split(ids)[1]), "cache": cache,
            "logits": [(row * wave(row)).sum().item() for row in logits[labels >= 0]]}


@torch.no_grad()
def alpha_by_layer(bitune, prompt):
    """What the mixing does with a prompt: name -> each layer's α, its mean if there are several. One that
    has not the layers as its first dimension is the same in all of them."""
    context, _ = bitune.lay_out([prompt], [[]])
    if not bitune.mixes or not context.ids.shape[1]:
        return {}
    L = bitune.model.config.num_hidden_layers
    by_layer = lambda a: a.reshape(L, -1).mean(1) if a.shape[:1] == (L,) else a.mean().expand(L)
    alphas = bitune.alpha(bitune.read(context), context.positions)
    return {name: by_layer(a.float()).tolist() for name, a in alphas.items()}


def run_bytes(bitune, base, **about):
    """The files, name to bytes, of a run on the base called `base`; `about` is added to its bitune.json."""
    files = {"bitune.json": json_bytes({
        "method": bitune.method, "c": bitune.c, **about, "fingerprint": fingerprint(bitune), "base": base,
        "base_config": asdict(bitune.model.config)})}
    if own := own_tensors(bitune):
        files["mixing.safetensors"] = tensor_bytes(own)
    for name in reversed(adapter_sets(bitune.method)):
        kind, _ = bitune.model.sets[name]
        if KINDS[kind].trains_base and name == bitune.answer_set:
            one = checkpoint_bytes(merged_tensors(bitune.model, name), base)
        else:
            one = adapter_bytes(bitune.model, name, base)
        files |= {str(Path(FOLDERS.get(name, name), f)): data for f, data in one.items()}
    return files


def load_bitune(model, folder, base=""):
    """The run in `folder` on `model`, which comes from `base`, how many tensors it holds, and its
    bitune.json (a bare PEFT adapter has none: its method is "causal"). ValueError if it was finetuned from
    another base, or by another mixing. A fully finetuned run is its own base."""
    folder = Path(folder)
    finish_writing(folder)
    about = read_about(folder)
    whole = bool(about) and (folder / "config.json").exists()
    if whole and Path(base).resolve() != folder.resolve():
        raise ValueError(f"{folder} is a whole checkpoint, not an adapter of {base}: it is its own "
                         "base, give no other")
    check_base(folder, about, model, base)
    n, method = 0, about.get("method", "causal")
    for name in adapter_sets(method):
        if whole and not model.sets:
            add_adapter(model, name, FULL)
            n += len(model.state_dict())
        else:
            n += load_adapter(model, name, folder / FOLDERS.get(name, name))
    bitune = Bitune(model, method, about["c"]) if about else Bitune(model, method)
    n += load_own(bitune, folder)
    check_code(bitune, folder, about)
    return bitune, n, about


def start_from(model, folder, base, method, c):
    """A Bitune of `method` that starts as the run, or the PEFT adapter, in `folder`: with its sets and, if
    both mix, its mixing. A set that it lacks starts as its set "answer": in a new run, too, all start alike.
    """
    folder = Path(folder)
    finish_writing(folder)
    about = read_about(folder)
    if about.get("method") == method:
        return load_bitune(model, folder, base)[0]
    check_base(folder, about, model, base)
    there = adapter_sets(about.get("method", "causal"))
    for name in adapter_sets(method):
        if (folder / "config.json").exists():               # fully finetuned: the model is its set "answer"
            add_adapter(model, name, FULL)
        else:
            source = name if name in there else "answer"
            load_adapter(model, name, folder / FOLDERS.get(source, source))
    bitune = Bitune(model, method, c)
    if len(METHODS[about.get("method", "causal")]) > 1:
        load_own(bitune, folder)
    return bitune


def check_base(folder, about, model, base):
    """ValueError if the run in `folder` was finetuned from a base that computes otherwise than `model`."""
    here = asdict(model.config)
    there = about.get("base_config", here)
    if differ := [k for k in here if k in there and there[k] != here[k]]:
        raise ValueError(f"{folder} was finetuned from {about['base']}, which {base} is not: " +
                         listed([f"{k} is {there[k]} there and {here[k]} here" for k in differ]))


def read_about(folder):
    """A run's bitune.json, {} for a bare PEFT adapter."""
    if (folder / "bitune.json").exists():
        file = folder / "bitune.json"
        about = read_json(file, "method", "base", "base_config")
        check_types(about, file, method=str, base=str, base_config=dict, c=(int, float), template=str,
                    fingerprint=dict, step=int)
        if "c" not in about:
            raise ValueError(f"{file} lacks c")
        return about
    if (folder / "mixing.safetensors").exists() or (folder / FOLDERS["prompt"]).exists():
        raise ValueError(f"{folder} has no bitune.json, which says how its two sets are used")
    return {}


def load_own(bitune, folder):
    """Read what `own_tensors` wrote; returns how many tensors there are."""
    own = own_tensors(bitune)
    tensors = read_tensors(folder / "mixing.safetensors") if own else {}
    shapes = [{n: tuple(t.shape) for n, t in side.items()} for side in (own, tensors)]
    if wrong := differences(*shapes):
        raise ValueError(f"{folder / 'mixing.safetensors'} does not fit: {listed(wrong)}")
    for n, t in own.items():
        t.copy_(tensors[n])
    return len(own)


def check_code(bitune, folder, about):
    """ValueError if the code that has trained a run computes something else than this one."""
    if about:
        here, there = fingerprint(bitune), about.get("fingerprint", {})
        try:
            wrong = [key for key in here if not torch.allclose(
                *(torch.tensor(side[key], dtype=torch.float64) for side in (here, there)), 1e-6, 1e-6)]
        except (TypeError, ValueError, KeyError, RuntimeError):
            wrong = [*here]
        if wrong:
            raise ValueError(f"{folder} was trained by code that computes something else (from the same made-"
                             f"up numbers another {' and '.join(wrong)}): what has been edited since, in "
                             "bitune.py, lora.py or model.py?")


def base_of(run):
    """The folder of the base that a run, or a PEFT adapter, names; fully finetuned, a run is its own.
    ValueError if it is not here."""
    if (run / "bitune.json").exists():
        base = run if (run / "config.json").exists() else read_json(run / "bitune.json", "base")["base"]
    elif (run / "adapter_config.json").exists():
        base = read_json(run / "adapter_config.json").get("base_model_name_or_path")
    else:
        raise ValueError(f"--model not given, and {run} has no bitune.json that names it")
    if not base or not Path(base).is_dir():
        raise ValueError(f"{run} was finetuned from {base or 'a base it does not name'}, which is not a "
                         "folder here: give --model")
    return base


def load_run(run, model=None, device=None, dtype=None):
    """A run, or a PEFT adapter, on the base in the folder `model` (None: the run's own): the Bitune, the
    tokenizer, how many tensors the run holds, and its bitune.json. Without a run, the bare base (a fully
    finetuned one as the run that it is). device, dtype: as in `load_base`."""
    if not run and (Path(model) / "bitune.json").exists():
        run = model
    if not run:
        base, tokenizer = load_base(model, device, dtype)
        return Bitune(base, "causal").eval(), tokenizer, 0, {}
    run = Path(run)
    finish_writing(run)
    model = model or base_of(run)
    base, tokenizer = load_base(model, device, dtype)
    bitune, tensors, about = load_bitune(base, run, model)
    if (template := about.get("template", "plain")) not in TEMPLATES:
        raise ValueError(f"{run} has the template {template!r}: expected {' or '.join(TEMPLATES)}")
    return bitune.eval(), tokenizer, tensors, about


# ----------------------------------------------------------------------------------------------------------
# A model in training: its optimizer's state, its settings, its log

def state_bytes(bitune, optimizer, step):
    """The file with all that is needed to go on after `step` steps: one file, whole or absent."""
    tensors = {"step": torch.tensor(step), "rng": torch.get_rng_state()}
    if bitune.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(bitune.device)
    for name, p in bitune.named_parameters():
        if p.requires_grad:
            tensors[f"param.{name}"] = p
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return tensor_bytes(tensors | {f"buffer.{name}": b for name, b in bitune.named_buffers()})


def load_state(path, bitune, optimizer):
    """Put back what `state_bytes` holds; returns the number of steps done."""
    if not path.exists():
        raise ValueError(f"{path.parent} holds no save yet: start again, with the same --out")
    tensors = read_tensors(path)
    trained = {f"param.{n}": p for n, p in bitune.named_parameters() if p.requires_grad}
    want = trained | {f"buffer.{n}": b for n, b in bitune.named_buffers()}
    moments = {f"{key}.{n.removeprefix('param.')}": p for key in ("exp_avg", "exp_avg_sq")
               for n, p in trained.items() if f"{key}.{n.removeprefix('param.')}" in tensors}
    counts = {n: torch.zeros(()) for n in tensors if n == "step" or n.startswith("step.")} | \
        {"step": torch.zeros(())}
    want |= moments | counts
    have = {n: t for n, t in tensors.items() if not n.startswith("rng")}
    if wrong := differences(*({n: tuple(t.shape) for n, t in side.items()} for side in (want, have))):
        raise ValueError(f"{path} does not fit the model: {listed(wrong)}")
    try:
        torch.set_rng_state(tensors["rng"])
        if "rng.cuda" in tensors and bitune.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], bitune.device)
    except (KeyError, TypeError, RuntimeError):
        raise ValueError(f"{path} lacks the state of the random numbers, or holds another") from None
    for name in want.keys() - moments.keys() - counts.keys():
        want[name].data.copy_(tensors[name])
    for name, p in trained.items():
        name = name.removeprefix("param.")
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in tensors]
        optimizer.state[p].update({k: tensors[f"{k}.{name}"].to(p.device) for k in keys})
    return int(tensors["step"])


class Run:
    """A run in training: the model, its optimizer and examples, its settings, and its folder, which is new
    or resumed. `at` is the step in hand, `saved` the last one of which there is a save, `validated` the
    steps whose validation is in the log. Where several processes train it, one `writes`, and the others only
    read. ValueError if the folder holds a run already, or the data of one that is resumed has changed."""

    def __init__(self, settings, tokenizer, bitune, optimizer, examples, val, dropped, writes=True):
        self.settings, self.tokenizer, self.bitune, self.optimizer = settings, tokenizer, bitune, optimizer
        self.examples, self.val, self.folder, self.writes = examples, val, Path(settings.out), writes
        if writes:
            hold(self.folder)
        self.derived, self.saved = self.derive(dropped), 0
        if settings.resume:
            _, before = read_settings(self.folder)
            if before["data_hash"] != self.derived["data_hash"]:
                raise ValueError(f"{settings.data}, or the validation data, has changed since {self.folder} "
                                 "began")
            self.saved = load_state(self.folder / "state.safetensors", bitune, optimizer)
            about = read_about(self.folder)
            check_base(self.folder, about, bitune.model, settings.model)
            check_code(bitune, self.folder, about)
        elif any((self.folder / f).exists() for f in ("adapter_config.json", "config.json")):
            raise ValueError(f"{self.folder} already holds a run: continue it with --resume {self.folder}, "
                             "or choose another --out")
        self.asked = next((e.prompt for e in examples + val if bitune.split(e.prompt)[0]), examples[0].prompt)
        self.alphas(), fingerprint(bitune)              # what an edit has broken of them shows now
        self.at = self.saved
        kept = logged(self.folder / "log.jsonl", self.saved)
        self.validated = {r["step"] for r in kept if "val_loss" in r}
        self.best = min([r["val_loss"] for r in kept if "val_loss" in r and r["step"]], default=math.inf)
        if writes:
            write_files(self.folder, {"log.jsonl": "".join(json.dumps(r) + "\n" for r in kept).encode()})
        self.file = open(self.folder / "log.jsonl" if writes else os.devnull, "a", buffering=1)

    def begin(self, tokens):
        """Write down the settings, now that it is known how many tokens go at a time."""
        self.settings.micro_batch_tokens = tokens
        if self.writes:
            write_files(self.folder, {"settings.json": json_bytes({"settings": vars(self.settings),
                                                                   "derived": self.derived})})

    def alphas(self):
        """The mixing's α by layer, name -> numbers, as it takes the first prompt that there is to read."""
        return alpha_by_layer(self.bitune, self.asked)

    def derive(self, dropped):
        """The numbers that follow from the settings and the data."""
        s, bitune, examples = self.settings, self.bitune, self.examples
        trainable = sum(p.numel() for p in bitune.parameters() if p.requires_grad)
        frozen = [p for p in bitune.parameters() if not p.requires_grad]
        return {
            "device": str(bitune.device),
            "dtype": str(bitune.model.model.embed_tokens.weight.dtype).removeprefix("torch."),
            "frozen_parameters": sum(p.numel() for p in frozen),
            "frozen_bytes": sum(p.numel() * p.element_size() for p in frozen),
            "trainable_parameters": trainable,
            "train_examples": len(examples), "val_examples": len(self.val), "dropped": dropped,
            "prompt_tokens": sum(len(e.prompt) for e in examples),
            "answer_tokens": sum(len(e.answer) for e in examples),
            "data_hash": digest(examples + self.val),
            "epochs": round(s.steps * s.batch_size / len(examples), 2),
        }

    def steps_left(self):
        for self.at in range(self.saved + 1, self.settings.steps + 1):
            yield self.at

    def log(self, record):
        print(json.dumps({"step": self.at, **record}), file=self.file)

    def log_validation(self, result):
        """Log it, with α layer by layer; with --keep best, the save that has the lowest loss stays in the
        folder best/."""
        s = self.settings
        if self.at and result["loss"] < self.best:              # at step 0 it is the base's loss
            self.best = result["loss"]
            if self.writes and s.keep == "best":
                write_files(self.folder / "best", self.run_bytes())
        self.log({f"val_{name}": value for name, value in result.items()} |
                 {f"alphas_{name}": by_layer for name, by_layer in self.alphas().items()})

    def run_bytes(self):
        s = self.settings
        return run_bytes(self.bitune, s.model, template=s.template, step=self.at, alpha=self.alphas())

    def save(self):
        if self.writes:
            state = state_bytes(self.bitune, self.optimizer, self.at)
            write_files(self.folder, {"state.safetensors": state, **self.run_bytes()})
        self.saved = self.at


def digest(examples):
    """A hash of the examples and their order."""
    h = hashlib.sha256()
    for e in examples:
        h.update(f"{e.prompt}{e.answer}".encode())
    return h.hexdigest()[:16]


def logged(path, step):
    """What a log says up to a step: later lines, of which the last may be torn, are of steps that were
    lost."""
    lines = path.read_text().splitlines() if step and path.exists() else []
    try:
        whole = map(json.loads, takewhile(lambda line: line.endswith("}"), lines))
        return list(takewhile(lambda record: record["step"] <= step, whole))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path} is damaged: expected a JSON object with a step on each line") from None


def finished(folder):
    """Whether a run has taken all of its steps, and has validated after the last one."""
    folder = Path(folder)
    finish_writing(folder)
    if not (folder / "bitune.json").exists():
        return False
    settings, derived = read_settings(folder)
    if read_json(folder / "bitune.json").get("step") != settings["steps"]:
        return False
    validated = [r["step"] for r in logged(folder / "log.jsonl", settings["steps"]) if "val_loss" in r]
    return not derived["val_examples"] or settings["steps"] in validated
