"""A run's folder, everything that training leaves; docs/data.md lists its files ("What a run is").

settings.json is written at the start, log.jsonl as it goes, all the others by each save.
"""

import json
import math
import os
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import torch

from bitune import METHODS, Bitune, adapter_sets
from files.adapters import adapter_bytes, load_adapter
from files.checkpoint import checkpoint_bytes, load_base, load_tokenizer, merged_tensors
from files.disk import fill, finish_saves, json_bytes, locked, read_tensors, tensor_bytes, write_files
from lora import KINDS, adapters, add_adapter, linears
from model import Llama
from text.examples import TEMPLATES
from text.tokenizer import Tokenizer
from text.words import check_fields, digest, read_json, to_type

FULL = next(kind for kind in KINDS if KINDS[kind].trains_base)


# ----------------------------------------------------------------------------------------------------------
# What a run is, beside its tensors

ABOUT = {"method": (tuple(METHODS), ...), "c": ((int, float), ...), "template": (tuple(TEMPLATES), "plain"),
         "step": (int, None), "whole": (bool, False), "base": (str, ...),
         "base_digest": (str, ...), "fingerprint": (list, ...)}


def read_about(folder):
    """A run's bitune.json, {} for a bare PEFT adapter. ValueError if it is damaged."""
    file = Path(folder) / "bitune.json"
    finish_saves(folder)
    if not file.exists():
        saved = "mixing.safetensors", folder_of("prompt") / "adapter_config.json"
        if any((file.parent / name).exists() for name in saved):    # not drafts of a save that failed
            raise ValueError(f"{folder} has no bitune.json, which says how its two sets are used")
        return {}
    return check_fields(read_json(file), file, ABOUT)


def base_of(run):
    """The folder of the base that a run, or a PEFT adapter, names; fully finetuned, a run is its own.
    ValueError if it is not here."""
    run, about = Path(run), read_about(run)
    base = run if about.get("whole") else about.get("base")
    if not about:
        base = read_json(run / "adapter_config.json").get("base_model_name_or_path")
    if not base or not Path(str(base)).is_dir():
        raise ValueError(f"{run} was finetuned from {base or 'a base it does not name'}, which is not a "
                         "folder here: give --model")
    return base


@torch.no_grad()
def fingerprint(bitune):
    """What a small Bitune of the same make computes of made-up numbers, in float64: where it cuts a prompt,
    what its passes and its mixing leave in the cache, and its logits. These change when an edit changes
    passes, opening, masks, mixing, adapters or the decoder itself."""
    c = bitune.model.config
    shared = {c.num_attention_heads: 4, 1: 1}           # of its 4 heads; any other number becomes 2
    config = replace(c, vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=8,
                     num_attention_heads=4, num_key_value_heads=shared.get(c.num_key_value_heads, 2),
                     rotary_dim=8 if c.rotary_dim == c.head_dim else 4, max_position_embeddings=512,
                     sliding_window=None)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = Llama(config)
        targets = {path.split(".")[-1] for path, linear in linears(bitune.model).items() if linear.sets}
        for name in adapter_sets(bitune.method):
            kind, options = bitune.model.sets[name]
            add_adapter(model, name, kind, targets, **options)
        small = type(bitune)(model, bitune.method, bitune.c)
        for n, p in enumerate(small.parameters()):      # away from where it starts
            wave = torch.sin(1.7 * n + torch.arange(p.numel()).view(p.shape))
            p.copy_(wave / p.shape[-1] ** 0.5 if p.dim() > 1 else p + wave / 4)
    small.double().eval()
    ids = [7 * i * i % 61 for i in range(300)]
    wave = lambda t: torch.cos(torch.arange(t.numel()).view(t.shape) * 0.37)
    past = small.encode(small.lay_out([ids], [[]])[0])
    cache = [(t * wave(t)).sum().item() for kv in past.layers for t in kv] if past else []
    logits, labels = small([ids, ids[:40]], [[5, 9, 8], [3]])
    said = [(row * wave(row)).sum().item() for row in logits[labels >= 0]]
    return [float(len(small.split(ids)[1])), *cache, *said]


def check_code(folder, about, bitune):
    """ValueError if a run was trained by code that computes something else than this one."""
    ours, theirs = fingerprint(bitune), about["fingerprint"]
    same = lambda a, b: type(b) is float and math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)
    if len(ours) != len(theirs) or not all(map(same, ours, theirs)):
        raise ValueError(f"{folder} was trained by code that computes something else: what has been edited "
                         "since, in bitune.py, lora.py or model.py?")


@torch.no_grad()
def alpha_by_layer(bitune, prompt):
    """What the mixing does with a prompt: name -> a number for each layer, the mean of its α. (An α whose
    first dimension is not the layers is shared by all of them.) Without dropout, which draws numbers."""
    context, _ = bitune.lay_out([prompt], [[]])
    if not bitune.mixes or not context.ids.shape[1]:
        return {}
    L = bitune.model.config.num_hidden_layers
    by_layer = lambda a: a.reshape(L, -1).mean(1) if a.shape[:1] == (L,) else a.mean().expand(L)
    training = bitune.training
    alphas = bitune.eval().alpha(bitune.read(context), context.positions)
    bitune.train(training)
    rows = [by_layer(a.float()) for a in alphas.values()]
    return dict(zip(alphas, torch.stack(rows).tolist() if rows else []))            # one wait for a GPU


# ----------------------------------------------------------------------------------------------------------
# A trained model: to files, and back

def folder_of(name):
    """Where the set `name` lies in a run's folder: each in one of its own name, but for "answer"."""
    return Path("." if name == "answer" else name)


def own_tensors(bitune):
    """What Bitune holds beside the model: the mixing's parameters, and whatever an edit adds."""
    own = [*bitune.named_parameters(), *bitune.named_buffers()]
    return {n: t.detach() for n, t in own if not n.startswith("model.")}


def run_bytes(bitune, base, **about):
    """The files, name to bytes, of a run on the base called `base`; `about` is added to its bitune.json."""
    kind, _ = bitune.model.sets["answer"]
    whole = KINDS[kind].trains_base
    files = {"bitune.json": json_bytes({
        "method": bitune.method, "c": bitune.c, **about, "whole": whole, "base": base,
        "base_digest": bitune.model.digest, "fingerprint": fingerprint(bitune)})}
    if own := own_tensors(bitune):
        files["mixing.safetensors"] = tensor_bytes(own)
    for name in reversed(adapter_sets(bitune.method)):
        if whole and name == "answer":
            one = checkpoint_bytes(merged_tensors(bitune.model, name), base)
        else:
            one = adapter_bytes(bitune.model, name, base)
        files |= {str(folder_of(name) / f): data for f, data in one.items()}
    return files


def check_tokenizer(folder, base, vocab_size):
    """ValueError if the tokenizer in a folder makes other ids, prompts or ends than the base's."""
    theirs, ours = Tokenizer.from_pretrained(folder), load_tokenizer(base)
    theirs.limit(vocab_size)
    read = lambda t: (t.vocab, t.added, t.special, t.bos_id, t.chat)
    if read(theirs) != read(ours) or theirs.eos_id not in (None, ours.eos_id):
        raise ValueError(f"{folder} brings another tokenizer or chat template than {base} has: move its "
                         "files there, or away")


def load_bitune(model, folder, base="", method=None, c=None):
    """The run, or the bare PEFT adapter, in `folder` on its base `model`, how many tensors it holds, and its
    bitune.json. Another `method`, or constant `c`, starts from what the run has learned: a set that the run
    lacks starts as a copy of its set "answer". ValueError if the run is not this base's, or not this code's.
    A fully finetuned run is its own base."""
    folder, about = Path(folder), read_about(folder)
    own = about.get("method", "causal")
    if about.get("whole") and Path(base).resolve() != folder.resolve():
        raise ValueError(f"{folder} is a whole checkpoint, not an adapter of {base}: it is its own base, "
                         "give no other")
    if about.get("whole"):
        model.digest = about["base_digest"]             # of the base that it was
    if about and about["base_digest"] != model.digest:
        raise ValueError(f"{folder} was finetuned from {about['base']}, which {base} is not: it has another "
                         "config, or other weights")
    if not about and (folder / "tokenizer.json").is_file():             # TRL leaves one beside an adapter
        check_tokenizer(folder, base, model.config.vocab_size)
    n, there = len(model.state_dict()) if about.get("whole") else 0, adapter_sets(own)
    wanted = adapter_sets(method or own)
    for name in dict.fromkeys([*there, *wanted]):
        if about.get("whole") and (name == "answer" or name not in there):
            add_adapter(model, name, FULL)
        else:
            source = name if name in there else "answer"
            n += load_adapter(model, name, folder / folder_of(source))
    if about:
        check_code(folder, about, Bitune(model, own, about["c"]))
    for name in model.sets.keys() - wanted:             # which the check alone needed
        del model.sets[name]
        for path in adapters(model, name):
            del model.get_submodule(path).sets[name]
    c = about.get("c") if c is None else c
    bitune = Bitune(model, method or own, *([] if c is None else [c]))
    mixing, file = own_tensors(bitune), folder / "mixing.safetensors"
    if mixing and (bitune.method == own or file.exists()):
        fill(mixing, read_tensors(file), file)
        n += len(mixing)
    return bitune, n, about


def load_run(run, model=None, device=None, dtype=None):
    """A run, or a PEFT adapter, on the base in the folder `model` (None: the run's own): the Bitune, the
    tokenizer, how many tensors the run holds, and its bitune.json. Without a run, the bare base (a fully
    finetuned one as the run that it is). device, dtype: as in `load_base`."""
    if not run and read_about(model).get("whole"):
        run = model
    model = model or base_of(run)
    base, tokenizer = load_base(model, device, dtype)
    bitune, tensors, about = load_bitune(base, run, model) if run else (Bitune(base, "causal"), 0, {})
    return bitune.eval(), tokenizer, tensors, about


# ----------------------------------------------------------------------------------------------------------
# A model in training

def optimizer_names(bitune, optimizer):
    """The names of an optimizer's parameters, in its order."""
    names = {id(p): name for name, p in bitune.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def state_bytes(bitune, optimizer, step):
    """The file with what is needed, beside the model itself, to go on after `step` steps: the optimizer's
    moments, by their parameters' names, and where the random numbers are."""
    names = optimizer_names(bitune, optimizer)
    state = {f"adamw.{key}.{names[i]}": t for i, own in optimizer.state_dict()["state"].items()
             for key, t in own.items()}
    state |= {"rng": torch.get_rng_state(), "step": torch.tensor(step)}
    if bitune.device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(bitune.device)
    return tensor_bytes(state)


def load_state(path, bitune, optimizer):
    """Put back what `state_bytes` holds; returns the number of steps done."""
    have, moments, names = read_tensors(path), {}, optimizer_names(bitune, optimizer)
    shapes = {name: p.shape for name, p in bitune.named_parameters()}
    try:
        torch.set_rng_state(have["rng"])
        if "rng.cuda" in have and bitune.device.type == "cuda":
            torch.cuda.set_rng_state(have["rng.cuda"], bitune.device)
        for name in have:
            if name.startswith("adamw."):
                _, key, of = name.split(".", 2)
                if key != "step" and have[name].shape != shapes[of]:
                    raise ValueError
                moments.setdefault(names.index(of), {})[key] = have[name]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        return int(have["step"])
    except (KeyError, TypeError, RuntimeError, ValueError):
        raise ValueError(f"{path} is damaged, or another model's") from None


class Run:
    """A run in training: the model, its optimizer and examples, its settings, and its folder, which is new
    or resumed. `at` is the step in hand, `saved` the last one of which there is a save, `validated` the
    losses in the log, by step. Where several processes train it, one `writes`, and the others only
    read. ValueError if the folder holds a run already, or the data of one that is resumed has changed."""

    def __init__(self, settings, tokenizer, bitune, optimizer, examples, val, dropped, writes=True):
        self.settings, self.tokenizer, self.bitune, self.optimizer = settings, tokenizer, bitune, optimizer
        self.examples, self.val, self.folder, self.writes = examples, val, Path(settings.out), writes
        self.derived, self.saved = self.derive(dropped), 0
        if settings.keep == "best" and not val:
            raise ValueError("--keep best: there is no validation to tell the best by; give --val-data")
        if settings.resume:
            _, before = read_settings(self.folder)
            if before["data_hash"] != self.derived["data_hash"]:
                raise ValueError(f"{settings.data}, or the validation data, has changed since {self.folder} "
                                 "began")
            self.saved = load_state(self.folder / "state.safetensors", bitune, optimizer)
        elif any((self.folder / f).exists() for f in ("adapter_config.json", "config.json")):
            raise ValueError(f"{self.folder} already holds a run: continue it with --resume {self.folder}, "
                             "or choose another --out")
        prompts = [e.prompt for e in examples + val]
        self.alpha_prompt = next((p for p in prompts if bitune.split(p)[0]), prompts[0])
        self.alphas(), fingerprint(bitune)              # what an edit has broken of them shows now
        self.at = self.saved
        kept = logged(self.folder / "log.jsonl", self.saved)
        if self.saved and (not kept or kept[-1]["step"] < self.saved):
            raise ValueError(f"{self.folder / 'log.jsonl'} is damaged: it ends before step {self.saved}")
        self.validated = {r["step"]: r["val_loss"] for r in kept if "val_loss" in r}
        if writes:
            write_files(self.folder, {"log.jsonl": "".join(json.dumps(r) + "\n" for r in kept).encode()})
        self.file = open(self.folder / "log.jsonl" if writes else os.devnull, "a", buffering=1)

    def where(self):
        return f"step {self.at}"

    def how_to_go_on(self):
        whole = f"The save of step {self.saved} is whole: {to_type('train.py', '--resume', self.folder)}"
        return whole if self.saved else "Nothing was saved yet."

    def write_settings(self, tokens):
        """Write down the settings, now that it is known how many tokens go at a time."""
        self.settings.micro_batch_tokens = tokens
        if self.writes:
            write_files(self.folder, {"settings.json": json_bytes({"settings": vars(self.settings),
                                                                   "derived": self.derived})})

    def derive(self, dropped):
        """The numbers that follow from the settings and the data."""
        s, bitune, examples = self.settings, self.bitune, self.examples
        frozen = [p for p in bitune.parameters() if not p.requires_grad]
        return {
            "device": str(bitune.device),
            "dtype": str(bitune.model.model.embed_tokens.weight.dtype).removeprefix("torch."),
            "frozen_parameters": sum(p.numel() for p in frozen),
            "frozen_bytes": sum(p.numel() * p.element_size() for p in frozen),
            "trainable_parameters": sum(p.numel() for p in bitune.parameters() if p.requires_grad),
            "train_examples": len(examples), "val_examples": len(self.val), "dropped": dropped,
            "prompt_tokens": sum(len(e.prompt) for e in examples),
            "answer_tokens": sum(len(e.answer) for e in examples),
            "data_hash": digest((examples, self.val)),
            "epochs": round(s.steps * s.batch_size / len(examples), 2),
        }

    def alphas(self):
        """The mixing's α by layer, name -> numbers, with the first prompt that has a context."""
        return alpha_by_layer(self.bitune, self.alpha_prompt)

    def log(self, record):
        print(json.dumps({"step": self.at, **record}), file=self.file)

    def log_validation(self, result):
        """Log it, with α layer by layer; returns what is logged. With --keep best, the save that has the
        lowest loss stays in the folder best/."""
        best = min((loss for step, loss in self.validated.items() if step), default=math.inf)   # 0: the base
        self.validated[self.at] = result["loss"]
        if self.writes and self.settings.keep == "best" and self.at and result["loss"] < best:
            with locked(self.folder / "best"):
                write_files(self.folder / "best", self.bytes())
        record = {f"val_{name}": value for name, value in result.items()}
        record |= {f"alphas_{name}": by_layer for name, by_layer in self.alphas().items()}
        self.log(record)
        return record

    def bytes(self):
        s = self.settings
        return run_bytes(self.bitune, s.model, template=s.template, step=self.at)

    def save(self):
        if self.writes:
            os.fsync(self.file.fileno())                # a save is never ahead of its log
            state = state_bytes(self.bitune, self.optimizer, self.at)
            write_files(self.folder, {"state.safetensors": state, **self.bytes()})
        self.saved = self.at


# ----------------------------------------------------------------------------------------------------------
# How far a run has come

def read_settings(folder):
    """The settings of the run in a folder, and its derived numbers."""
    file = Path(folder) / "settings.json"
    saved = check_fields(read_json(file), file, {"settings": (dict, ...), "derived": (dict, ...)})
    if not {"data_hash", "dtype", "val_examples"} <= saved["derived"].keys():
        raise ValueError(f"{file} is damaged")
    return saved["settings"], saved["derived"]


def logged(path, step):
    """What a log says up to a step: later lines, of which the last may be torn, are of steps that were
    lost."""
    lines = path.read_text().splitlines() if step and path.exists() else []
    try:
        whole = map(json.loads, takewhile(lambda line: line.endswith("}"), lines))
        until = lambda record: record["step"] <= step and math.isfinite(record.get("val_loss", 0))
        return list(takewhile(until, whole))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{path} is damaged: expected a JSON object with a step on each line") from None


def finished(folder):
    """Whether a run has taken all of its steps, and has validated after the last one."""
    folder, steps = Path(folder), read_about(folder).get("step")
    if steps is None:
        return False
    settings, derived = read_settings(folder)
    validated = [r["step"] for r in logged(folder / "log.jsonl", steps) if "val_loss" in r]
    return steps == settings["steps"] and (not derived["val_examples"] or steps in validated)
