"""Make the demonstration's base: a Llama of 187,000 parameters, pretrained on `language.document`s.

    python -m experiments.demo.pretrain --out FOLDER

Ordinary next-token training: every token of a text is predicted, facts and questions too. What a step
trains on follows from seed and step alone, so the same machine makes the same file again. It takes
some ten minutes. The shape and the tokenizer, a token for each word of the language, are the base's own.
"""

import random
import time
from pathlib import Path

import torch

from bitune import Bitune, nll, pad
from cli.process import command
from cli.settings import DEMO, Setting, new_parser, number, text
from cli.terminal import Progress, clock
from experiments.demo.language import AGAIN, KINDS, document, row
from files.checkpoint import parse_config
from files.disk import json_bytes, tensor_bytes, write_files
from model import Llama, may_attend
from text.examples import Example, batches, encode_answer, encode_prompt
from text.tokenizer import Tokenizer
from text.words import read_json
from train import schedule, validate

TOKENIZER = "tokenizer.model", "tokenizer_config.json"
BATCH, PEAK, WARMUP, FIRST_LESSON = 32, 2e-3, 100, 1 / 8     # the last: a part of the steps


def example(tokenizer, question, answer):
    return Example(encode_prompt(tokenizer, "paper", [("user", question)]),
                   encode_answer(tokenizer, "paper", answer))


def encode(tokenizer, turns):
    """A document as ids: each turn as a finetune would see it, after the one before."""
    examples = [example(tokenizer, *turn) for turn in turns]
    return examples[0].prompt[:1] + [i for e in examples for i in e.prompt[1:] + e.answer]  # a single <s>


def loss(model, texts):
    """The mean of -log p over every token but the first of each text."""
    ids, positions = pad(texts, 0, "cpu"), pad([range(len(t)) for t in texts], -1, "cpu")
    labels = pad([t[1:] + [-100] for t in texts], -100, "cpu")
    logits, _ = model(ids, positions, may_attend(positions, positions))
    return nll(logits, labels).sum() / (labels >= 0).sum()


def scores(model, tokenizer, n=300):
    """Exact match on unseen questions of each form: those that the base was pretrained on, and last the one
    that it was not, what somebody said whose name comes after the words."""
    rng, bare, found = random.Random("scores"), Bitune(model, "causal"), {}
    for kind in KINDS:
        for _ in range(n):
            facts, questions = kind(rng, rng.randint(3, 6))
            question, answer = rng.choice([q for q in questions if q[0] != AGAIN])
            found.setdefault(f"{kind.__name__} {question.split()[0]}", []).append(
                (f"{facts} {question}".strip(), answer))
    found["behind What"] = [tuple(row("behind", rng).values()) for _ in range(n)]
    return {form: validate(bare, [example(tokenizer, *turn) for turn in turns], batches)["exact_match"]
            for form, turns in found.items()}


def pretrain(out, steps, seed=1, shape={}):
    """Write the base that `steps` and `seed` make, in another `shape` if one is given, into a folder."""
    torch.set_num_threads(1)                    # so that sums are always taken in the same order
    torch.manual_seed(seed)
    config = read_json(Path(DEMO["model"]) / "config.json") | shape
    beside = {name: (Path(DEMO["model"]) / name).read_bytes() for name in TOKENIZER}
    write_files(out, beside | {"config.json": json_bytes(config)})
    model, tokenizer, progress = Llama(parse_config(config)), Tokenizer.from_pretrained(out), Progress()
    for name, p in model.named_parameters():
        if p.dim() > 1:                         # with smaller ones so narrow a model learns late or never
            std = 0.3 if "embed_tokens" in name else 0.8 / config["hidden_size"] ** 0.5
            torch.nn.init.normal_(p, 0, std)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    begun, average = time.monotonic(), None
    for step in range(steps):
        rng, first = random.Random(f"{seed}/{step}"), step < int(steps * FIRST_LESSON)
        now = loss(model, [encode(tokenizer, document(rng, first)) for _ in range(BATCH)])
        optimizer.zero_grad()
        now.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = PEAK * schedule(step, steps, WARMUP)
        optimizer.step()

        average = now.item() if average is None else 0.99 * average + 0.01 * now.item()
        eta = (time.monotonic() - begun) / (step + 1) * (steps - step - 1)
        progress.update(f"step {step + 1}/{steps}  ETA {clock(eta)}  loss {average:.3f}")
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            right = "  ".join(f"{form} {part:.0%}" for form, part in scores(model, tokenizer).items())
            progress.note(f"step {step + 1}: loss {average:.3f}  right: {right}")
    half = {name: p.half() for name, p in model.state_dict().items()}
    write_files(out, {"model.safetensors": tensor_bytes(half)})


FLAGS = {
    "out": Setting("where to write the base", text("FOLDER", required=True)),
    "steps": Setting(f"of {BATCH} documents", number(int, 1), 6000),
}


@command
def main(argv=None):
    args = new_parser(__doc__, FLAGS).parse_args(argv)
    if Path(args.out).exists():
        raise ValueError(f"--out {args.out} exists: choose another name")
    pretrain(args.out, args.steps)


if __name__ == "__main__":
    main()
