"""Text to ids: the kinds of tokenizer files, and rows to examples. (Golden encodings are in
test_reference.py.)"""

import json
import os

import pytest

from text.bpe import LETTERS
from text.examples import Example, batches, draw, encode_answer, encode_prompt, load_examples
from text.tokenizer import Tokenizer
from text.turns import KEYS, NEUTRAL, Unusable, learned_answers, parse_row
from tiny import write_checkpoint

BYTES = {chr(b): i for i, b in enumerate(range(33, 127))}


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.from_pretrained(write_checkpoint(tmp_path / "m"))


def tokenizer_json(folder, **change):
    """A byte-level tokenizer.json of printable ASCII with three merges, changed in parts."""
    vocab = BYTES | {"Ġ": 94, "ab": 95, "abc": 96, "whole": 97, "Ġa": 98, "bc": 99}
    spec = {
        "added_tokens": [{"id": 100, "content": "</s>", "special": True}],
        "normalizer": None,
        "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["Ġ a", "a b", "ab c"], "ignore_merges": False},
    }
    for key, value in change.items():
        spec["model" if key in spec["model"] else key] = (
            spec["model"] | {key: value} if key in spec["model"] else value
        )
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def test_ids_need_not_follow_the_merge_order(tmp_path):
    tokenizer = Tokenizer.from_pretrained(tokenizer_json(tmp_path))
    assert tokenizer.encode("abc abc") == [96, 98, BYTES["b"], BYTES["c"]]  # "Ġa" is merged first
    assert tokenizer.decode([96, 98, 100]) == "abc a</s>"
    assert tokenizer.encode("</s>") == [BYTES[c] for c in "</s>"]  # text stays text
    assert tokenizer.encode("é") == []  # no such bytes in this vocabulary


def test_ignore_merges_takes_a_whole_word_that_no_merge_builds(tmp_path):
    assert Tokenizer.from_pretrained(tokenizer_json(tmp_path)).encode("whole") == [BYTES[c] for c in "whole"]
    assert Tokenizer.from_pretrained(tokenizer_json(tmp_path, ignore_merges=True)).encode("whole") == [97]


@pytest.mark.parametrize("merges, text, pieces", [
    ("a b, ab c", "abc", "abc"),
    ("b c, a b, ab c", "abc", "a bc"),                      # its bytes are never merged to the token abc,
    ("b c, a b, c d, ab cd", "abcd", "a bc d"),             # nor to abcd
    ("b c, a b", "abc", "a bc"),                            # a pair that is not listed makes a token
    ("a b, a bc, c d, ab c, b c", "abcd", "ab cd"),         # one token by two pairs: each has its place
])
def test_only_listed_pairs_are_merged_in_their_order(merges, text, pieces, tmp_path):
    """As tokenizers 0.23.3 has it. By the ranks of what they make, each but the last would be one token."""
    tokens = [*LETTERS.values(), "ab", "abc", "bc", "cd", "abcd"]        # all bytes
    change = {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges.split(", ")}
    tokenizer = Tokenizer.from_pretrained(tokenizer_json(tmp_path, added_tokens=[], **change))
    assert [tokenizer.names[i] for i in tokenizer.encode(text)] == pieces.split()


def test_digits_are_cut_off_before_the_pattern_sees_the_spaces(tmp_path):
    """SmolLM2's form: to GPT-2's pattern the stretch before a digit ends there, so all of its spaces stay
    together."""
    digits = [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
    vocab = BYTES | {"Ġ": 94, "ĠĠ": 95, "12": 96}
    folder = tokenizer_json(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": digits},
                            model={"type": "BPE", "vocab": vocab, "merges": ["Ġ Ġ", "1 2"]},
                            added_tokens=[{"id": 97, "content": "</s>", "special": True}])
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("a  12") == [BYTES["a"], 95, BYTES["1"], BYTES["2"]]
    assert tokenizer.encode("a  b") == [BYTES["a"], 94, 94, BYTES["b"]]


def test_added_tokens_that_are_not_special_match_in_text(tmp_path):
    added = [{"id": 100 + i, "content": content, "special": i == 0}
             for i, content in enumerate(["</s>", "<x>", "<x><x>"])]
    tokenizer = Tokenizer.from_pretrained(tokenizer_json(tmp_path, added_tokens=added))
    assert tokenizer.encode("a<x><x><x>b") == [BYTES["a"], 102, 101, BYTES["b"]]
    assert tokenizer.decode([BYTES["a"], 102, 101, BYTES["b"]]) == "a<x><x><x>b"


@pytest.mark.parametrize("change, message", [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "it is of kind 'WordPiece': expected byte-level or"),
        ({"model": {"type": "Unigram", "vocab": []}}, "it is of kind 'Unigram'"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "its pre_tokenizer BertPreTokenizer is not"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer Lowercase is not supported"),
        ({"post_processor": {"type": "BertProcessing"}}, "its post_processor BertProcessing"),
        ({"decoder": {"type": "WordPiece"}}, "its decoder WordPiece is not supported"),
        ({"normalizer": {"type": "NFC", "form": "D"}}, "its NFC has form, which is not known here"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": 1}}, "the add_prefix_space 1, expected true or false"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "wrap": 1}}, "its model has wrap"),
        ({"added_tokens": [{"id": 99, "content": "</s>"}]}, "has the id 99, and would get 100"),
        ({"merges": ["a b", "b x"]}, r"its merge \['b', 'x'\] is not of two tokens that make a third one"),
        ({"vocab": BYTES | {"Ġ": 1}}, "is not an object of tokens with an id each"),
])
def test_what_is_not_understood_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tokenizer_json(tmp_path, **change))


def test_a_sentencepiece_protobuf_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>"
    )
    with pytest.raises(ValueError, match=r"SentencePiece protobuf\?\): expected the tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer.json and no tokenizer.model"):
        Tokenizer.from_pretrained(tmp_path / "..")


def test_bos_and_stop_ids_come_from_the_files_beside(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    t = Tokenizer.from_pretrained(folder)
    assert (t.bos_id, t.eos_id, t.stop_ids) == (256, 257, {257})
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 257, 7]}')
    t = Tokenizer.from_pretrained(folder)
    assert (t.eos_id, t.stop_ids) == (257, {7, 256, 257})
    (folder / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"256": {"content": "<s>"}}, "bos_token": "<s>"}'
    )
    t = Tokenizer.from_pretrained(folder)
    assert (t.bos_id, t.eos_id) == (None, 256)  # a BOS token is put before a text only if the files say so


def sentencepiece_json(folder):
    """Llama 2's form of a SentencePiece tokenizer, in small."""
    specials = ["<unk>", "<s>", "</s>"]
    tokens = [*specials, *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁ab", "ba", "▁▁"]
    sequence = lambda name, *steps: {"type": "Sequence", name: steps}
    replace = lambda text, by: {"type": "Replace", "pattern": {"String": text}, "content": by}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    spec = {
        "added_tokens": [{"id": i, "content": c, "special": True} for i, c in enumerate(specials)],
        "normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")),
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "special_tokens": {"<s>": {"ids": [1]}},
                           "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
        "decoder": sequence("decoders", replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                            strip),
        "model": {"type": "BPE", "byte_fallback": True, "merges": ["▁ a", "b a", "▁a b", "▁ ▁"],
                  "vocab": {token: i for i, token in enumerate(tokens)}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return Tokenizer.from_pretrained(folder)


def test_sentencepiece_merges_prefix_and_byte_fallback(tmp_path):
    t = sentencepiece_json(tmp_path)
    pieces = lambda ids: [t.names[i] for i in ids]
    assert pieces(t.encode("ab aba")) == ["▁ab", "▁a", "ba"]  # "b a" comes before "▁a b"
    assert pieces(t.encode("é a")) == ["▁", "<0xC3>", "<0xA9>", "▁a"]
    assert pieces(t.encode(" a")) == ["▁", "▁a"] and pieces(t.encode(" a", begin=False)) == ["▁a"]
    assert t.decode(t.encode("ab é  a")) == "ab é  a"
    assert t.decode([3 + 0xC3, 3 + 0x28]) == "\ufffd\ufffd"
    assert t.bos_id == 1 and t.eos_id == 2


def test_prompt_and_answer_join_to_the_templates_text(tmp_path):
    """Encoded apart, they still decode to one text: an answer is a continuation and brings no second
    space."""
    t = sentencepiece_json(tmp_path)
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


def test_templates(tokenizer):
    turns = [("system", "Be kind."), ("user", "Hi")]
    text = lambda name, **more: (
        tokenizer.decode(encode_prompt(tokenizer, name, turns[1:], **more))
        + tokenizer.decode(encode_answer(tokenizer, name, "Yo"))
    )
    assert text("paper") == "<s>Question: Hi\n\nAnswer: Yo</s>"
    assert text("plain") == "<s>HiYo</s>"
    below = (
        "<s>Below is an instruction that describes a task{} Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nHi\n\n{}### Response:\nYo</s>"
    ).format
    assert text("alpaca") == below(".", "")
    given = ", paired with an input that provides further context."
    assert text("alpaca", input="x") == below(given, "### Input:\nx\n\n")
    assert text("paper", input="x") == "<s>Question: Hi\n\nx\n\nAnswer: Yo</s>"
    with pytest.raises(ValueError, match=r"no special token <\|im_start\|>"):
        text("chat-chatml")
    prompt = encode_prompt(tokenizer, "plain", [*turns, ("assistant", ""), ("user", "Why?")])
    assert tokenizer.decode(prompt) == "<s>Be kind.\n\nHi\n\nWhy?"


@pytest.mark.parametrize("template", ["alpaca", "paper", "plain"])
def test_one_bos_one_stop_and_special_strings_stay_text(template, tokenizer):
    prompt, answer = (
        encode_prompt(tokenizer, template, [("user", "<s>a</s>")]),
        encode_answer(tokenizer, template, "b</s>"),
    )
    assert (prompt + answer).count(256) == (prompt + answer).count(257) == 1
    assert prompt[0] == 256 and answer[-1] == 257


def test_loading_drops_and_counts(tmp_path, tokenizer):
    rows = [
        {"question": "a", "answer": "b"},
        {"question": "", "answer": "b"},
        {"question": "a", "answer": " "},
        {"question": "a"},
        {"question": "a" * 100, "answer": "b"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"question": "c", "answer": "d"},
    ]
    for text in ("\n".join(map(json.dumps, rows)) + "\n\n", json.dumps(rows, indent=1)):
        (tmp_path / "data").write_text(text)
        examples, dropped = load_examples(
            tmp_path / "data", tokenizer, "paper", 24
        )  # what "a" and "b" come to
        assert [tokenizer.decode(e.prompt + e.answer) for e in examples] == [
            f"<s>Question: {q}\n\nAnswer: {a}</s>" for q, a in ("ab", "cd")
        ]
        n = "line" if text[0] == "{" else "item"
        assert dropped == {"empty": [1, f"{n} 2"], "no answer": [3, f"{n} 3"], "too long": [1, f"{n} 5"]}


@pytest.mark.parametrize("content, message", [
    ('{"question": "a", "answer": "b"}\n{', "data, line 2: not JSON"),
    ('{"question": "\\ud800", "answer": "b"}', "data, line 1: it has half of a character"),
    ('{"question": "a", "prompt": "a", "answer": "b"}', "dropped: 1 it has prompt and question, which say"),
    ('\n{\n "question": "a",\n "answer": "b"\n}\n', "line 2: not JSON, an object a line or a list"),
    ('{"data": [{"question": "a"}]}', "dropped: 1 it has data: expected messages, or one of prompt"),
    (b"PAR1\x15\x04", "data is a parquet file"),
    (b"\x1f\x8b\x08", "data is compressed by gzip"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "data is a Git LFS pointer, not the file that"),
    ("{}".encode("utf-16"), "data is UTF-16 text"),
    (b'{"question": "\xe9"}', "data is not UTF-8 text"),
    ("[{},\n{]", "data, line 1: not JSON, an object a line or a list: .* line 2"),
    ("", "no example left; dropped: none, it has no rows"),
])
def test_a_broken_file_is_refused_with_its_line(tmp_path, tokenizer, content, message):
    (tmp_path / "data").write_bytes(content if isinstance(content, bytes) else content.encode())
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
