"""Random rows: a conversation says the same in every form, with whatever others add; junk is counted."""

import json
import random

import pytest

from text.examples import ANSWER_KEYS, PROMPT_KEYS, SYSTEM_KEYS, Ambiguous, Unusable
from text.examples import load_examples, parse_row
from text.tokenizer import Tokenizer
from tiny import write_checkpoint

WORDS = [*"a Why? é 1+1 {} 日本 \U0001fae8 </s> \\ \"".split(), *"\n \u2028\t\r"]
JUNK = [None, True, 0, -1.5, "", "x", [], [1], {}, {"a": 1}, [None], [{}], [[]], float("nan"), 10**30,
        [{"role": "user"}], [{"role": "user", "content": None}], [{"from": 1, "value": 2}]]
EXTRA = ["id", "source", "text", "label", "category", "tools", "metadata", "score"]


def text(rng):
    return "x" + "".join(rng.choices(WORDS, k=rng.randint(0, 6)))


def in_parts(rng, said):
    """A text as it stands, or as a list of parts."""
    if rng.random() < 0.7:
        return said
    cut = rng.randint(0, len(said))
    return [{"type": "text", "text": part} for part in (said[:cut], said[cut:])]


def in_a_form(rng, system, asked, answer, context):
    """A row that says this."""
    turns = [("system", system)] * bool(system) + [("user", asked)]
    form = rng.choice(["columns", "columns", "messages", "conversations", "lists", "choices"])
    if form == "choices":
        others = [text(rng) + str(i) for i in range(rng.randint(0, 3))]
        choices = rng.sample([answer, *others], len(others) + 1)
        return {rng.choice(PROMPT_KEYS): asked, "choices": choices,
                "answer": rng.choice([answer, choices.index(answer)])}
    if form == "columns":
        row = {rng.choice(PROMPT_KEYS): asked, rng.choice(ANSWER_KEYS): answer}
        row |= {rng.choice(SYSTEM_KEYS): system} if system else {}
        return row | ({rng.choice(["input", "context"]): context} if context else {})
    if form == "conversations":
        names = {"user": rng.choice(["human", "user"]), "assistant": rng.choice(["gpt", "assistant"])}
        return {"conversations": [{"from": names.get(role, role), "value": said}
                                  for role, said in [*turns, ("assistant", answer)]]}
    said = [{"role": role, "content": in_parts(rng, said)} for role, said in [*turns, ("assistant", answer)]]
    return {"messages": said} if form == "messages" else {"prompt": said[:-1], "completion": said[-1:]}


def disguised(rng, row):
    """The same row with columns that are null or say nothing here, in another order."""
    keys = {*PROMPT_KEYS, *ANSWER_KEYS, *SYSTEM_KEYS, "messages", "conversations", "input", "context",
            "choices"}
    row = row | dict.fromkeys(rng.sample(sorted(keys - row.keys()), rng.randint(0, 4)))
    row |= {name: rng.choice(JUNK) for name in rng.sample(EXTRA, rng.randint(0, 2))}
    return {key: row[key] for key in rng.sample([*row], len(row))}


def test_one_conversation_in_every_form(request):
    for seed in range(request.config.getoption("--fuzz")):
        rng = random.Random(seed)
        asked, answer = text(rng), text(rng)
        system, context = (text(rng) if rng.random() < 0.3 else "" for _ in range(2))
        row = disguised(rng, in_a_form(rng, system, asked, answer, context))
        turns, read, learned = parse_row(json.loads(json.dumps(row)))
        if "choices" in row and row["choices"]:
            system = ""
        columns = row.keys() & {"input", "context"}
        assert turns == [("system", system)] * bool(system) + [("user", asked)], (seed, row)
        assert learned == answer and read == (context if any(row[c] for c in columns) else ""), (seed, row)
        twice = next(key for key in PROMPT_KEYS if row.get(key) is None)
        if isinstance(next((row[k] for k in PROMPT_KEYS if row.get(k)), None), str):
            with pytest.raises(Ambiguous):
                parse_row(row | {twice: asked})


def junk_row(rng):
    row = disguised(rng, in_a_form(rng, "", text(rng), text(rng), ""))
    for key in rng.sample([*row], min(len(row), rng.randint(0, 2))):
        row[key] = rng.choice(JUNK)
    return rng.choice([row, row, row, rng.choice(JUNK)])


def test_every_row_of_a_file_is_an_example_or_counted(request, tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path / "m"))
    for seed in range(request.config.getoption("--fuzz")):
        rng = random.Random(seed)
        rows = [junk_row(rng) for _ in range(rng.randint(1, 6))]
        end = rng.choice(["\n", "\r\n", "\n\n \n"])
        lines = end.join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows)
        whole = json.dumps(rows, indent=rng.choice([None, 2]))
        written = rng.choice(["", "\ufeff"]) + (lines if rng.random() < 0.7 else whole)
        (tmp_path / "data").write_bytes(written.encode())
        clear = True
        for row in rows:
            try:
                parse_row(row)
            except Unusable:
                pass
            except Ambiguous:
                clear = False
        try:
            examples, dropped = load_examples(tmp_path / "data", tokenizer, "paper", 200)
            assert clear and len(examples) + sum(count for count, _ in dropped.values()) == len(rows), seed
        except ValueError as problem:
            said = str(problem)
            assert "no example left" in said or not clear or "expected one a line" in said or \
                "its rows are a list under" in said or "not a JSON list" in said, (seed, said)
            assert "\n" not in said
