"""Rows of a data file to examples: prompt ids and answer ids.

A row is put into words by a template, and its prompt and answer are encoded apart: where the prompt ends is
a matter of ids and never of text.
"""

import math
import random
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from text.chat import CHATS, is_control, own_chat
from text.rows import read_rows
from text.turns import Unusable, learned_answers, parse_row
from text.words import listed


class Example(NamedTuple):
    prompt: list        # token ids, BOS first where the model has one
    answer: list        # token ids, the stop token last


def joined(turns, input=""):
    """The texts of all turns, and of the field beside the question, with blank lines between."""
    return "\n\n".join(text for text in [*(turn[1] for turn in turns), input] if text)


def alpaca(turns, input=""):
    context = ", paired with an input that provides further context" if input else ""
    field = f"### Input:\n{input}\n\n" if input else ""
    return [f"Below is an instruction that describes a task{context}. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{joined(turns)}\n\n{field}### Response:\n"]


class Words(NamedTuple):
    """A template of words alone: see chat.Markup."""
    prompt: object
    said: object = str
    end: str | None = None      # the tokenizer's own
    thinks: bool = False


TEMPLATES = {
    "paper": Words(lambda *asked: [f"Question: {joined(*asked)}\n\nAnswer:"], " {}".format),
    "alpaca": Words(alpaca),
    "plain": Words(lambda *asked: [joined(*asked)]),
    **CHATS,
}


def template_named(template, tokenizer, otherwise):
    """The name in TEMPLATES that a word of --template stands for: "chat" is the model's own chat markup, and
    so is "auto", or the template `otherwise` if that is none of the known ones."""
    if template not in ("auto", "chat"):
        return template
    try:
        return own_chat(tokenizer)
    except ValueError as problem:
        if template == "chat":
            raise ValueError(f"--template chat: {problem}; choose another template") from None
        return otherwise


def template_in_words(template, tokenizer):
    try:
        own = own_chat(tokenizer)
    except ValueError as problem:
        return f"template {template}: {problem}"
    other = f" is {own}" if own != template else CHATS[own].note
    return f"template {template}: the model's own chat markup{other}"


def special_id(tokenizer, name):
    if name not in tokenizer.special:
        raise ValueError(f"the tokenizer has no special token {name}: choose a template without it")
    return tokenizer.special[name]


def stop_id(tokenizer, template):
    """The token that ends an answer under a template."""
    if end := TEMPLATES[template].end:
        return special_id(tokenizer, end)
    if tokenizer.eos_id is None:
        raise ValueError("no stop token: expected eos_token_id in the model's config.json")
    return tokenizer.eos_id


def encode_prompt(tokenizer, template, turns, input="", encode=None):
    """The ids of a prompt: BOS if there is one, then the template's pieces. (A chat markup has its own.) The
    texts between two control tokens are encoded as one, with `encode`, as the tokenizers library has it."""
    form, begin = TEMPLATES[template], True
    refuse_thoughts(form, *(turn[2] for turn in turns if turn[2:]))
    if template in CHATS:
        if not turns or turns[-1][0] != "user":
            raise Unusable("an answer to nobody: expected a turn of the user's before it")
        ids, pieces = [], form.prompt([*turns[:-1], ("user", joined(turns[-1:], input))])
    else:
        ids, pieces = [] if tokenizer.bos_id is None else [tokenizer.bos_id], form.prompt(turns, input)
    for control, run in groupby(pieces, lambda piece: is_control(piece, tokenizer)):
        if control:
            ids += [special_id(tokenizer, piece) for piece in run]
        else:
            ids += (encode or tokenizer.encode)("".join(run), begin)
        begin = None                    # what follows stands behind a control token
    return ids


def encode_answer(tokenizer, template, answer, thoughts=None):
    """The ids of an answer, which goes on behind the prompt, and its stop token."""
    form = TEMPLATES[template]
    refuse_thoughts(form, thoughts)
    said = form.said(answer, thoughts) if form.thinks else form.said(answer)
    begin = None if is_control(form.prompt([("user", "")])[-1], tokenizer) else False
    return tokenizer.encode(said, begin) + [stop_id(tokenizer, template)]


def refuse_thoughts(form, *thoughts):
    if any(thoughts) and not form.thinks:
        raise Unusable("'reasoning_content', for which the template has no place")


def load_examples(path, tokenizer, template, max_length, task="rows"):
    """Examples of at most max_length tokens from a data file of a task (see `rows.TASKS`), and what cannot
    be used, answer by answer: reason -> [how many, where the first is]. ValueError if the file is broken,
    with the line, or if no example is left."""
    examples, dropped = [], {}
    for place, row in read_rows(path, task):
        for found in encode_row(row, tokenizer, template, max_length):
            if isinstance(found, Example):
                examples.append(found)
            else:
                dropped.setdefault(found, [0, place])[0] += 1
    if not examples:
        why = dropped_in_words(dropped) or "none, it has no rows"
        raise ValueError(f"{path}: no example left; dropped: {why}")
    return examples, dropped


def load_data(s, tokenizer):
    """The examples that settings name, those for validation, and what was dropped of each file."""
    examples, dropped = load_examples(s.data, tokenizer, s.template, s.max_length, s.task)
    if s.val_data:
        val, more = load_examples(s.val_data, tokenizer, s.template, s.max_length, s.task)
        return examples, val, {s.data: dropped, s.val_data: more}
    n = len(examples) - min(s.val_size, len(examples) // 10)
    return examples[:n], examples[n:], {s.data: dropped}


def encode_row(row, tokenizer, template, max_length):
    """Of each answer in a row that is there to be learned: its Example, or the reason why it has none."""
    encode = lru_cache(maxsize=None)(tokenizer.encode)          # what the prompts share is encoded once
    beyond = False
    try:
        row = parse_row(row)
        learned = learned_answers(row)
    except Unusable as problem:
        yield str(problem)
        return
    for i in learned:
        turns, answer = row.turns[:i], row.turns[i]
        try:
            if not (row.input or any(turn.text.strip() for turn in turns)):
                raise Unusable("empty")
            if not answer.text.strip():
                raise Unusable("no answer")
            if template not in CHATS and row.start is None and i < len(row.turns) - 1:
                raise Unusable("an earlier answer, which is learned by chat markup alone")
            if not beyond:
                prompt = encode_prompt(tokenizer, template, turns, row.input, encode)
                beyond = len(prompt) >= max_length              # and so are all later ones
            said = [] if beyond else encode_answer(tokenizer, template, answer.text, answer.thoughts)
            if beyond or len(prompt) + len(said) > max_length:
                raise Unusable("too long")
            yield Example(prompt, said)
        except Unusable as problem:
            yield str(problem)


def dropped_in_words(dropped):
    return listed([f"{n} {reason} (first: {place})" for reason, (n, place) in dropped.items()])


@lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def draw(n, count, seed, step):
    """The `count` examples, of n, that a step trains on: it follows from the step alone, so a resumed run
    goes on where it was. Every epoch has its own order."""
    return [shuffled(n, seed, i // n)[i % n] for i in range(step * count, (step + 1) * count)]


def length(example):
    return len(example.prompt) + len(example.answer)


def batches(examples, size=None, tokens=math.inf, length=lambda e: (len(e.prompt), len(e.answer))):
    """Examples cut into batches of similar length, the longest first: of `size` examples, or else as large
    as `tokens` with padding allow (one example, if need be), where a quarter of these is padding at most.
    Prompts and answers are padded each by themselves; `length` gives both."""
    examples = sorted(examples, key=lambda e: sum(length(e)), reverse=True)
    if size:
        return [examples[i:i + size] for i in range(0, len(examples), size)]
    cut, batch = [], []
    for example in examples:
        prompts, answers = zip(*map(length, [*batch, example]))
        padded = (len(batch) + 1) * (max(prompts) + max(answers))
        if batch and (padded > tokens or padded - sum(prompts + answers) > padded / 4):
            cut.append(batch)
            batch = []
        batch.append(example)
    return cut + [batch] if batch else cut
