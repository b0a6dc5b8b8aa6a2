"""Text to ids: the kinds of tokenizer files, and rows to examples. (Golden encodings are in
test_reference.py, files of others in test_cases.py.)"""

import json
import os
from pathlib import Path

import pytest

from text.bpe import LETTERS
from text.examples import Example, batches, draw, encode_answer, encode_prompt, load_examples
from text.tokenizer import Tokenizer
from text.turns import KEYS, NEUTRAL, Unusable, learned_answers, parse_row
from tiny import write_checkpoint

CASES = Path(__file__).parent / "cases"


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.from_pretrained(write_checkpoint(tmp_path / "m"))


def changed(folder, **parts):
    """A byte-level tokenizer with other parts, of its model or beside it."""
    spec = json.loads((CASES / "tokenizer-appended-merges/tokenizer.json").read_text())
    for key, value in parts.items():
        (spec["model"] if key in spec["model"] else spec)[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer.from_pretrained(folder)


DIGITS = {"type": "Sequence", "pretokenizers": [     # SmolLM2's
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]}
ADDED = [{"id": 260 + i, "content": content} for i, content in enumerate(["<x>", "<x><x>"])]


@pytest.mark.parametrize("merges, parts, text, pieces", [
    ("Ġ a,a b,ab c", {}, "abc abc", "abc Ġa b c"),
    ("b c,a b,ab c", {}, "abc", "a bc"),                # its bytes are never merged to the token abc,
    ("b c,a b,c d,ab cd", {}, "abcd", "a bc d"),        # nor to abcd
    ("b c,a b", {}, "abc", "a bc"),
    ("a b,a bc,c d,ab c,b c", {}, "abcd", "ab cd"),     # one token by two pairs: each has its place
    ("w h", {}, "whole", "wh o l e"), ("w h", {"ignore_merges": True}, "whole", "whole"),
    ("a b", {}, "</s>ab", "< / s > ab"),                # text stays text
    ("a b", {"vocab": {"a": 0, "b": 1, "ab": 2}, "added_tokens": []}, "éab", "ab"),      # no such bytes
    ("Ġ Ġ,1 2", {"pre_tokenizer": DIGITS}, "a  12", "a ĠĠ 1 2"),    # cut off before the spaces are seen
    ("Ġ Ġ,1 2", {"pre_tokenizer": DIGITS}, "a  b", "a Ġ Ġ b"),
    ("a b", {"added_tokens": ADDED}, "a<x><x><x>b", "a <x><x> <x> b"),
])
def test_only_listed_pairs_are_merged_in_their_order(merges, parts, text, pieces, tmp_path):
    """As tokenizers 0.23.3 has it. (The ids are in another order than the merges.)"""
    merges = merges.split(",")
    tokens = dict.fromkeys(["<s>", "</s>", *LETTERS.values(), "whole",
                            *(merge.replace(" ", "") for merge in reversed(merges))])
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = changed(tmp_path, **{"merges": merges, "vocab": vocab} | parts)
    ids = tokenizer.encode(text)
    assert [tokenizer.names[i] for i in ids] == pieces.split()
    assert tokenizer.decode(ids) == text.removeprefix("é")


@pytest.mark.parametrize("parts, message", [
    ({"model": {"type": "WordPiece", "vocab": {}}}, "it is of kind 'WordPiece': expected byte-level or"),
    ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "its pre_tokenizer BertPreTokenizer is not"),
    ({"normalizer": {"type": "Lowercase"}}, "its normalizer Lowercase is not supported"),
    ({"post_processor": {"type": "BertProcessing"}}, "its post_processor BertProcessing"),
    ({"decoder": {"type": "WordPiece"}}, "its decoder WordPiece is not supported"),
    ({"normalizer": {"type": "NFC", "form": "D"}}, "its NFC has form, which is not known here"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": 1}}, "the add_prefix_space 1, expected true or false"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "wrap": 1}}, "its model has wrap"),
    ({"added_tokens": [{"id": 300, "content": "<x>"}]}, "has the id 300, and would get 272"),
    ({"added_tokens": [{"id": 272, "content": "<x>"}] * 2}, "has the id 272, and would get 273"),
    ({"merges": ["h e", "e x"]}, r"its merge \['e', 'x'\] is not of two tokens that make a third one"),
    ({"vocab": {"a": 1, "b": 1}}, "is not an object of tokens with an id each"),
])
def test_what_is_not_understood_is_refused_by_name(parts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        changed(tmp_path, **parts)


def test_a_sentencepiece_protobuf_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c")
    with pytest.raises(ValueError, match=r"SentencePiece protobuf\?\): expected the tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer.json and no tokenizer.model"):
        Tokenizer.from_pretrained(tmp_path / "..")


def test_bos_and_stop_ids_come_from_the_files_beside(tmp_path):
    folder, known = write_checkpoint(tmp_path / "m"), {"256": {"content": "<s>"}}
    for file, said, ids in (
            ("config.json", {"eos_token_id": 257}, (256, 257, {257})),
            ("generation_config.json", {"eos_token_id": [256, 257, 7]}, (256, 257, {7, 256, 257})),
            # a BOS token is put before a text only if the files say so
            ("tokenizer_config.json", {"added_tokens_decoder": known, "bos_token": "<s>"},
             (None, 256, {7, 256, 257}))):
        (folder / file).write_text(json.dumps(said))
        t = Tokenizer.from_pretrained(folder)
        assert (t.bos_id, t.eos_id, t.stop_ids) == ids


def test_sentencepiece_merges_prefix_and_byte_fallback():
    t = Tokenizer.from_pretrained(CASES / "tokenizer-added-normalized")
    for text, begin, pieces in (
            ("the hell", True, "▁the ▁ he ll"), ("é a", True, "▁ <0xC3> <0xA9> ▁a"), (" a", True, "▁ ▁a"),
            (" a", False, "▁a"), (" a", None, "▁ ▁a")):
        assert [t.names[i] for i in t.encode(text, begin)] == pieces.split()
    assert t.decode(t.encode("the é  a")) == "the é  a"
    assert t.decode([t.vocab["<0xC3>"], t.vocab["<0x28>"]]) == "\ufffd\ufffd"
    assert t.bos_id == 1 and t.eos_id == 2
    # Encoded apart, prompt and answer are one text: an answer goes on, and brings no second space.
    ids = encode_prompt(t, "paper", [("user", "ab")]) + encode_answer(t, "paper", "ba")
    assert t.decode(ids) == "<s> Question: ab\n\nAnswer: ba</s>"


# ---- rows and templates ----------------------------------------------------------------------------------


TURNS = [("user", "Why?"), ("assistant", "So.")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
SHARED = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS]
FORMS = {
    "columns": {"prompt": "Why?", "completion": "So."}, "alpaca": {"instruction": "Why?", "output": "So."},
    "choices": {"question": "Why?", "choices": ["No.", "So."], "answer": 1},
    "chosen": {"question": "Why?", "choices": ["No.", "So."], "response": "So."},
    "messages": {"messages": MESSAGES}, "conversations": {"conversations": SHARED},
    "lists": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
}
VALUES = ["x", "", None, True, False, 0, 1, 1.0, 0.5, [], ["x"], [1], {}, {"a": 1}, MESSAGES]
SAME, NOTHING = "the row as it is", "no example"


def read(row):
    """What is learned of a row, as [(turns, the field beside, answer)]."""
    try:
        parsed = parse_row(row)
        return [([turn[:2] for turn in parsed.turns[:i]], parsed.input, parsed.turns[i].text)
                for i in learned_answers(parsed)]
    except Unusable:
        return NOTHING


def meaning(key, value, columns):
    """What a key more means to a row, of columns or of messages."""
    if key in NEUTRAL or key == "text" or value in (None, [], {}):
        return SAME
    if value == "":
        return NOTHING if key in ("weight", "train") else SAME
    if key == "system" or key == "input" and columns:
        return key if isinstance(value, str) else NOTHING
    ones = {"weight": (1, 1.0), "train": (True,)}.get(key, ())
    return SAME if any(type(value) is type(one) and value == one for one in ones) else NOTHING


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["system", "input", "weight", "train", "tools", "history", "label", "chosen",
                                 "images", "xyz", "text", "id", "source", "score", "category", "metadata"])
def test_each_key_of_a_row_is_read_or_neutral_or_drops_it(form, key):
    row, columns = FORMS[form], form not in ("messages", "conversations", "lists")
    as_it_is = [([("user", "Why?")], "", "So.")]
    means = {SAME: as_it_is, NOTHING: NOTHING, "input": [([("user", "Why?")], "x", "So.")],
             "system": [([("system", "x"), ("user", "Why?")], "", "So.")]}
    for value in VALUES:
        assert read(row | {key: value}) == means[meaning(key, value, columns)], value
    for others in KEYS.values():            # columns of the other forms, and of other names
        for other in {*others} - row.keys() - {"system", "system_prompt", "input", "context"}:
            assert read({other: None} | row) == as_it_is
            assert read({other: "x"} | row) == NOTHING, other
    assert read({}) == read({key: "x"}) == NOTHING


@pytest.mark.parametrize("form", ["messages", "conversations"])
@pytest.mark.parametrize("key", ["weight", "train", "reasoning_content", "tool_calls", "name", "xyz", "id",
                                 "text"])
def test_each_key_of_a_message_is_read_or_neutral_or_drops_it(form, key):
    first, said = FORMS[form][form]
    for value in VALUES:
        means = meaning("xyz" if key == "text" else key, value, True)
        if key == "reasoning_content":
            means = SAME if value in (None, [], {}) or isinstance(value, str) else NOTHING
        found = read({form: [first, said | {key: value}]})
        assert found == (NOTHING if means == NOTHING else read(FORMS[form])), value
    assert read({form: [first, said | {"weight": 0}, first, said]}) == [
        ([*TURNS, TURNS[0]], "", "So.")]
    role, content = first
    for wrong in VALUES[2:]:
        assert read({form: [first | {content: wrong}, said]}) == NOTHING, wrong
        assert read({form: [first | {role: wrong}, said]}) == NOTHING, wrong


@pytest.mark.parametrize("part, text", [
    ({"type": "text", "text": "a"}, "a"), ({"text": "a"}, "a"), ({"text": "a", "image": None}, "a"),
    ({"type": "image", "text": "a"}, None), ({"type": "text", "text": "a", "image": "x"}, None),
    ({"type": "text"}, None), ({"type": "text", "text": 1}, None), ("a", None)])
def test_a_text_may_come_in_parts_of_text(part, text):
    row = {"messages": [{"role": "user", "content": [part, {"text": "c"}]}, MESSAGES[1]]}
    assert read(row) == ([([("user", text + "c")], "", "So.")] if text else NOTHING)


def test_what_stands_beside_a_conversation():
    """A column that says its first question or last answer once more is allowed; a completion's answers are
    all learned, and nothing before it."""
    assert read({"prompt": "Why?", "response": "So.", "messages": MESSAGES}) == read(FORMS["messages"])
    assert read({"prompt": "Why", "messages": MESSAGES}) == NOTHING
    system = {"role": "system", "content": "s"}
    assert read({"messages": [system, *MESSAGES], "system_prompt": "s"}) == NOTHING
    two = {"prompt": [*MESSAGES, MESSAGES[0]], "completion": [MESSAGES[1], *MESSAGES], "messages": None}
    assert [answer for _, _, answer in read(two)] == ["So.", "So."]
    assert [len(turns) for turns, _, _ in read(two | {"system": "s"})] == [4, 6]


INSTRUCTION = ("Below is an instruction that describes a task{}. Write a response that appropriately "
               "completes the request.\n\n### Instruction:\n{}\n\n{}### Response:\n").format


@pytest.mark.parametrize("template, input, said", [
    ("paper", "", "Question: {}\n\nAnswer: Yo"), ("paper", "x", "Question: {}\n\nx\n\nAnswer: Yo"),
    ("plain", "", "{}Yo"), ("alpaca", "", INSTRUCTION("", "{}", "") + "Yo"),
    ("alpaca", "x", INSTRUCTION(", paired with an input that provides further context", "{}",
                                "### Input:\nx\n\n") + "Yo"),
])
def test_templates(template, input, said, tokenizer):
    """One BOS token, one stop token, and what reads as such in a text stays text."""
    system, *turns = [("system", "Be kind."), ("user", "<s>Hi"), ("assistant", ""), ("user", "Why?</s>")]
    for more in ([], [system]):
        ids = encode_prompt(tokenizer, template, [*more, *turns], input)
        ids += encode_answer(tokenizer, template, "Yo")
        asked = "\n\n".join(text for _, text in [*more, *turns] if text)
        assert tokenizer.decode(ids) == f"<s>{said.format(asked)}</s>"
        assert (ids.count(256), ids.count(257)) == (ids[0] == 256, ids[-1] == 257) == (1, 1)
    with pytest.raises(ValueError, match=r"no special token <\|im_start\|>"):
        encode_prompt(tokenizer, "chat-chatml", turns)


def test_loading_drops_and_counts(tokenizer, tmp_path):
    said = [("a", "b"), ("", "b"), ("a", " "), ("a", ""), ("a" * 100, "b"), ("c", "d")]
    rows = [{"question": q, "answer": a} for q, a in said]
    rows.append({"messages": [{"role": "user", "content": "a"}]})
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    for n, text in (("line", lines), ("item", json.dumps(rows, indent=1))):
        (tmp_path / "data").write_text(text)
        examples, dropped = load_examples(tmp_path / "data", tokenizer, "paper", 24)    # "a" and "b" fit
        said = [tokenizer.decode(e.prompt + e.answer) for e in examples]
        assert said == [f"<s>Question: {q}\n\nAnswer: {a}</s>" for q, a in ("ab", "cd")]
        assert dropped == {"empty": [1, f"{n} 2"], "no answer": [3, f"{n} 3"], "too long": [1, f"{n} 5"]}


@pytest.mark.parametrize("content, message", [
    (b'{"question": "a", "answer": "b"}\n{', "data, line 2: not JSON"),
    (b'{"question": "\\ud800", "answer": "b"}', "data, line 1: it has half of a character"),
    (b'{"question": "a", "prompt": "a", "answer": "b"}', "dropped: 1 it has prompt and question, which say"),
    (b'\n{\n "question": "a",\n "answer": "b"\n}\n', "line 2: not JSON, an object a line or a list"),
    (b'{"data": [{"question": "a"}]}', "dropped: 1 it has data: expected messages, or one of prompt"),
    (b"\x1f\x8b\x08", "data is compressed by gzip"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "data is a Git LFS pointer, not the file that"),
    ("{}".encode("utf-16"), "data is UTF-16 text"), (b'{"question": "\xe9"}', "data is not UTF-8 text"),
    (b"[{},\n{]", "data, line 1: not JSON, an object a line or a list: .* line 2"),
    (b"", "no example left; dropped: none, it has no rows"),
])
def test_a_broken_file_is_refused_with_its_line(content, message, tokenizer, tmp_path):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_examples(tmp_path / "data", tokenizer, "paper", 40)


def test_a_pipe_is_read_once(tokenizer):
    read_end, write_end = os.pipe()
    os.write(write_end, b'\n [{"question": "a", "answer": "b"}]')
    os.close(write_end)
    assert len(load_examples(f"/dev/fd/{read_end}", tokenizer, "paper", 40)[0]) == 1
    os.close(read_end)


def test_order_is_fixed_by_seed_and_step_and_every_epoch_sees_all():
    steps = [draw(10, 4, 42, s) for s in range(5)]
    assert steps == [draw(10, 4, 42, s) for s in range(5)] != [draw(10, 4, 43, s) for s in range(5)]
    seen = sum(steps, [])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_batches_are_of_similar_length_the_longest_first():
    examples = [Example([0] * n, [1]) for n in (3, 9, 1, 7, 5)]
    assert [[len(e.prompt) for e in b] for b in batches(examples, 2)] == [[9, 7], [5, 3], [1]]
