"""Finetune a public checkpoint with Bitune, or with any of its ablations:

    python train.py --model FOLDER --data FILE --out RUN [--method bitune]

The defaults are the paper's (2405.14862). Without --model and --data it trains the demonstration's model.
Several cards train one run: torchrun --standalone --nproc-per-node N train.py ...
"""

import math
import time
from collections import defaultdict
from contextlib import ExitStack
from functools import partial

import torch

from bitune import Bitune, adapter_sets, nll, send
from cli.cards import add_up, apart, first, in_turn, least, processes, share, sums
from cli.memory import tokens_that_fit
from cli.process import command, signals, work
from cli.settings import check, options, settings_of, typed
from cli.terminal import Progress
from files.checkpoint import load_base
from files.disk import locked
from files.run import Run, load_bitune
from lora import KINDS, add_adapter
from text.examples import MAX_LENGTH, batches, draw, length, load_data, template_named


# ----------------------------------------------------------------------------------------------------------
# The pieces: each can be used without the loop

def schedule(step, steps, warmup_steps):
    """The part of the peak learning rate: linear up to 1 over warmup_steps, then linear to 0 at `steps`."""
    if step < warmup_steps:
        return step / warmup_steps
    return (steps - step) / max(1, steps - warmup_steps)


def parameter_groups(bitune, lr, weight_decay):
    """All that trains, as AdamW takes it: `peak` is what the schedule multiplies. Weight decay is for
    matrices: not for norms, biases and other vectors, nor for the mixing."""
    groups = defaultdict(list)
    for name, p in bitune.named_parameters():
        if p.requires_grad:
            matrix = name.startswith("model.") and p.dim() > 1 and not name.endswith("ia3_l")
            peak, decay = lr, weight_decay if matrix else 0.0      # a rate of its own for a name goes here
            groups[peak, decay].append(p)
    return [{"params": own, "peak": peak, "weight_decay": decay} for (peak, decay), own in groups.items()]


def make_optimizer(bitune, lr, eps, weight_decay):
    return torch.optim.AdamW(parameter_groups(bitune, lr, weight_decay), eps=eps, fused=True)


def train_step(bitune, optimizer, examples, cut, rate, clip):
    """One optimizer step on the mean of the examples' losses, in whatever micro-batches `cut` makes of them.
    rate: the part of the peak learning rate. Returns the loss and the norm of the gradient before clipping;
    FloatingPointError, with nothing changed, if either is not finite."""
    optimizer.zero_grad()
    total = torch.zeros((), device=bitune.device)
    for batch in cut(share(examples)):
        loss = bitune.losses(*zip(*batch)).sum() / len(examples)
        loss.backward()
        total = total + loss.detach()
    trained = [p for p in bitune.parameters() if p.requires_grad]
    add_up(total, trained)
    norm = torch.nn.utils.clip_grad_norm_(trained, clip)
    total, norm = torch.stack([total, norm]).tolist()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise FloatingPointError(f"the loss is {total} and the gradient norm {norm}")
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    optimizer.step()
    return total, norm


@torch.inference_mode()
def validate(bitune, examples, cut, show=lambda text: None):
    """The `loss` as in training (the mean over examples of their means), the `perplexity` of an answer
    token, `accuracy`, the part of the answer tokens that are the likeliest given the right ones before, and
    `exact_match`, the part of the answers of which all are. FloatingPointError if a loss is not finite."""
    bitune.eval()
    measure = lambda logits, labels: torch.stack((nll(logits, labels), logits.argmax(-1) == labels), dim=-1)
    totals, done, mine = [0.0] * 5, 0, share(examples)
    for batch in cut(mine):
        losses, hits = bitune.score(*zip(*batch), measure).unbind(-1)                       # (B, T') each
        n = send([len(e.answer) for e in batch], bitune.device)
        found = [(losses.sum(1) / n).sum(), losses.sum(), hits.sum(), n.sum(), (hits.sum(1) == n).sum()]
        totals = [a + b for a, b in zip(totals, torch.stack(found).tolist())]
        done += len(batch)
        show(f"validating {done}/{len(mine)}")
    bitune.train()
    means, nlls, right, count, exact = sums(*totals)
    if not math.isfinite(nlls):
        raise FloatingPointError(f"the validation loss is {nlls}")
    return {"loss": means / len(examples), "perplexity": math.exp(min(700, nlls / count)),
            "accuracy": right / count, "exact_match": exact / len(examples)}


# ----------------------------------------------------------------------------------------------------------
# The loop

def train(run, progress, heard=()):
    """Draw, step, log; save and validate when due. A signal that is heard ends it after the step in hand."""
    s, bitune, optimizer, examples = run.settings, run.bitune, run.optimizer, run.examples
    due = lambda every: run.at == s.steps or run.at % every == 0

    def validation():
        model = bitune if run.at or s.adapter else Bitune(bitune.model, "causal")   # untrained: the base
        result = validate(model, run.val, cut, progress.update)
        progress.validated(run, run.log_validation(result))

    run.write_settings(tokens=least(tokens_that_fit(bitune, examples, s)))
    cut = partial(batches, tokens=s.micro_batch_tokens)
    if run.val and due(s.eval_every) and run.at not in run.validated:   # at step 0, or cut short
        validation()
    for run.at in range(run.saved + 1, s.steps + 1):
        began = time.monotonic()
        batch = [examples[i] for i in draw(len(examples), s.batch_size, s.seed, run.at - 1)]
        rate = schedule(run.at - 1, s.steps, int(s.warmup * s.steps))
        loss, norm = train_step(bitune, optimizer, batch, cut, rate, s.clip)

        seconds = time.monotonic() - began
        record = {"loss": loss, "lr": s.lr * rate, "grad_norm": norm, "seconds": round(seconds, 4),
                  "tokens_per_s": round(sum(map(length, batch)) / seconds)}
        run.log(record)
        progress.step(run, record)

        validates, asked = bool(run.val) and due(s.eval_every), any(sums(bool(heard)))
        if validates or due(s.save_every) or asked:
            validate(bitune, [max(batch, key=length)], cut)     # raises if this step has ruined the model
            run.save()
        if asked and run.at < s.steps:
            raise KeyboardInterrupt
        if validates:
            validation()
    progress.finished(run)


# ----------------------------------------------------------------------------------------------------------
# The command

def prepare(s):
    """The Run that settings stand for, new or resumed; ValueError if anything is wrong with them."""
    whole, begun = KINDS[s.peft].trains_base, s.out if s.resume else s.adapter
    base = s.out if s.resume and whole else s.model         # what was finetuned in full is its own base
    model, tokenizer = load_base(base, s.device, "float32" if whole else s.dtype, s.base_bits)
    model.checkpointing = s.checkpointing
    s.template = template_named(s.template, tokenizer, otherwise="paper")
    s.max_length = s.max_length or min(MAX_LENGTH, model.config.max_length)
    model.config.check_length(s.max_length)
    examples, val, dropped = load_data(s, tokenizer)
    torch.manual_seed(s.seed)
    if begun:
        bitune, _, _ = load_bitune(model, begun, base, s.method, s.c)
    else:
        for name in adapter_sets(s.method):
            add_adapter(model, name, s.peft, s.targets or (), **options(s, name))
        bitune = Bitune(model, s.method, s.c)
    optimizer = make_optimizer(bitune, s.lr, s.eps, s.weight_decay)
    return Run(s, tokenizer, bitune, optimizer, examples, val, dropped, writes=first())


def finetune(s, progress):
    """Train the run that settings stand for. Failed if the work goes wrong."""
    with ExitStack() as held:
        with in_turn():
            check(s)
            if first():
                held.enter_context(locked(s.out))   # if another trains there, it shows before any loading
            run = prepare(s)
        apart()
        progress.begins(run)
        heard = held.enter_context(signals())
        with work(run, "--micro-batch-tokens", heard):
            train(run, progress, heard)


@command
def main(argv=None):
    with processes():
        with in_turn():
            s = settings_of(typed(argv, __doc__))
        finetune(s, Progress())


if __name__ == "__main__":
    main()
