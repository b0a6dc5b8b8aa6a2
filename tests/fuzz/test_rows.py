"""Random rows: a conversation says the same in every form, with whatever others add; one key more is read,
changes nothing or drops the row; junk is counted."""

import json
import random

from text.examples import load_examples
from text.tokenizer import Tokenizer
from text.turns import KEYS, LEARNED, NEUTRAL, Unusable, learned_answers, parse_row
from tiny import write_checkpoint

WORDS = [*"a Why? é 1+1 {} 日本 \U0001fae8 </s> \\ \"".split(), *"\n \u2028\t\r"]
JUNK = [None, True, 0, -1.5, "", "x", [], [1], {}, {"a": 1}, [None], [{}], [[]], float("nan"), 10**30,
        [{"role": "user"}], [{"role": "user", "content": None}], [{"from": 1, "value": 2}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]
MORE = [*LEARNED, "tools", "history", "label", "chosen", "rejected", "images", "documents", "data"]
EVERY = [*(key for keys in KEYS.values() for key in keys), *MORE]


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
    form = rng.choice(["columns", "columns", "messages", "conversations", "lists", "choices"])
    own = {rng.choice(KEYS["system"]): system} if system else {}
    if form in ("columns", "choices"):
        row = {rng.choice(KEYS["prompt"]): asked, rng.choice(KEYS["answer"]): answer, **own}
        row |= {rng.choice(KEYS["input"]): context} if context else {}
        others = [text(rng) + str(i) for i in range(rng.randint(0, 3))]
        choices = rng.sample([answer, *others], len(others) + 1)
        return row | ({"choices": choices, "answer": choices.index(answer)} if form == "choices" and
                      "answer" in row else {"choices": choices} if form == "choices" else {})
    turns = [("user", f"{asked}\n\n{context}" if context else asked), ("assistant", answer)]
    if system and rng.random() < 0.5:
        turns, own = [("system", system), *turns], {}
    if form == "conversations":
        names = {"user": rng.choice(["human", "user"]), "assistant": rng.choice(["gpt", "assistant"])}
        return own | {form: [{"from": names.get(role, role), "value": said} for role, said in turns]}
    said = [{"role": role, "content": in_parts(rng, said)} for role, said in turns]
    return own | ({form: said} if form == "messages" else {"prompt": said[:-1], "completion": said[-1:]})


def disguised(rng, row):
    """The same row with columns that are null or say nothing here, in another order."""
    row = row | {key: rng.choice([None, [], {}]) for key in rng.sample(EVERY, rng.randint(0, 4))
                 if key not in row}
    row |= {name: rng.choice(JUNK) for name in rng.sample(sorted(NEUTRAL), rng.randint(0, 2))}
    return {key: row[key] for key in rng.sample([*row], len(row))}


def read(row):
    """What is asked and learned, a context below its question; None for a row that cannot be used."""
    try:
        parsed = parse_row(json.loads(json.dumps(row)))
        (last,) = learned_answers(parsed)
    except (Unusable, ValueError):
        return None
    said = [(role, text) for role, text, *_ in parsed.turns[:last]]
    said[-1] = ("user", "\n\n".join(text for text in (said[-1][1], parsed.input) if text))
    return said, parsed.turns[last].text


def test_one_conversation_in_every_form(request):
    for seed in range(request.config.getoption("--fuzz")):
        rng = random.Random(seed)
        asked, answer = text(rng), text(rng)
        system, context = (text(rng) if rng.random() < 0.3 else "" for _ in range(2))
        row = disguised(rng, in_a_form(rng, system, asked, answer, context))
        wanted = [("system", system)] * bool(system), ("user", f"{asked}\n\n{context}" if context else asked)
        assert read(row) == ([*wanted[0], wanted[1]], answer), (seed, row)
        key, value = rng.choice([key for key in EVERY if row.get(key) in (None, [], {})]), rng.choice(JUNK)
        more, found = row | {key: value}, read(row | {key: value})
        adds = isinstance(value, str) and key in (*KEYS["system"], *KEYS["input"])
        if found not in (None, read(row)):
            assert adds and value in str(found) or key in (*KEYS["turns"], "choices"), (seed, more)


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
        is_list = rng.random() < 0.3 or isinstance(rows[0], list)
        written = rng.choice(["", "\ufeff"]) + (whole if is_list else lines)
        (tmp_path / "data").write_bytes(written.encode())
        try:
            examples, dropped = load_examples(tmp_path / "data", tokenizer, "paper", 200)
            assert len(examples) + sum(count for count, _ in dropped.values()) == len(rows), seed
        except ValueError as problem:
            assert "no example left; dropped: " in str(problem) and "\n" not in str(problem), (seed, problem)
