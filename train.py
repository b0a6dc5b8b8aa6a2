"""Finetune a public checkpoint with Bitune, or with any of its ablations:

    python train.py --model FOLDER --data FILE --out RUN [--method bitune]

The defaults are the paper's (2405.14862). Without --model and --data it is the README's demonstration, on
the base and data in experiments/demo, for which DEMO replaces some of them. A killed run loses nothing that
was saved and goes on with:

    python train.py --resume RUN
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
from contextlib import suppress
from itertools import chain, count, takewhile
from pathlib import Path

import torch

from bitune import METHODS, SECOND_MASKS, Bitune, adapter_sets, surprise
from lora import ADAPTERS, AdapterConfig, add_adapter
from lora import finish_writing, json_bytes, read_json, read_tensors, tensor_bytes, write_files
from model import Llama
from text.examples import TEMPLATES, batches, draw, load_examples
from text.rows import TASKS
from text.tokenizer import Tokenizer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAY_CHANGE = ("model", "data", "val-data", "micro-batch-size", "device")        # when a run is resumed

# Without --model and --data: the demonstration. Its files come with this repository.
HERE = os.path.relpath(Path(__file__).parent / "experiments/demo")
DEMO = {"model": f"{HERE}/base", "data": f"{HERE}/data/train.jsonl", "val_data": f"{HERE}/data/val.jsonl",
        "steps": 200, "batch_size": 32, "micro_batch_size": 32, "lr": 2e-2, "eval_every": 20}


# ----------------------------------------------------------------------------------------------------------
# Settings

def fail(message):
    """End with one line on standard error and exit status 2: the input was wrong, and no work has begun."""
    print("error:", *str(message).splitlines()[:1], file=sys.stderr)
    sys.exit(2)


def set_up_streams():
    """Let no α or byte that a terminal cannot show, or a pipe should not hold, end a run."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def number(kind, low, high=math.inf):
    """An argparse type: a number of `kind` within [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= min(high, sys.float_info.max):       # nan and inf are out of range, too
            limit = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: expected at least {low}{limit}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def new_parser(description):
    """An argument parser whose errors are one line, too."""
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=as_it_stands)
    parser.error = fail
    return parser


def make_parser():
    parser = new_parser(__doc__)

    def group(title):
        section = parser.add_argument_group(title)
        def add(name, *, help, default=None, **more):
            shown = "" if default is None else f" (default: {default})"
            section.add_argument(name, default=default, help=help + shown, **more)
        return add

    arg = group("what")
    arg("--model", metavar="FOLDER", help="base model: a Hugging Face checkpoint folder")
    arg("--data", metavar="FILE", help="training data: JSON Lines or a JSON list; see README for the rows")
    arg("--out", metavar="RUN", help="folder to write the run to")
    arg("--resume", metavar="RUN", help="go on with RUN from its last save, with its own settings; only "
        "these flags may be given with it: " + " ".join(f"--{k}" for k in MAY_CHANGE))

    arg = group("method")
    arg("--method", default="bitune", choices=METHODS, help="how the prompt is read: " + ", ".join(METHODS))
    arg("--second-mask", default="bidirectional", choices=SECOND_MASKS, help="what its second pass sees")
    arg("--theta-init", default=0.01, type=number(float, 1e-9, 1e9), help="c and first θ: the speed of α")
    arg("--peft", default="lora", choices=ADAPTERS, help="kind of adapters: lora, dora, ia3; or full: the "
        "base itself trains, at 16 bytes of memory a parameter, and a second set is a copy of its linears")
    arg("--rank", default=8, type=number(int, 1, 65536), help="rank of LoRA and DoRA")
    arg("--alpha", default=1.0, type=number(float, 0, 1e9), help="theirs, too: the scale is alpha / rank")
    arg("--dropout", default=0.0, type=number(float, 0, 0.99), help="theirs, before the low-rank part")
    arg("--targets", nargs="+", metavar="NAME", help="linears to adapt, or with --peft full to copy "
        "(default: all that end in _proj)")

    arg = group("data")
    arg("--task", default="rows", choices=TASKS, help="form of the data: rows of README's kinds, or a "
        "task's published files: " + ", ".join([*TASKS][1:]))
    arg("--template", default="paper", choices=TEMPLATES, help="words around prompt and answer")
    arg("--max-length", type=number(int, 2), help="longest example in tokens, longer ones are dropped "
        "(default: 512, or what the model can read)")
    arg("--val-data", metavar="FILE", help="validation data; without it the last examples of --data")
    arg("--val-size", default=1000, type=number(int, 0), help="how many of these, at most a tenth; 0: none")

    arg = group("optimisation")
    arg("--steps", default=3000, type=number(int, 1, 10**9), help="optimizer steps")
    arg("--batch-size", default=10, type=number(int, 1, 10**9), help="examples a step")
    arg("--micro-batch-size", default=1, type=number(int, 1), help="examples at a time (same result)")
    arg("--lr", default=3e-4, type=number(float, 0), help="peak learning rate")
    arg("--warmup", default=0.1, type=number(float, 0, 1), help="part of the steps in which the rate rises")
    arg("--clip", default=1.0, type=number(float, 1e-9), help="largest gradient norm")
    arg("--eps", default=1e-6, type=number(float, 1e-12), help="AdamW's epsilon")
    arg("--weight-decay", default=0.0, type=number(float, 0), help="AdamW's weight decay")
    arg("--seed", default=42, type=number(int, 0, 2**63 - 1), help="of adapters and order of examples")

    arg = group("running")
    arg("--eval-every", type=number(int, 1), help="steps between validations (default: a tenth of --steps)")
    arg("--save-every", type=number(int, 1), help="steps between saves (default: a tenth of --steps)")
    arg("--dtype", choices=DTYPES, help="of the base model (default: bfloat16 on a GPU, float32 on a CPU "
        "and with --peft full)")
    arg("--device", help="cpu, cuda or mps (default: cuda if there is one, else cpu)")
    return parser


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device):
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected cpu, cuda or mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"device {device!r} cannot be used: {str(problem).splitlines()[0]}") from None


def default_dtype(device):
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def load_base(folder, device=None, dtype=None):
    """The model of a checkpoint folder and its tokenizer, on the device (None: a GPU if there is one) in
    the dtype (a word of DTYPES; None: bfloat16 on a GPU, float32 on a CPU)."""
    device = device or default_device()
    check_device(device)
    dtype = DTYPES[dtype] if dtype else default_dtype(device)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: expected a Hugging Face checkpoint")
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Llama.from_pretrained(folder, dtype, device)
    if tokenizer.n_ids > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer's ids go up to {tokenizer.n_ids - 1}, but the model's "
                         f"vocabulary has {model.config.vocab_size} tokens: they do not belong together")
    return model, tokenizer


def load_run(run, model=None, device=None, dtype=None):
    """A run, or a PEFT adapter, on the base in the folder `model` (None: the run's own): the Bitune, the
    tokenizer, how many tensors the run holds, and its bitune.json. Without a run, the bare base (a fully
    finetuned one as the run that it is). device, dtype: as in `load_base`."""
    if not run and (Path(model) / "bitune.json").exists():
        run = model
    if not run:
        base, tokenizer = load_base(model, device, dtype)
        return Bitune(base, "lora").eval(), tokenizer, 0, {}
    run = Path(run)
    finish_writing(run)
    if not model and not (run / "bitune.json").exists():
        raise ValueError(f"--model not given, and {run} has no bitune.json that names it")
    if not model:                               # fully finetuned, a run is its own base
        model = run if (run / "config.json").exists() else read_json(run / "bitune.json", "base")["base"]
        if not Path(model).is_dir():
            raise ValueError(f"{run} was finetuned from {model}, which is not a folder here: give --model")
    base, tokenizer = load_base(model, device, dtype)
    bitune, tensors, about = Bitune.load(base, run, model)
    if (template := about.get("template", "plain")) not in TEMPLATES:
        raise ValueError(f"{run} has the template {template!r}: expected {' or '.join(TEMPLATES)}")
    return bitune.eval(), tokenizer, tensors, about


# ----------------------------------------------------------------------------------------------------------
# Training: each of these is used by the loop below, and can be used without it

def learning_rate(step, steps, warmup_steps, peak):
    """Linear from 0 to the peak over warmup_steps, then linear to 0 at `steps`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * (steps - step) / max(1, steps - warmup_steps)


def make_optimizer(bitune, eps, weight_decay):
    parameters = [p for p in bitune.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=eps, weight_decay=weight_decay, fused=True)


def train_step(bitune, optimizer, examples, micro_batch_size, lr, clip):
    """One optimizer step on the mean of the examples' losses, each of them a mean over its answer tokens.
    How the examples are cut into micro-batches does not change the result. Returns the loss and the norm of
    the gradient before clipping; FloatingPointError, with nothing changed, if either is not finite."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    total = 0.0
    for batch in batches(examples, micro_batch_size):
        loss = bitune.losses(*zip(*batch)).sum() / len(examples)
        loss.backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    total, norm = torch.stack([total, norm]).tolist()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise FloatingPointError(f"the loss is {total} and the gradient norm {norm}")
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return total, norm


@torch.inference_mode()
def evaluate(bitune, examples, batch_size, show=lambda text: None):
    """Validation: `loss` as in training (the mean over examples of their means), `perplexity` of an answer
    token, `accuracy`: the part of the answer tokens that are the likeliest, given the right ones before,
    `exact_match`: the part of the answers of which all are, which greedy decoding writes word for word.
    FloatingPointError if the loss is not finite. `show` is told how far it is."""
    bitune.eval()
    mean_sum = nll_sum = right = count = exact = done = 0.0
    for batch in batches(examples, batch_size):
        logits, labels = bitune(*zip(*batch))
        nll = surprise(logits, labels)
        n = (labels >= 0).sum(1)
        mean_sum += (nll.sum(1) / n).sum().item()
        nll_sum += nll.sum().item()
        hits = (logits.argmax(-1) == labels).sum(1)
        right += hits.sum().item()
        count += n.sum().item()
        exact += (hits == n).sum().item()
        done += len(batch)
        show(f"validating {done:.0f}/{len(examples)}")
    bitune.train()
    if not math.isfinite(nll_sum):
        raise FloatingPointError(f"the validation loss is {nll_sum}")
    return {"loss": mean_sum / len(examples), "perplexity": math.exp(min(700, nll_sum / count)),
            "accuracy": right / count, "exact_match": exact / len(examples)}


def state_bytes(bitune, optimizer, step):
    """The file with all that is needed to go on after `step` steps: one file, whole or absent."""
    tensors = {"step": torch.tensor(step), "rng": torch.get_rng_state()}
    if bitune.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(bitune.device)
    for name, p in bitune.named_parameters():
        if p.requires_grad:
            tensors[f"param.{name}"] = p
            tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return tensor_bytes(tensors)


def load_state(path, bitune, optimizer):
    """Put back what `state_bytes` holds; returns the number of steps done."""
    if not path.exists():
        raise ValueError(f"{path.parent} holds no save yet: start again, with the same --out")
    tensors = read_tensors(path)
    torch.set_rng_state(tensors["rng"])
    if "rng.cuda" in tensors and bitune.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], bitune.device)
    for name, p in bitune.named_parameters():
        if p.requires_grad:
            p.data.copy_(tensors[f"param.{name}"])
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in tensors]
            optimizer.state[p].update({k: tensors[f"{k}.{name}"].to(p.device) for k in keys})
    return int(tensors["step"])


class Progress:
    """One line that is rewritten in a terminal; in a pipe or file, a plain line every five seconds."""

    def __init__(self):
        self.live, self.shown = sys.stdout.isatty(), time.monotonic()

    def update(self, text, last=False):
        if self.live:
            fits = text if last else text[:shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{fits}", end="\n" if last else "", flush=True)
        elif last or time.monotonic() - self.shown > 5:
            print(text, flush=True)
            self.shown = time.monotonic()

    def clear(self):
        if self.live:
            print("\r\033[K", end="", flush=True)

    def note(self, text):
        """A line that stays."""
        self.clear()
        print(text, flush=True)

    def validated(self, what, result):
        self.note(f"{what}: validation loss {result['loss']:.4f}  perplexity {result['perplexity']:.2f}  "
                  f"answer-token accuracy {result['accuracy']:.1%}  exact match {result['exact_match']:.1%}")


def clock(seconds):
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"


# ----------------------------------------------------------------------------------------------------------
# The run

def prepare(args):
    """Everything that can go wrong, done before the work starts: model, data and settings, or ValueError."""
    if missing := [f"--{k}" for k in ("model", "data", "out") if not getattr(args, k)]:
        raise ValueError(f"{', '.join(missing)} not given: see --help")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a file: expected a folder, or a new name")
    for file in (args.data, args.val_data):
        if file is not None and not Path(file).is_file():
            found = "a folder" if Path(file).is_dir() else "not there"
            raise ValueError(f"{file!r} is {found}: expected a data file")
    if (made := Path(args.model) / "bitune.json").exists() and read_json(made).get("method") != "lora":
        raise ValueError(f"{args.model} is a run with prompt passes, which need more than its checkpoint: "
                         "expected a base model, or a run of method lora")
    if args.peft == "full" and args.dtype not in (None, "float32"):
        raise ValueError(f"--dtype {args.dtype}: --peft full trains the weights, which takes float32")
    dtype = "float32" if args.peft == "full" else args.dtype
    model, tokenizer = load_base(args.model, args.device, dtype)
    args.max_length = args.max_length or min(512, model.config.max_length)
    model.config.check_length(args.max_length)
    load = lambda path: load_examples(path, tokenizer, args.template, args.max_length, args.task)
    examples, dropped = load(args.data)
    if args.val_data:
        val, val_dropped = load(args.val_data)
        dropped = {"train": dict(dropped), "val": dict(val_dropped)}
    else:
        n = min(args.val_size, len(examples) // 10)
        examples, val = examples[:len(examples) - n], examples[len(examples) - n:]

    torch.manual_seed(args.seed)
    for name in adapter_sets(args.method):
        config = AdapterConfig(args.peft, args.rank, args.alpha, args.dropout, tuple(args.targets or ()))
        add_adapter(model, name, config)
    bitune = Bitune(model, args.method, args.theta_init, args.second_mask)
    return bitune, tokenizer, examples, val, dropped


def digest(examples):
    """A hash of the examples and their order."""
    h = hashlib.sha256()
    for e in examples:
        h.update(f"{e.prompt}{e.answer}".encode())
    return h.hexdigest()[:16]


def derive(args, bitune, examples, val, dropped):
    """The numbers that follow from the settings and the data, printed at the start and saved."""
    trainable = sum(p.numel() for p in bitune.parameters() if p.requires_grad)
    return {
        "device": str(bitune.device),
        "dtype": str(bitune.model.model.embed_tokens.weight.dtype).removeprefix("torch."),
        "frozen_parameters": sum(p.numel() for p in bitune.parameters()) - trainable,
        "trainable_parameters": trainable,
        "train_examples": len(examples), "val_examples": len(val), "dropped": dict(dropped),
        "prompt_tokens": sum(len(e.prompt) for e in examples),
        "answer_tokens": sum(len(e.answer) for e in examples),
        "data_hash": digest(examples + val),
        "epochs": round(args.steps * args.batch_size / len(examples), 2),
        "warmup_steps": int(args.warmup * args.steps),
        "eval_every": args.eval_every or max(1, args.steps // 10),
        "save_every": args.save_every or max(1, args.steps // 10),
    }


def memory(derived):
    """What a run needs before any activations, in words."""
    frozen, trained = derived["frozen_parameters"], derived["trainable_parameters"]
    size = frozen * DTYPES[derived["dtype"]].itemsize + 16 * trained
    size = f"{size / 1e9:.1f} GB" if size > 1e9 else f"{size / 1e6:.1f} MB"
    return (f"{size} for {frozen:,} frozen parameters and {trained:,} that train, these 16 bytes each "
            "(float32, gradient, AdamW's moments); activations come on top")


def open_run(args, derived):
    """The run's folder with its settings in it. ValueError if it holds one already, or the data changed."""
    out = Path(args.out)
    if args.resume:
        before = read_json(out / "settings.json", "derived")["derived"]
        if before["data_hash"] != derived["data_hash"]:
            raise ValueError(f"{args.data}, or the validation data, has changed since {out} began")
    elif any((out / f).exists() for f in ("adapter_config.json", "config.json")):
        raise ValueError(f"{out} already holds a run: go on with --resume {out}, or choose another --out")
    else:
        write_files(out, {"settings.json": json_bytes({"args": vars(args), "derived": derived})})
    return out


def given(argv):
    """The settings that the flags `argv` name themselves, defaults left away."""
    parser = make_parser()
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    return {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not None}


def resumed(parser, args, argv):
    """The settings of the run args.resume, with what was given of MAY_CHANGE. ValueError for other flags."""
    flags = given(argv)
    if more := {name.replace("_", "-") for name in flags} - {"resume", *MAY_CHANGE}:
        raise ValueError(f"--resume goes on with a run's own settings, which "
                         f"--{' --'.join(sorted(more))} would change")
    before = read_json(Path(args.resume) / "settings.json", "args")["args"]
    newer = vars(parser.parse_args([]))                             # flags that the run does not know
    return argparse.Namespace(**newer | before | flags | {"out": args.resume})


def logged(path, start):
    """What the log says up to the step `start`: later lines, of which the last may be torn, are of steps
    that were lost."""
    lines = path.read_text().splitlines() if start and path.exists() else []
    kept = takewhile(lambda line: line.endswith("}") and json.loads(line)["step"] <= start, lines)
    return "".join(line + "\n" for line in kept)


def finished(run):
    """Whether a run has taken all of its steps, and has validated after the last one."""
    finish_writing(run)
    if not (run / "bitune.json").exists():
        return False
    settings = read_json(run / "settings.json", "args", "derived")
    steps, validates = settings["args"]["steps"], settings["derived"]["val_examples"] > 0
    if read_json(run / "bitune.json").get("step") != steps:
        return False
    return not validates or f'"step": {steps}, "val_loss"' in logged(run / "log.jsonl", steps)


def train(args, bitune, optimizer, examples, val, derived, start, progress):
    """The loop: step, log, save, validate. A signal ends it after the step in hand, a second one at once."""
    out = Path(args.out)
    step = saved = start
    kept = logged(out / "log.jsonl", start)
    write_files(out, {"log.jsonl": kept.encode()})
    log = open(out / "log.jsonl", "a", buffering=1)

    asked, at_once = [], False         # signals so far, and whether nothing would be lost by stopping here

    def end(number, frame):
        asked.append(number)
        if at_once or len(asked) > 1:
            raise KeyboardInterrupt

    old = {s: signal.signal(s, end) for s in (signal.SIGINT, signal.SIGTERM)}

    def validate(model, what):
        nonlocal at_once
        at_once = True
        result = evaluate(model, val, args.micro_batch_size, progress.update)
        at_once = False
        progress.validated(what, result)
        print(json.dumps({"step": step, **{f"val_{k}": v for k, v in result.items()}}), file=log)

    try:
        # The longest micro-batch, for nothing: if memory is short, it shows now and not some night.
        with torch.random.fork_rng([bitune.device] if bitune.device.type == "cuda" else []):
            bitune.losses(*zip(*batches(examples, args.micro_batch_size)[0])).sum().backward()
        if val and not start:
            validate(Bitune(bitune.model, "lora"), "base model")        # B = 0: there are no adapters yet
        due = val and start and (start % derived["eval_every"] == 0 or start == args.steps)
        if due and f'"step": {start}, "val_loss"' not in kept:
            validate(bitune, f"step {start}")                           # which an interruption had cut short
        begun = time.monotonic()
        for step in range(start + 1, args.steps + 1):
            now = time.monotonic()
            batch = [examples[i] for i in draw(len(examples), args.batch_size, args.seed, step - 1)]
            lr = learning_rate(step - 1, args.steps, derived["warmup_steps"], args.lr)
            loss, norm = train_step(bitune, optimizer, batch, args.micro_batch_size, lr, args.clip)

            seconds = time.monotonic() - now
            rate = sum(len(e.prompt) + len(e.answer) for e in batch) / seconds
            eta = (time.monotonic() - begun) / (step - start) * (args.steps - step)
            record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "seconds": round(seconds, 4),
                      "tokens_per_s": round(rate)}
            line = (f"step {step}/{args.steps}  ETA {clock(eta)}  loss {loss:.3f}  lr {lr:.1e}  "
                    f"grad {norm:.2f}")
            if bitune.mixes:
                record["alpha_key"], record["alpha_value"] = (a.mean().item() for a in bitune.alpha())
                line += f"  α_K {record['alpha_key']:.2f}  α_V {record['alpha_value']:.2f}"
            print(json.dumps(record), file=log)
            progress.update(f"{line}  {rate:,.0f} tokens/s", last=step == args.steps)

            last = step == args.steps
            validates = bool(val) and (last or step % derived["eval_every"] == 0)
            if last or validates or asked or step % derived["save_every"] == 0:
                evaluate(bitune, batches(batch, 1)[0], 1)       # raises if this step has ruined the model
                write_files(out, {"state.safetensors": state_bytes(bitune, optimizer, step),
                                  **bitune.files(args.model, template=args.template, step=step)})
                saved = step
            if asked and not last:
                raise KeyboardInterrupt
            if validates:
                validate(bitune, f"step {step}")
        progress.note(f"saved {out} after {clock(time.monotonic() - begun)}; ask it: "
                      f"python sample.py --adapter {out}")
    except (FloatingPointError, OSError, ValueError, torch.OutOfMemoryError, KeyboardInterrupt) as problem:
        what = {FloatingPointError: f"{problem}: start again with a lower --lr",
                torch.OutOfMemoryError: f"{problem}: try a smaller --micro-batch-size",
                KeyboardInterrupt: "stopped by " + " and ".join(signal.Signals(n).name for n in asked)}
        progress.clear()
        rest = "Nothing was saved yet."
        if saved:
            rest = f"The save of step {saved} is whole: python train.py --resume {out}"
        print(f"error: step {step}: {what.get(type(problem), problem)}. {rest}", file=sys.stderr)
        sys.exit(128 + asked[0] if asked else 1)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
        with suppress(OSError):                 # a disk that is full has been reported
            log.close()


def settings(argv):
    """The flags `argv`, completed by DEMO if they name neither model nor data, or by those of the run that
    is resumed. ValueError for a run that is not there."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        finish_writing(Path(args.resume))
        return resumed(parser, args, argv)
    if not args.model and not args.data:
        parser.set_defaults(**DEMO, out=free_name("runs/demo"))
        args = parser.parse_args(argv)
    return args


def free_name(path):
    """`path`, or path-2, path-3 ..., whichever is not there yet."""
    names = chain([path], (f"{path}-{i}" for i in count(2)))
    return next(name for name in names if not Path(name).exists())


def begin(args):
    """A new run, or the one to be resumed, as `train` takes it: the model, its tokenizer, the optimizer, the
    examples to train on and to validate on, the derived numbers and how many steps are done. ValueError
    says what is wrong with the settings."""
    if args.out:
        finish_writing(Path(args.out))
    if args.resume and finished(Path(args.out)):
        raise ValueError(f"{args.out} is finished: all of its {args.steps} steps are done")
    bitune, tokenizer, examples, val, dropped = prepare(args)
    derived = derive(args, bitune, examples, val, dropped)
    out = open_run(args, derived)
    optimizer, start = make_optimizer(bitune, args.eps, args.weight_decay), 0
    if args.resume:
        start = load_state(out / "state.safetensors", bitune, optimizer)
    return bitune, tokenizer, optimizer, examples, val, derived, start


def main(argv=None):
    set_up_streams()
    try:
        args = settings(argv)
        bitune, tokenizer, optimizer, examples, val, derived, start = begin(args)
    except (ValueError, OSError, RuntimeError) as problem:      # RuntimeError: too large for the memory
        fail(problem)

    for title, values in (("settings", vars(args)), ("derived", derived)):
        words = [f"{k} {v}" for k, v in values.items() if v is not None]
        print(textwrap.fill(f"{title}: {', '.join(words)}", 110, subsequent_indent="  "))
    print(textwrap.fill(f"memory: {memory(derived)}", 110, subsequent_indent="  "))
    first = tokenizer.decode(examples[0].prompt)
    answer = tokenizer.decode(examples[0].prompt + examples[0].answer)[len(first):]
    print(f"first example, the answer it learns in [[ ]]:\n{first}[[{answer}]]", flush=True)
    train(args, bitune, optimizer, examples, val, derived, start, Progress())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:                   # while loading
        sys.exit(130)
