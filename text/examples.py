"""Rows of a data file to examples: prompt ids and answer ids.

A row is put into words by a template, and its prompt and answer are encoded apart: where the prompt ends is
a matter of ids and never of text.
"""

import math
import random
from functools import lru_cache
from itertools import accumulate, chain, groupby
from typing import NamedTuple

from text.chat import CHATS, Markup, is_control, own_chat
from text.rows import read_rows
from text.turns import Unusable, learned_answers, parse_row
from text.words import listed

MAX_LENGTH = 512        # tokens of an example, as in the paper, where the model reads so many


class Example(NamedTuple):
    prompt: list        # token ids, BOS first where the model has one
    answer: list        # token ids, the stop token last


def joined(turns, input=""):
    """The texts of all turns, and of the field beside the question, with blank lines between."""
    return "\n\n".join(text for text in [*(turn[1] for turn in turns), input] if text)


ALPACA = Markup("Below is an instruction that describes a task. Write a response that appropriately "
                "completes the request.\n\n### Instruction:\n{}\n\n### Response:\n", "{}")
CONTEXT = "a task, paired with an input that provides further context."     # what Alpaca says of an input
TEMPLATES = {"paper": Markup("Question: {}\n\nAnswer:", " {}"), "alpaca": ALPACA,
             "plain": Markup("{}", "{}"), **CHATS}


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
    end = TEMPLATES[template].end
    if not end and tokenizer.eos_id is None:
        raise ValueError("no stop token: expected eos_token_id in the model's config.json")
    return special_id(tokenizer, end) if end else tokenizer.eos_id


def encode_prompt(tokenizer, template, turns, input="", encode=None):
    """The ids of a prompt: BOS if there is one, then the template's pieces. (A chat markup has its own.) The
    texts between two control tokens are encoded as one, with `encode`, as the tokenizers library has it."""
    form, begin, ids = TEMPLATES[template], True, []
    turns = [(role, form.thoughts_and_words(text, *more[:1])[1] if role == "assistant" else text)
             for role, text, *more in turns]
    if template in CHATS:
        if not turns or turns[-1][0] != "user":
            raise Unusable("an answer to nobody: expected a turn of the user's before it")
        turns = [*turns[:-1], ("user", joined(turns[-1:], input))]
    else:
        ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        asked = joined(turns, input)
        if template == "alpaca" and input:
            form = form._replace(user=form.user.replace("a task.", CONTEXT))
            asked = f"{joined(turns)}\n\n### Input:\n{input}"
        turns = [("user", asked)]
    for control, run in groupby(form.prompt(turns), lambda piece: is_control(piece, tokenizer)):
        if control:
            ids += [special_id(tokenizer, piece) for piece in run]
        else:
            ids += (encode or tokenizer.encode)("".join(run), begin)
        begin = None                    # what follows stands behind a control token
    return ids


def encode_answer(tokenizer, template, answer, thoughts=None):
    """The ids of an answer, which goes on behind the prompt, and its stop token."""
    form = TEMPLATES[template]
    begin = None if is_control(form.prompt([("user", "")])[-1], tokenizer) else False
    return tokenizer.encode(form.said(answer, thoughts), begin) + [stop_id(tokenizer, template)]


def examples_by_row(path, tokenizer, template, max_length, task="rows"):
    """Examples of at most max_length tokens from a data file of a task (see `rows.TASKS`), a list for each
    row; and what was dropped, answer by answer: reason -> [how many, where the first is]. ValueError if no
    example is left."""
    rows, dropped = [], {}
    for place, row in read_rows(path, task):
        rows.append([])
        for found in encode_row(row, tokenizer, template, max_length):
            if isinstance(found, Example):
                rows[-1].append(found)
            else:
                dropped.setdefault(found, [0, place])[0] += 1
    if not any(rows):
        raise ValueError(f"{path}: no example left; dropped: {dropped_in_words(dropped)}")
    return rows, dropped


def load_examples(*args):
    """The same in one list."""
    rows, dropped = examples_by_row(*args)
    return [*chain(*rows)], dropped


def load_data(s, tokenizer):
    """The examples that settings name, those for validation, and what was dropped of each file."""
    rows, dropped = examples_by_row(s.data, tokenizer, s.template, s.max_length, s.task)
    examples = [*chain(*rows)]
    if s.val_data:
        val, more = load_examples(s.val_data, tokenizer, s.template, s.max_length, s.task)
        return examples, val, {s.data: dropped, s.val_data: more}
    n = len(examples) - min(s.val_size, len(examples) // 10)
    n = next(end for end in accumulate(map(len, rows)) if end >= n)     # a conversation is on one side
    return examples[:n], examples[n:], {s.data: dropped}


def encode_row(row, tokenizer, template, max_length):
    """Of each answer in a row that is there to be learned: its Example, or the reason why it has none."""
    encode = lru_cache(maxsize=None)(tokenizer.encode)          # what the prompts share is encoded once
    try:
        row, prompt = parse_row(row), []
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
            if len(prompt) < max_length:            # else all later ones are too long as well
                # The answer first: where it is refused, the prompt stays short, and the next one is tried.
                said = encode_answer(tokenizer, template, answer.text, answer.thoughts)
                prompt = encode_prompt(tokenizer, template, turns, row.input, encode)
            if len(prompt) + len(said) > max_length:
                raise Unusable("too long")
            yield Example(prompt, said)
        except Unusable as problem:
            yield str(problem)


def dropped_in_words(dropped):
    return listed([f"{n} {reason} (first: {place})" for reason, (n, place) in dropped.items()]) or \
        "none, it has no rows"


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
    as `tokens` with padding allow (one example, if need be), a quarter of it padding at most. Prompts and
    answers are padded each by themselves; `length` gives both."""
    examples = sorted(examples, key=lambda e: sum(length(e)), reverse=True)
    if size:
        return [examples[i:i + size] for i in range(0, len(examples), size)]
    cut = []
    for example in examples:
        prompts, answers = zip(*map(length, [*(cut[-1] if cut else []), example]))
        padded = len(prompts) * (max(prompts) + max(answers))
        if not cut or padded > tokens or padded - sum(prompts + answers) > padded / 4:
            cut.append([])
        cut[-1].append(example)
    return cut
