"""Random rows: a conversation says the same in every form, with whatever others add, and is asked as
transformers' apply_chat_template asks it; one key more is read, changes nothing or drops the row; junk is
counted."""

import json

import pytest

import chats
from chats import message
from fuzzing import JUNK, draws
from text.examples import load_examples
from text.tokenizer import Tokenizer
from text.turns import KEYS, LEARNED, NEUTRAL, Unusable, learned_answers, parse_row
from tiny import write_checkpoint

WORDS = [*"a Why? é 1+1 {} 日本 \U0001fae8 </s> \\ \"".split(), *"\n \u2028\t\r"]
ODD = [*JUNK, 10**30, [{"role": "user"}], [message("user", None)], [{"from": 1, "value": 2}],
       [message("user", "x"), message("assistant", "y")]]
MORE = [*LEARNED, "tools", "history", "label", "chosen", "rejected", "images", "documents", "data"]
EVERY = [*(key for keys in KEYS.values() for key in keys), *MORE]


def in_a_form(rng, messages, context=""):
    """A row of a random form that says these messages, the first question with a context below it, and the
    place of the first message that is there to be learned."""
    own = messages[0]["role"] == "system" and messages[0]["content"] != "" and rng.random() < 0.5
    row, said = {rng.choice(KEYS["system"]): messages[0]["content"]} if own else {}, messages[own:]
    plain = [m["role"] for m in said] == ["user", "assistant"] and all(len(m) == 2 for m in said)
    form = rng.choice(["messages", "conversations", "lists", *["columns", "columns", "choices"] * plain])
    if form in ("columns", "choices"):
        asked, answer = (m["content"] for m in said)
        row |= {rng.choice(KEYS["prompt"]): asked, rng.choice(KEYS["answer"]): answer}
        row |= {rng.choice(KEYS["input"]): context} if context else {}
        choices = [answer, *(f"{answer}{i}" for i in range(rng.randint(0, 3)))]
        rng.shuffle(choices)
        by_number = {"answer": choices.index(answer)} if "answer" in row else {}
        return row | ({"choices": choices, **by_number} if form == "choices" else {}), 0
    first = [m["role"] for m in said].index("user")
    words = lambda i, m: f"{m['content']}\n\n{context}" if context and i == first else m["content"]
    said = [m | {"content": words(i, m)} for i, m in enumerate(said)]
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
    return "x" + "".join(rng.choices(WORDS, k=rng.randint(0, 6)))


def disguised(rng, row):
    """The same row with columns that are null or say nothing here, in another order."""
    row = row | {key: rng.choice([None, [], {}]) for key in rng.sample(EVERY, rng.randint(0, 4))
                 if key not in row}
    row |= {name: rng.choice(ODD) for name in rng.sample(sorted(NEUTRAL), rng.randint(0, 2))}
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
    for seed, rng in draws(request):
        asked, answer = text(rng), text(rng)
        system, context = (text(rng) if rng.random() < 0.3 else "" for _ in range(2))
        turns = [("system", system)] * bool(system) + [("user", asked)]
        row, _ = in_a_form(rng, [message(*turn) for turn in [*turns, ("assistant", answer)]], context)
        row = disguised(rng, row)
        turns[-1] = ("user", f"{asked}\n\n{context}" if context else asked)
        assert read(row) == (turns, answer), (seed, row)
        key, value = rng.choice([key for key in EVERY if row.get(key) in (None, [], {})]), rng.choice(ODD)
        found = read(row | {key: value})
        adds = isinstance(value, str) and key in (*KEYS["system"], *KEYS["input"])
        if found not in (None, read(row)):
            assert adds and value in str(found) or key in (*KEYS["turns"], "choices"), (seed, row, key)


def junk_row(rng):
    row, _ = in_a_form(rng, [message("user", text(rng)), message("assistant", text(rng))])
    row = disguised(rng, row)
    for key in rng.sample([*row], min(len(row), rng.randint(0, 2))):
        row[key] = rng.choice(ODD)
    return rng.choice([row, row, row, rng.choice(ODD)])


def test_every_row_of_a_file_is_an_example_or_counted(request, tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path / "m"))
    for seed, rng in draws(request):
        rows = [junk_row(rng) for _ in range(rng.randint(1, 6))]
        end, is_list = rng.choice(["\n", "\r\n", "\n\n \n"]), rng.random() < 0.3 or isinstance(rows[0], list)
        lines = end.join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows)
        written = json.dumps(rows, indent=rng.choice([None, 2])) if is_list else lines
        (tmp_path / "data").write_bytes((rng.choice(["", "\ufeff"]) + written).encode())
        try:
            examples, dropped = load_examples(tmp_path / "data", tokenizer, "paper", 200)
            assert len(examples) + sum(count for count, _ in dropped.values()) == len(rows), seed
        except ValueError as problem:
            assert "no example left; dropped: " in str(problem) and "\n" not in str(problem), (seed, problem)


# ---- in chat markup --------------------------------------------------------------------------------------


def template(turn, opening="", begin="''", in_turn="false", own="false"):
    """A template in Jinja, of expressions: what stands for each turn, and before all of them; whether the
    turns alternate, and whether a first one is the system's that the others do not count."""
    return (f"{{% set own = {own} %}}{{{{ {begin} }}}}{{% for m in (messages[1:] if own else messages) %}}"
            f"{{% if {in_turn} and m.role != ['user', 'assistant'][loop.index0 % 2] %}}"
            f"{{{{ raise_exception('in turn') }}}}{{% endif %}}{{{{ {turn} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {opening!r} }}}}{{% endif %}}")


SPOKEN = ("(m.content if m.role != 'assistant' or m.reasoning_content is string or '</think>' not in "
          "m.content else m.content.split('</think>')[-1].lstrip('\n'))")
INSTRUCTION = "{}'[INST] ' + {} + '{}[/INST]' if m.role == 'user' else ' ' + m.content|trim + {}".format
SYSTEM = {"in_turn": "true", "own": "messages[0].role == 'system'"}
JINJA = {       # one of each family, in short (tests/chats.py has the published ones' results)
    "chat-llama3": template(
        "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>'",
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "bos_token"),
    "chat-qwen3": template(
        f"'<|im_start|>' + m.role + '\n' + {SPOKEN} + '<|im_end|>\n'", "<|im_start|>assistant\n"),
    "chat-gemma": template(
        "'<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + m.content|trim + "
        "'<end_of_turn>\n'", "<start_of_turn>model\n", "bos_token", "true"),
    "chat-llama2": template(INSTRUCTION(
        "bos_token + ", "(('<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if own and loop.first else "
        "'') + m.content)|trim", " ", "' ' + eos_token"), **SYSTEM),
    "chat-mistral-v3": template(INSTRUCTION(
        "", "(messages[0].content + '\n\n' if own and loop.last else '') + m.content", "", "eos_token"),
        begin="bos_token", **SYSTEM),
    "chat-zephyr": template("'<|' + m.role + '|>\n' + m.content + eos_token + '\n'", "<|assistant|>\n"),
}


def random_spec(rng, name):
    """A tokenizer.json: of bytes, or of pieces with its dummy space by Prepend or Metaspace."""
    spec = rng.choice([chats.small, chats.pieces, chats.pieces])(name)
    if spec["normalizer"] and rng.random() < 0.6:
        spec["normalizer"], scheme = None, rng.choice(["first", "always", "never"])
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme,
                                 "split": rng.random() < 0.5}
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


def wanted(messages, start, theirs):
    """The prompts of the answers that are there to be learned."""
    for i, (before, said) in enumerate(zip(messages, messages[1:]), 1):
        learned = said["role"] == "assistant" and said.get("weight", 1) and said["content"].strip()
        asked = before["role"] == "user" and any(m["content"].strip() for m in messages[:i])
        if i >= start and learned and asked:
            try:
                yield theirs.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=False)
            except Exception as problem:
                assert "in turn" in str(problem)


def test_prompts_are_those_of_apply_chat_template(tmp_path, request):
    transformers = pytest.importorskip("transformers")
    learned = turned_away = 0
    for seed, rng in draws(request):
        name = rng.choice([*JINJA])
        (tmp_path / "tokenizer.json").write_text(json.dumps(random_spec(rng, name)))
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=JINJA[name], **chats.names(name))
        messages = random_messages(rng, name)
        row, start = in_a_form(rng, messages)
        (tmp_path / "data").write_text(json.dumps(row))
        tokenizer, found, dropped = Tokenizer.from_pretrained(tmp_path), [], {}
        try:
            found, dropped = load_examples(tmp_path / "data", tokenizer, name, 10_000)
        except ValueError as problem:
            assert "no example left" in str(problem), (seed, problem)
        prompts = [example.prompt for example in found]
        assert prompts == [*wanted(messages, start, theirs)], (seed, name, row)
        learned, turned_away = learned + len(found), turned_away + sum(n for n, _ in dropped.values())
    print({"prompts that are the same": learned, "turned away": turned_away})
