"""What a row of a data file says: who says what, and which answers are learned.

Every key of a row, of a message and of a part of a text is read, or it is neutral, such as one that says
where a row is from, and ignored. Any other turns the row away, unless it is an empty text: what it asks for
(tools, images) is not done here. Null, an empty list and an empty object are absent.
"""

from typing import NamedTuple

from text.words import TYPES, fits, listed

KEYS = {                # of a row; those of a line say the same
    "turns": ("messages", "conversations"),
    "prompt": ("prompt", "instruction", "question"),
    "answer": ("completion", "answer", "response", "output"),
    "system": ("system", "system_prompt"),
    "input": ("input", "context"),
    "choices": ("choices",),
}
LEARNED = ("weight", "train")           # of a row or of a message
NEUTRAL = set("""
    id _id uid uuid guid idx index row_id prompt_id conversation_id message_id question_id example_id
    parent_id hash conversation_hash source dataset data_source origin original_index subset split task
    task_id task_name task_type type category subcategory topic domain subject tags keywords lang
    language license url link title author avatarUrl views model model_name generator score scores rating
    quality difficulty toxicity reward metadata meta info timestamp date time created_at updated_at
    version num_turns turn n_tokens num_tokens token_count length custom_instruction
    skip_prompt_formatting
""".split())
SHAREGPT = {"human": "user", "gpt": "assistant"}        # its names; its messages have from and value


class Unusable(ValueError):
    """A row of no known form, or that says nothing to learn, or what is not supported."""


class Turn(NamedTuple):
    role: str
    text: str
    thoughts: str | None = None         # of an answer, where they do not stand in its text
    learned: bool = True                # False: an answer that is read as a part of later prompts alone


class Row(NamedTuple):
    turns: list
    start: int | None = None            # what is said from this turn on is there to be learned; None: all
    input: str = ""                     # what stands beside the question
    choices: list = []
    right: int | None = None            # the index of the right choice


def parse_row(row):
    """A row of any form as a Row; or Unusable."""
    row = present("a row", row)
    columns = {name: one_of(row, keys) for name, keys in KEYS.items()}
    said = lambda name: of_type(str, repr(columns[name]), row.get(columns[name], ""))
    prompt, answer = columns["prompt"], columns["answer"]
    read = {columns["turns"], columns["system"], *LEARNED}
    if columns["turns"]:
        parsed = Row(read_turns(columns["turns"], row))
        texts = [turn.text for turn in parsed.turns]
        read |= {key for key in (prompt, answer) if row.get(key) in texts}          # so do these
    elif isinstance(row.get(prompt), list):             # TRL's prompt and completion
        asked = read_turns(prompt, row)
        parsed = Row(asked + read_turns(answer, row), len(asked))
        read |= {prompt, answer}
    elif prompt:
        choices, right = read_choices(answer, row) if columns["choices"] else ([], None)
        learned = choices[right] if choices else said("answer")
        turns = [Turn("user", said("prompt")), Turn("assistant", learned)]
        parsed = Row(turns[:2 if answer else 1], 1, said("input"), choices, right)
        read |= {*columns.values()}
    else:
        raise Unusable(f"it has {listed(list(row), ', ') or 'nothing'}: expected messages, or one of "
                       f"{', '.join(KEYS['prompt'])} with one of {', '.join(KEYS['answer'])} (or a --task)")
    if all(turn.text.strip() in str(row.get("text")) for turn in parsed.turns):
        read.add("text")                                # as in Alpaca: it repeats the rest
    refuse_others(row, read, "row")
    if not is_learned(row):
        raise Unusable("weight 0, or train false")
    if not said("system"):
        return parsed
    if any(turn.role == "system" for turn in parsed.turns):
        raise Unusable(f"{columns['system']!r} beside a system's turn")
    turns = [Turn("system", said("system")), *parsed.turns]
    return parsed._replace(turns=turns, start=parsed.start and parsed.start + 1)


def learned_answers(row):
    """The places among a Row's turns of the answers to be learned; Unusable if there are none."""
    found = [i for i in range(row.start or 0, len(row.turns)) if row.turns[i].role == "assistant"]
    if learned := [i for i in found if row.turns[i].learned]:
        return learned
    raise Unusable("no answer" if not found else "no answer that is learned: weight 0, or train false")


def of_type(kind, what, value):
    if not isinstance(value, kind):
        raise Unusable(f"{what} is {type(value).__name__}, expected {TYPES[kind]}")
    return value


def present(what, part):
    """What an object has, without what stands for nothing: datasets that were joined are full of it."""
    return {key: value for key, value in of_type(dict, what, part).items() if value not in (None, [], {})}


def one_of(row, keys):
    """Which of the keys that say the same a row has."""
    given = [key for key in keys if row.get(key, "") != ""] or [key for key in keys if key in row][:1]
    if len(given) > 1:
        raise Unusable(f"it has {' and '.join(given)}, which say the same: expected one of them")
    return given[0] if given else None


def refuse_others(part, read, where):
    """Unusable for a key that is neither read nor neutral, and holds something."""
    if odd := sorted(key for key in part.keys() - read - NEUTRAL if part[key] != ""):
        raise Unusable(f"{odd[0]!r:.40} in a {where}, which is not supported")


def is_learned(part):
    """Whether a row or message is there to be learned; with weight 0, or train false, it is not."""
    weight, train = part.get("weight", 1), part.get("train", True)
    if not fits(weight, (0, 1, 0.0, 1.0)) or not fits(train, bool):
        raise Unusable("a weight that is not 0 or 1, or a train that is not true or false")
    return bool(weight and train)


def read_turns(key, row):
    """A list of messages as turns."""
    return [read_message(message) for message in of_type(list, repr(key), row.get(key, []))]


def read_message(message):
    message = present("a message", message)
    who, what = ("from", "value") if "from" in message else ("role", "content")
    refuse_others(message, {who, what, "reasoning_content", *LEARNED}, "message")
    role, text = of_type(str, repr(who), message.get(who)), message.get(what)
    role = SHAREGPT.get(role, role) if who == "from" else role
    parts = map(read_part, text) if isinstance(text, list) else of_type(str, repr(what), text)
    thoughts = message.get("reasoning_content")
    if role not in ("system", "user", "assistant"):
        raise Unusable(f"a turn of {role!r:.40}: expected system, user and assistant")
    if thoughts is not None and (role != "assistant" or not isinstance(thoughts, str)):
        raise Unusable("a reasoning_content that is no text of an answer's")
    return Turn(role, "".join(parts), thoughts, is_learned(message))


def read_part(part):
    """The text of one part of a text."""
    part = present("a part of a text", part)
    if part.keys() - {"type", "text"} or part.get("type", "text") != "text":
        raise Unusable("a part of a text that is not text")
    return of_type(str, "'text'", part.get("text"))


def read_choices(key, row):
    """The choices of a row, and the index of the right one, which is given as such or as its text."""
    choices, answer = of_type(list, "'choices'", row["choices"]), row.get(key)
    for choice in choices:
        of_type(str, "a choice", choice)
    right = choices.index(answer) if answer in choices else answer
    if type(right) is not int or not 0 <= right < len(choices):
        raise Unusable("an answer that is none of its choices, nor the place of one, from 0 on")
    return choices, right
