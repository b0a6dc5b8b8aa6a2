"""Rows of a data file to examples: prompt ids and answer ids.

A row is put into words by a template, prompt and answer are encoded apart and their ids joined, so that
where the prompt ends is a matter of ids and never of text. Training, evaluation and sampling all go through
`encode_prompt`.
"""

import math
import random
from functools import lru_cache
from typing import NamedTuple

from text.chat import CHATS, Special, check_turns, own_chat
from text.rows import Unusable, read_rows
from text.words import listed

PROMPT_KEYS = ("prompt", "instruction", "question")
ANSWER_KEYS = ("completion", "answer", "response", "output")
SYSTEM_KEYS = ("system", "system_prompt")


class TooLong(ValueError):
    """An example of more tokens than are wanted."""


class Example(NamedTuple):
    prompt: list        # token ids, BOS first where the model has one
    answer: list        # token ids, the stop token last


class Row(NamedTuple):
    turns: list         # (role, text), the last one asking
    input: str          # an optional second field: "input" or "context"
    answer: str


# ----------------------------------------------------------------------------------------------------------
# Templates: a row's turns and input to the pieces of a prompt, strings to encode and Special tokens

def joined(turns, input):
    """The texts of all turns, and of the second field where there is one, with blank lines between."""
    texts = [text for _, text in turns]
    return "\n\n".join([*texts, input] if input else texts)


def paper(turns, input):
    return [f"Question: {joined(turns, input)}\n\nAnswer:"]


def alpaca(turns, input):
    instruction = joined(turns, "")
    if input:
        return ["Below is an instruction that describes a task, paired with an input that provides further "
                "context. Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"]
    return ["Below is an instruction that describes a task. Write a response that appropriately completes "
            f"the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"]


def llama3(turns, input):
    role, _ = turns[-1]
    pieces = []
    for role, text in [*turns[:-1], (role, joined(turns[-1:], input))]:
        pieces += [Special("<|start_header_id|>"), role, Special("<|end_header_id|>"), "\n\n" + text.strip(),
                   Special("<|eot_id|>")]
    return pieces + [Special("<|start_header_id|>"), "assistant", Special("<|end_header_id|>"), "\n\n"]


def plain(turns, input):
    return [joined(turns, input)]


def chat(name):
    """A chat markup as a template: the second field follows the last turn's text."""
    def prompt(turns, input):
        check_turns(turns)
        return CHATS[name].prompt([*turns[:-1], ("user", joined(turns[-1:], input))])
    return prompt, CHATS[name].answer, CHATS[name].end


# name: (prompt, what an answer becomes, the stop token or None for the tokenizer's own)
TEMPLATES = {
    "paper":  (paper, lambda answer: " " + answer, None),
    "alpaca": (alpaca, str, None),
    "llama3": (llama3, str, "<|eot_id|>"),
    "plain":  (plain, str, None),
    **{name: chat(name) for name in CHATS},
}


def settle(template, tokenizer, otherwise):
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
    name = TEMPLATES[template][2]
    if name is None and tokenizer.eos_id is None:
        raise ValueError("no stop token: expected eos_token_id in the model's config.json")
    return special_id(tokenizer, name) if name else tokenizer.eos_id


def encode_prompt(tokenizer, template, turns, input=""):
    """The ids of a prompt: BOS if there is one, then the template's pieces. (A chat markup has its own.)"""
    ids = [] if tokenizer.bos_id is None or template in CHATS else [tokenizer.bos_id]
    for i, piece in enumerate(TEMPLATES[template][0](turns, input)):
        if isinstance(piece, Special):
            ids.append(special_id(tokenizer, piece))
        else:
            ids += tokenizer.encode(piece, begin=i == 0)
    return ids


def encode_answer(tokenizer, template, answer):
    """The ids of an answer, which continues the prompt, and its stop token."""
    return tokenizer.encode(TEMPLATES[template][1](answer), begin=False) + [stop_id(tokenizer, template)]


# ----------------------------------------------------------------------------------------------------------
# Rows

class Ambiguous(ValueError):
    """A row of which two columns say the same: not one row is wrong then, but the file."""


def parse_row(row):
    """A row in any of the known forms as a Row, its answer "" if it has none; or Unusable, Ambiguous."""
    if not isinstance(row, dict):
        raise Unusable(f"expected an object, got {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}       # null is absent

    def text(key):
        if not isinstance(row.get(key, ""), str):
            raise Unusable(f"{key!r} is {type(row[key]).__name__}, expected text")
        return row.get(key, "")

    def one_of(keys):
        given = [key for key in keys if key in row]
        if len(given) > 1:
            raise Ambiguous(f"it has {' and '.join(given)}, which say the same: expected one of them")
        return given[0] if given else None

    if "messages" in row:
        turns = read_turns("messages", row["messages"], "role", "content")
        if turns and turns[-1][0] == "assistant":
            return Row(turns[:-1], "", turns[-1][1])
        return Row(turns, "", "")
    if "conversations" in row:                      # ShareGPT's
        named = {"human": "user", "gpt": "assistant"}
        turns = read_turns("conversations", row["conversations"], "from", "value")
        messages = [{"role": named.get(role, role), "content": said} for role, said in turns]
        return parse_row({"messages": messages})
    prompt, answer = one_of(PROMPT_KEYS), one_of(ANSWER_KEYS)
    if prompt is None:
        raise Unusable(f"it has {listed(list(row), ', ') or 'nothing'}: expected messages, or one of "
                         f"{', '.join(PROMPT_KEYS)} with one of {', '.join(ANSWER_KEYS)} (or a --task)")
    if isinstance(row[prompt], list) and isinstance(row.get(answer), list):     # TRL's prompt and completion
        return parse_row({"messages": row[prompt] + row[answer]})
    system = one_of(SYSTEM_KEYS)
    turns = [(role, text(key)) for role, key in (("system", system), ("user", prompt)) if key and text(key)]
    if "choices" in row and "answer" in row:
        return Row(turns, text("input") or text("context"), row["choices"][right_choice(row)])
    return Row(turns, text("input") or text("context"), text(answer) if answer else "")


def read_turns(name, messages, role, content):
    """A list of messages as turns (role, text); a text may come in parts, of which all must be text."""
    def whole(value):
        return "".join(part["text"] for part in value) if isinstance(value, list) else value

    try:
        turns = [(m[role], whole(m[content])) for m in messages]
    except (TypeError, KeyError):
        turns = None
    if turns is None or not all(isinstance(part, str) for turn in turns for part in turn):
        raise Unusable(f"{name!r} is not a list of objects with the texts {role!r} and {content!r}")
    return turns


def right_choice(row):
    """The index of a multiple-choice row's answer, which is given as such or as its text."""
    choices, answer = row["choices"], row.get("answer")
    if not (isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices)):
        raise Unusable("'choices' is not a list of texts")
    index = choices.index(answer) if answer in choices else answer
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise Unusable(f"'answer' is {answer!r}: expected one of its {len(choices)} choices, or 0 to "
                         f"{len(choices) - 1}")
    return index


def load_examples(path, tokenizer, template, max_length, task="rows"):
    """Examples of at most max_length tokens from a data file of a task (see `rows.TASKS`), and the rows that
    cannot be used: reason -> [how many, where the first is]. ValueError if the file is broken, with the
    line, or if no example is left."""
    examples, dropped = [], {}

    def drop(problem):
        reason = str(problem) if isinstance(problem, Unusable) else "too long"
        dropped.setdefault(reason, [0, place])[0] += 1

    for place, row in read_rows(path, task):
        try:
            parsed = parse_row(row)
        except Ambiguous as problem:
            raise ValueError(f"{path}, {place}: {problem}") from None
        except Unusable as problem:
            drop(problem)
            continue
        whole = template in CHATS and row.keys() & {"messages", "conversations"}
        for asked in every_answer(parsed) if whole else [parsed]:
            try:
                examples.append(encode_row(asked, tokenizer, template, max_length))
            except (Unusable, TooLong) as problem:
                drop(problem)
    if not examples:
        why = dropped_in_words(dropped) or "none, it has no rows"
        raise ValueError(f"{path}: no example left; dropped: {why}")
    return examples, dropped


def every_answer(row):
    """A conversation as one row for each of the assistant's turns, which is asked with all before it."""
    rows = [Row(row.turns[:i], "", text) for i, (role, text) in enumerate(row.turns) if role == "assistant"]
    return rows + [row] if row.answer or not rows else rows


def encode_row(row, tokenizer, template, max_length):
    if not any(text.strip() for _, text in row.turns):
        raise Unusable("empty")
    if not row.answer.strip():
        raise Unusable("no answer")
    example = Example(encode_prompt(tokenizer, template, row.turns, row.input),
                      encode_answer(tokenizer, template, row.answer))
    if len(example.prompt) + len(example.answer) > max_length:
        raise TooLong
    return example


def dropped_in_words(dropped):
    return listed([f"{n} {reason} (first: {place})" for reason, (n, place) in dropped.items()])


# ----------------------------------------------------------------------------------------------------------
# Order and batches

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
