"""Random rows: a conversation says the same in every form, with whatever others add; one key more is read,
changes nothing or drops the row; junk is counted; chats are encoded as the tokenizers library does it."""

import json
from itertools import product

import pytest

import chats
from chats import message
from fuzzing import JUNK, fill, judge_all, one
from test_text import NOTHING, read
from text.chat import CHATS
from text.examples import load_examples
from text.tokenizer import Tokenizer
from text.turns import KEYS, LEARNED, NEUTRAL

WORDS = [*"a Why? é 1+1 {} 日本 \U0001fae8 </s> \\ \"".split(), *"\n \u2028\t\r"]
ODD = [*JUNK, 1, 1.0, 10**30, [{"role": "user"}], [message("user", None)], [{"from": 1, "value": 2}],
       [message("user", "x"), message("assistant", "y")]]
MORE = [*LEARNED, *"text tools history label chosen rejected images documents data made_up".split()]
EVERY = [*(key for keys in KEYS.values() for key in keys), *MORE]
OF_MESSAGES = [*LEARNED, *"reasoning_content tool_calls name text id made_up".split()]
LEARNS = {"weight": [(int, 1), (float, 1.0)], "train": [(bool, True)]}
FORMS = ["messages", "conversations", "lists", "columns", "choices"]
SAME = "the same"


def in_a_form(rng, messages, context="", form=None):
    """A row of a form, or a random one, that says these messages, the first question with a context below
    it, and the place of the first message that is there to be learned."""
    own = messages[0]["role"] == "system" and messages[0]["content"] != "" and \
        (form in FORMS[3:] or rng.random() < 0.5)
    row, said = {rng.choice(KEYS["system"]): messages[0]["content"]} if own else {}, messages[own:]
    plain = [m["role"] for m in said] == ["user", "assistant"] and all(len(m) == 2 for m in said)
    form = form or rng.choice(FORMS if plain else FORMS[:3])
    if form in ("columns", "choices"):
        asked, answer = (m["content"] for m in said)
        row |= {rng.choice(KEYS["prompt"]): asked, rng.choice(KEYS["answer"]): answer}
        row |= {rng.choice(KEYS["input"]): context} if context else {}
        choices = [answer, *(f"{answer}{i}" for i in range(rng.randint(0, 3)))]
        rng.shuffle(choices)
        by_number = {"answer": choices.index(answer)} if "answer" in row else {}
        return row | ({"choices": choices, **by_number} if form == "choices" else {}), 0
    first = next(m for m in said if m["role"] == "user")
    more = {"content": f"{first['content']}\n\n{context}"} if context else {}
    said = [m | (more if m is first else {}) for m in said]
    if form == "conversations":
        names = rng.choice([{}, {"user": "human", "assistant": "gpt"}])
        more = ({key: m[key] for key in m.keys() - {"role", "content"}} for m in said)
        return row | {form: [{"from": names.get(m["role"], m["role"]), "value": m["content"], **rest}
                             for m, rest in zip(said, more)]}, 0
    for m in said:
        if rng.random() < 0.3:                      # a text may come in parts
            cut = rng.randint(0, len(m["content"]))
            parts = m["content"][:cut], m["content"][cut:]
            m["content"] = [{"type": "text", "text": part} for part in parts]
    if form == "messages":
        return row | {form: said}, 0
    n = rng.randrange(1, len(said))
    return row | {"prompt": said[:n], "completion": said[n:]}, own + n


def text(rng):
    return "z" + "".join(rng.choices(WORDS, k=rng.randint(0, 6)))         # which is not ODD


def disguised(rng, row):
    """The same row with columns that are null or say nothing here, in another order."""
    row = row | {key: rng.choice([None, [], {}]) for key in rng.sample(EVERY, rng.randint(0, 4))
                 if key not in row}
    row |= {name: rng.choice(ODD) for name in rng.sample(sorted(NEUTRAL), rng.randint(0, 2))}
    return {key: row[key] for key in rng.sample([*row], len(row))}


def said_by(row):
    """What is asked and learned, a context below its question; NOTHING for a row that cannot be used."""
    found = read(row)
    if found == NOTHING:
        return NOTHING
    [((*turns, (_, asked)), context, answer)] = found
    return [*turns, ("user", f"{asked}\n\n{context}" if context else asked)], answer


def meaning(key, value, adds, filled):
    """What a key more means to a row or message: SAME, NOTHING or, where it `adds` a text, its own name; an
    empty text is SAME, unless the key has to be `filled`."""
    if key in NEUTRAL or value in (None, [], {}):
        return SAME
    if value == "":
        return NOTHING if key in filled else SAME
    if key in adds and isinstance(value, str):
        return key
    return SAME if (type(value), value) in LEARNS.get(key, []) else NOTHING


def test_one_conversation_in_every_form_with_every_key(request):
    def judge(rng):
        asked, answer = text(rng), text(rng)
        system, context = (text(rng) if rng.random() < 0.3 else "" for _ in range(2))
        turns = [("system", system)] * bool(system) + [("user", asked)]
        messages = [message(*turn) for turn in [*turns, ("assistant", answer)]]
        rows = [disguised(rng, in_a_form(rng, messages, context, form)[0]) for form in FORMS]
        turns[-1] = ("user", f"{asked}\n\n{context}" if context else asked)
        rng.choice(rows)["text"] = f"{system} {turns[-1][1]} {answer}"          # which repeats the rest
        for row in rows:
            assert said_by(row) == (turns, answer), row

        row = rng.choice(rows)
        lists = [key for key in (*KEYS["turns"], "completion") if row.get(key) and type(row[key]) is list]
        adds = [*KEYS["system"]] * (not system) + [*KEYS["input"]] * (not context and not lists)
        filled = [*LEARNED, *KEYS["choices"] * (not lists), *KEYS["turns"] * (lists in ([], ["completion"]))]
        for key, value in product(EVERY, ODD):
            if row.get(key) in (None, [], {}):
                means = meaning(key, value, adds, filled)
                now = {**dict.fromkeys(KEYS["system"], [("system", value), *turns]),
                       **dict.fromkeys(KEYS["input"], [*turns[:-1], ("user", f"{asked}\n\n{value}")])}
                want = NOTHING if means == NOTHING else (now.get(means, turns), answer)
                assert said_by(row | {key: value}) == want, (row, key, value)
        for place in lists:
            *before, last = row[place]
            for key, value in product([*OF_MESSAGES, *last], ODD):
                if key not in last or not isinstance(value, str):
                    means = NOTHING if key in last else meaning(key, value, ["reasoning_content"], LEARNED)
                    found = said_by(row | {place: [*before, last | {key: value}]})
                    assert found == (NOTHING if means == NOTHING else (turns, answer)), (row, key, value)
        return "".join(lists) or "columns"

    judge_all(request, judge)


def junk_row(rng):
    row, _ = in_a_form(rng, [message("user", text(rng)), message("assistant", text(rng))])
    row = disguised(rng, row)
    for key in rng.sample([*row], min(len(row), rng.randint(0, 2))):
        row[key] = rng.choice(ODD)
    return rng.choice([row, row, row, rng.choice(ODD)])


def test_every_row_of_a_file_is_an_example_or_counted(request, tmp_path, tokenizer):
    def judge(rng):
        rows = [junk_row(rng) for _ in range(rng.randint(1, 6))]
        end, is_list = rng.choice(["\n", "\r\n", "\n\n \n"]), rng.random() < 0.3 or isinstance(rows[0], list)
        lines = end.join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows)
        written = json.dumps(rows, indent=rng.choice([None, 2])) if is_list else lines
        (tmp_path / "data").write_bytes((rng.choice(["", "\ufeff"]) + written).encode())
        try:
            examples, dropped = load_examples(tmp_path / "data", tokenizer, "paper", 200)
        except ValueError as problem:
            assert "no example left; dropped: " in str(problem) and "\n" not in str(problem)
            return "no example"
        assert len(examples) + sum(count for count, _ in dropped.values()) == len(rows)
        return "some examples"

    judge_all(request, judge)


# ---- in chat markup --------------------------------------------------------------------------------------

IN_TURN = [name for name in CHATS if "mistral" in name or name in ("chat-llama2", "chat-gemma")]
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": one(True, False),
             "prepend_scheme": one("first", "always", "never")}


def random_spec(rng, name):
    """A tokenizer.json: of bytes, or of pieces with its dummy space by Prepend or Metaspace."""
    spec = rng.choice([chats.small, chats.pieces, chats.pieces])(name)
    if spec["normalizer"] and rng.random() < 0.6:
        spec |= {"normalizer": None, "pre_tokenizer": fill(rng, METASPACE)}
    return spec


def random_messages(rng, name):
    """A conversation, mostly in turn, with answers that are not to be learned."""
    messages = [message("system", chats.random_text(rng))] * (rng.random() < 0.4)
    for _ in range(rng.randint(1, 4)):
        messages.append(message("user", chats.random_text(rng)))
        messages.append(message("assistant", *chats.answer(rng, name, chats.random_text(rng))))
        messages[-1] |= {"weight": rng.choice([0, 0, 1])} if rng.random() < 0.2 else {}
    if rng.random() < 0.1:
        messages.insert(rng.randint(0, len(messages)), message("user", "a"))
    return messages


def wanted(messages, start, name, theirs):
    """The prompts of the answers that are there to be learned."""
    form, own = CHATS[name], messages[0]["role"] == "system"
    turns = [(m["role"], form.thoughts_and_words(m["content"], m.get("reasoning_content"))[1])
             for m in messages]
    for i, said in enumerate(messages):
        learned = said["role"] == "assistant" and said.get("weight", 1) and said["content"].strip()
        asked = i and messages[i - 1]["role"] == "user" and any(m["content"].strip() for m in messages[:i])
        roles = [role for role, _ in turns[own and name not in chats.NO_SYSTEM:i]]
        in_turn = roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        if i >= start and learned and asked and (in_turn or name not in IN_TURN):
            yield theirs.encode("".join(form.prompt(turns[:i])), add_special_tokens=False).ids


def test_prompts_of_chats_are_encoded_as_one_text(tmp_path, request):
    """Of pieces that are as apply_chat_template has them, by test_chat.py."""
    library = pytest.importorskip("tokenizers")

    def judge(rng):
        name = rng.choice([*CHATS])
        spec = json.dumps(random_spec(rng, name))
        (tmp_path / "tokenizer.json").write_text(spec)
        messages, ours = random_messages(rng, name), Tokenizer.from_pretrained(tmp_path)
        row, start = in_a_form(rng, messages)
        (tmp_path / "data").write_text(json.dumps(row))
        want = [*wanted(messages, start, name, library.Tokenizer.from_str(spec))]
        try:
            found, _ = load_examples(tmp_path / "data", ours, name, 10_000)
            assert [example.prompt for example in found] == want, (name, row)
        except ValueError as problem:
            assert "no example left" in str(problem) and not want, (name, row)
        return f"{len(want)} prompts"

    judge_all(request, judge)
