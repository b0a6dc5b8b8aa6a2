"""Zero-shot scores of a checkpoint, or of a run finetuned from it:

    python -m experiments.evaluate [--model FOLDER] [--adapter RUN] --task piqa --data FILE

The choice counts as right whose tokens have the highest log-probability after the prompt, summed (acc) or
divided by the characters of its text (acc_norm). gsm8k: an answer is written greedily until "Question:" or a
stop token; its number behind "#### " (strict-match), or its last number (flexible-extract), is compared with
the true one. Other answers must come out word for word (exact_match). DATA may be a folder of files, as MMLU
has one for each subject. A command that was stopped goes on where it was when it is repeated.
"""

import json
import math
import re
import time
from contextlib import suppress
from copy import copy
from inspect import getsourcefile
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch

from bitune import Bitune, nll, send
from cli.memory import ready_to_answer
from cli.process import command, work
from cli.settings import ASKED, SWITCH, Setting, new_parser, number, text, words
from cli.terminal import Progress, clock
from files.checkpoint import load_tokenizer, read_config
from files.disk import json_bytes, lock_file, write_file
from files.run import base_of, load_run, read_about
from lora import LoRA
from model import Llama, Past
from text.examples import TEMPLATES, batches, encode_answer, encode_prompt, joined, stop_id
from text.rows import TASKS, read_rows
from text.turns import learned_answers, parse_row
from text.words import digest, read_json

TOKENS = 4096           # at a time, if nothing else is said
SCORED = [task for task in TASKS if task != "ultrafeedback"]


class Question(NamedTuple):
    shown: dict             # what its result begins with: place in the file, prompt, choices, right answer
    prompt: list            # ids
    choices: list           # lists of ids; none if the answer is to be written
    template: str = "plain"


def rows_of(path, task, limit):
    """The first `limit` rows of a file, or of each file in a folder, as (place, row)."""
    path, ends = Path(path), (".csv", ".json", ".jsonl")
    for file in sorted(f for f in path.iterdir() if f.suffix.lower() in ends) if path.is_dir() else [path]:
        for place, row in islice(read_rows(file, task), limit):
            yield place if file == path else f"{file.name}, {place}", row


def load_questions(path, task, tokenizer, template, longest, limit=None, twice=False):
    """The questions of rows, and the places of those left out, whose prompt with the longest choice, or one
    token of an answer, has more than `longest` tokens. twice: each prompt's text comes a second time."""
    questions, left_out = [], []
    for place, row in rows_of(path, task, limit):
        try:
            parsed = parse_row(row)
            (*turns, last), input, texts = parsed.turns, parsed.input, parsed.choices
            answer = parsed.right if texts else last.text
            if learned_answers(parsed)[-1] < len(turns) or answer == "":
                raise ValueError("it has no answer and no choices to score")
            if twice:
                whole = joined(turns[-1:], input)
                turns[-1], input = turns[-1]._replace(text=f"{whole}\n\n{whole}"), ""
            prompt = encode_prompt(tokenizer, template, turns, input)
            choices = [encode_answer(tokenizer, template, text)[:-1] for text in texts]     # without stop
            if [] in choices:
                raise ValueError(f"choice {choices.index([]) + 1} has no tokens to score")
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from None
        if len(prompt) + max(map(len, choices), default=1) > longest:
            left_out.append(place)
            continue
        shown = {"place": place, "prompt": joined(turns, input), "answer": answer}
        questions.append(Question(shown | ({"choices": texts} if texts else {}), prompt, choices, template))
    if not questions:
        raise ValueError(f"{path}: no question left, {len(left_out)} are longer than {longest} tokens")
    if len({bool(q.choices) for q in questions}) > 1:
        raise ValueError(f"{path}: some rows have choices and some have not: expected one kind")
    return questions, left_out


@torch.inference_mode()
def log_probs(bitune, prompts, choices):
    """Of each prompt's choices, lists of ids, the log-probabilities, sums over their tokens.
    FloatingPointError if one is not finite."""
    if not bitune.passes:           # plain causal reading: the same numbers, when the context is read first
        bitune = copy(bitune)
        bitune.passes = [("causal", bitune.answer_set)]
    past = bitune.encode(bitune.lay_out(prompts, [[]] * len(prompts))[0])           # once for all choices
    asked, choice = zip(*((row, ids) for row, group in enumerate(choices) for ids in group))
    if past is not None:
        rows = send(asked, bitune.device)
        past = Past([(k[rows], v[rows]) for k, v in past.layers], past.positions[rows])
    sums = -bitune.score([prompts[row] for row in asked], choice, nll, past).sum(1)
    if not sums.isfinite().all():
        raise FloatingPointError(f"the log-probability of a choice is {sums[~sums.isfinite()][0]}")
    return [group.tolist() for group in sums.split([*map(len, choices)])]


def write_answers(bitune, tokenizer, prompts, stop_ids, max_new_tokens, end=None):
    """What greedy decoding writes after the prompts, up to a text `end`, a stop token or the limit."""
    if len(prompts) > 1 and max(map(len, prompts)) + max_new_tokens > bitune.model.config.max_length:
        alone = ([p] for p in prompts)                          # each up to its own limit
        return [write_answers(bitune, tokenizer, p, stop_ids, max_new_tokens, end)[0] for p in alone]
    said, ended = [[] for _ in prompts], [False] * len(prompts)
    for step in bitune.answer(prompts, max_new_tokens, stop_ids):
        for b, token in enumerate(step):
            said[b] += [] if ended[b] or token is None else [token]
            ended[b] = ended[b] or token is None or bool(end) and end in tokenizer.decode(said[b][-16:])
        if all(ended):
            break
    return [tokenizer.decode(ids).split(end)[0] if end else tokenizer.decode(ids) for ids in said]


def score_choices(question, sums):
    by_length = [s / max(1, len(text)) for s, text in zip(sums, question.shown["choices"])]
    return {name: float(values.index(max(values)) == question.shown["answer"])
            for name, values in (("acc", sums), ("acc_norm", by_length))}


def score_gsm8k(question, said):
    def bare(number):
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
            number = re.sub(pattern, "", number)
        return number.lower()

    strict = re.findall(r"#### (-?[0-9.,]+)", said)[:1]
    last = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", said)[-1:]
    return {name: float([*map(bare, found)] == [bare(question.shown["answer"])])
            for name, found in (("strict-match", strict), ("flexible-extract", last))}


def score_text(question, said):
    form = TEMPLATES[question.template]                 # which knows what of an answer are thoughts
    bare = lambda text: form.thoughts_and_words(text)[1].strip()
    return {"exact_match": float(bare(said) == bare(question.shown["answer"]))}


def mean_scores(results):
    """Each metric's mean and its standard error (0 for a sample of one, which has none)."""
    error = lambda values: stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    metrics = [key for key, value in results[0].items() if isinstance(value, float)]
    columns = {metric: [result[metric] for result in results] for metric in metrics}
    return {name: {"mean": fmean(values), "stderr": error(values)} for name, values in columns.items()}


def evaluate(args, bitune, tokenizer, questions, stop_ids, progress, kept):
    """Every question's result, as a line of the JSONL file, in the file's order. `kept` holds those of an
    earlier try, and gets each batch's as it comes."""
    begun, before, n = time.monotonic(), len(kept), len(questions)
    length = lambda q: (len(q.prompt), sum(map(len, q.choices)) or args.max_new_tokens)
    for batch in batches(questions, args.batch_size, TOKENS, length):
        if all(q.shown["place"] in kept for q in batch):
            continue
        _, prompts, choices, _ = zip(*batch)
        if choices[0]:
            kind, points, found = "log_probs", score_choices, log_probs(bitune, prompts, choices)
        else:
            end = "Question:" if args.task == "gsm8k" else None
            kind, points = "said", score_gsm8k if end else score_text
            found = write_answers(bitune, tokenizer, prompts, stop_ids, args.max_new_tokens, end)
        kept.add([q.shown | {kind: said} | points(q, said) for q, said in zip(batch, found)])
        rate = (len(kept) - before) / (time.monotonic() - begun)
        progress.update(f"{args.task}: {len(kept)}/{n}  ETA {clock((n - len(kept)) / rate)}  "
                        f"{rate:.1f} questions/s")
    progress.clear()
    return [kept[q.shown["place"]] for q in questions]


class Kept(dict):
    """Results by place, which lie in a file, too: those of an earlier try are there again. InUse if another
    process is writing it."""

    def __init__(self, path, questions):
        super().__init__()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.questions = lock_file(path, "is being scored by another process"), questions
        for line in self.file.read().splitlines():
            with suppress(ValueError, TypeError, KeyError):     # torn as it was written
                result = json.loads(line)
                self[result["place"]] = result

    def add(self, results):
        self.update((result["place"], result) for result in results)
        self.file.write("".join(f"\n{json.dumps(result)}" for result in results))     # behind a torn line
        self.file.flush()

    def where(self):
        return f"{len(self)} of {self.questions} questions"

    def how_to_go_on(self):
        return "The same command goes on there."


class CausalOnly(Bitune):
    """α = 0: the answer reads what the first pass has left, the causal one."""

    def mix(self, read, positions):
        return read[0]


SCORING = ASKED | {
    "task": Setting("what the file is", words(*SCORED) | {"required": True}),
    "data": Setting("the questions, as published: JSONL, or MMLU's CSV; or a folder of such files",
                    text("FILE", required=True)),
    "limit": Setting("only the first N questions (of each file)", number(int, 1, 10**9) | text("N")),
    "batch_size": Setting(f"questions at a time (default: of {TOKENS} tokens)", number(int, 1)),
    "forced_causal": Setting("with α = 0: what does the second reading add?", SWITCH),
    "twice": Setting("each prompt's text twice: what does repeating it add?", SWITCH),
    "samples": Setting("also a page of the first N questions, to be read", number(int, 1) | text("N")),
    "out": Setting("where results go (default: the run, or runs/base/NAME)", text("FOLDER")),
}


def scored(args, base, *parts):
    """A few letters that stand for all that scores hang on: the questions and other parts, the flags, the
    weights and what computes with them."""
    flags = "task", "max_new_tokens", "dtype", "device", "forced_causal"
    parts = [*parts, *(getattr(args, flag) for flag in flags), read_config(base)]
    for folder in filter(None, (base, args.adapter)):
        files = (f for f in sorted(Path(folder).rglob("*.safetensors")) if f.name != "state.safetensors")
        parts.append([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    code = [Path(getsourcefile(of)).read_bytes() for of in (Llama, LoRA, Bitune)]
    return digest(parts + code)[:8]


def score(args, progress):
    """The file of a model's scores, its summary, and every question's result; those that are there, if they
    are of the same. Failed if the work goes wrong; what is scored by then is kept."""
    if not (args.model or args.adapter):
        raise ValueError("neither --model nor --adapter given: expected a checkpoint, or a run")
    own = args.adapter or read_about(args.model).get("whole") and args.model
    about, base = read_about(own) if own else {}, args.model or base_of(args.adapter)
    template, tokenizer = about.get("template", "paper"), load_tokenizer(base)
    stop_ids = tokenizer.stop_ids | {stop_id(tokenizer, template)}
    questions, left_out = load_questions(args.data, args.task, tokenizer, template,
                                         read_config(base).max_length, args.limit, args.twice)
    folder = Path(args.out or own or Path("runs/base") / Path(args.model).resolve().name)
    letters = scored(args, base, questions, left_out, sorted(stop_ids))
    file = folder / f"{args.task}-{Path(args.data).resolve().stem}-{letters}.json"
    lines = file.with_suffix(".jsonl")
    if file.exists():
        return file, read_json(file), [*map(json.loads, lines.read_text().splitlines())]

    bitune, _, _, _ = load_run(args.adapter, args.model, args.device, args.dtype)
    if args.forced_causal and not bitune.mixes:
        raise ValueError(f"method {bitune.method} mixes nothing: there is no α to set to 0")
    bitune = bitune.twin(CausalOnly) if args.forced_causal else bitune
    kept, begun = Kept(file.with_suffix(".part"), len(questions)), time.monotonic()
    if kept:
        progress.note(f"{kept.where()} are from an earlier try")
    with work(kept, "--batch-size"), kept.file:
        ready_to_answer(bitune)
        results = evaluate(args, bitune, tokenizer, questions, stop_ids, progress, kept)
        summary = {**vars(args), "method": bitune.method if about else None, "step": about.get("step"),
                   "template": template, "questions": len(results), "left_out": left_out,
                   "seconds": round(time.monotonic() - begun, 1), "scores": mean_scores(results)}
        write_file(lines, "".join(json.dumps(r) + "\n" for r in results).encode())
        write_file(file, json_bytes(summary))
        file.with_suffix(".part").unlink()
    return file, summary, results


def page(results):
    """Questions, what was said, the truth and the verdicts, as Markdown."""
    parts = []
    for n, result in enumerate(results, 1):
        verdicts = ", ".join(f"{k} {'✓' if v else '✗'}" for k, v in result.items() if isinstance(v, float))
        said = [key for key in ("prompt", "choices", "said", "answer") if key in result]
        parts += [f"## {n}. {verdicts}", *(f"{key}:\n~~~\n{result[key]}\n~~~" for key in said)]
    return "\n\n".join(parts) + "\n"


@command
def main(argv=None):
    args = new_parser(__doc__, SCORING).parse_args(argv)
    file, summary, results = score(args, Progress())
    out = summary["left_out"]
    beyond = f", {len(out)} too long left out, first: {out[0]}" if out else ""
    scores = ", ".join(f"{name} {of['mean']:.2%} ± {of['stderr']:.2%}"
                       for name, of in summary["scores"].items())
    print(f"{args.task}: {scores} ({summary['questions']} questions{beyond}, {clock(summary['seconds'])})")
    written = [file, file.with_suffix(".jsonl")]
    if args.samples:
        written.append(file.with_suffix(".md"))
        write_file(written[2], page(results[:args.samples]).encode())
    print(f"wrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
