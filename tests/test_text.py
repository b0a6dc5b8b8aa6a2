"""Text to ids: the kinds of tokenizer files, and rows to examples. (Golden encodings are in
test_reference.py, files of others in test_files.py.)"""

import json
import os

import pytest

from text.bpe import LETTERS
from text.examples import Example, batches, draw, encode_answer, encode_prompt, load_examples
from text.tokenizer import Tokenizer
from text.turns import Unusable, learned_answers, parse_row
from tiny import CASES, tokenizer_of, write_checkpoint


def changed(folder, **parts):
    """A byte-level tokenizer with other parts, of its model or beside it."""
    spec = json.loads((CASES / "tokenizer-appended-merges/tokenizer.json").read_text())
    for key, value in parts.items():
        (spec["model"] if key in spec["model"] else spec)[key] = value
    return tokenizer_of(spec, folder)


DIGITS = {"type": "Sequence", "pretokenizers": [     # SmolLM2's
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]}
NO_HALF = {"type": "Replace", "pattern": {"Regex": r"\p{Cs}"}, "content": ""}    # of a character, that is
ADDED = [{"id": 260, "content": "<x>"}, {"id": 261, "content": "<x><x>"}]


@pytest.mark.parametrize("merges, parts, text, pieces", [
    ("Ġ a,a b,ab c", {}, "abc abc", "abc Ġa b c"),
    ("b c,a b,ab c", {}, "abc", "a bc"),                # its bytes are never merged to the token abc,
    ("b c,a b,c d,ab cd", {}, "abcd", "a bc d"),        # nor to abcd
    ("a b,a bc,c d,ab c,b c", {}, "abcd", "ab cd"),     # one token by two pairs: each has its place
    ("w h", {}, "whole", "wh o l e"), ("w h", {"ignore_merges": True}, "whole", "whole"),
    ("a b", {}, "</s>ab", "< / s > ab"),                # text stays text
    ("a b", {"vocab": {"a": 0, "b": 1, "ab": 2}, "added_tokens": []}, "éab", "ab"),      # no such bytes
    ("Ġ Ġ,1 2", {"pre_tokenizer": DIGITS}, "a  12", "a ĠĠ 1 2"),    # cut off before the spaces are seen
    ("Ġ Ġ,1 2", {"pre_tokenizer": DIGITS}, "a  b", "a Ġ Ġ b"),
    ("a b", {"added_tokens": ADDED}, "a<x><x><x>b", "a <x><x> <x> b"),
    ("a b", {"normalizer": NO_HALF}, "ab", "ab")])
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
    ({"decoder": {"type": "WordPiece"}}, "its decoder WordPiece is not supported"),
    ({"normalizer": {"type": "NFC", "form": "D"}}, "its NFC has form, which is not known here"),
    ({"normalizer": {"type": "Replace", "pattern": {"Regex": r"\p{Word}"}, "content": ""}}, "otherwise"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": 1}}, "the add_prefix_space 1, expected"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "wrap": 1}}, "its model has wrap"),
    ({"added_tokens": [{"id": 300, "content": "<x>"}]}, "has the id 300, and would get 272"),
    ({"added_tokens": [{"id": 272, "content": "<x>"}] * 2}, "has the id 272, and would get 273"),
    ({"added_tokens": [{"id": 272, "content": ""}]}, "has the id 272, and would get None"),
    ({"merges": ["h e", "e x"]}, r"its merge \['e', 'x'\] is not of two tokens that make a third one"),
    ({"vocab": {"a": 1, "b": 1}}, "is not an object of tokens with an id each")])
def test_what_is_not_understood_is_refused_by_name(parts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        changed(tmp_path, **parts)


def test_what_stands_beside_a_tokenizer_json_counts_as_in_transformers(tmp_path):
    """tokenizer_config.json: tokens of its own and other flags; without them, special_tokens_map.json. Ids
    are those of AutoTokenizer, transformers 5.24."""
    spec = json.loads((CASES / "tokenizer-appended-merges/tokenizer.json").read_text())
    n, new = len(spec["model"]["vocab"]), {"content": "<new>", "lstrip": True}
    ids = lambda text, **config: tokenizer_of(spec, tmp_path, **config).encode(text)
    (x,), more = ids("x"), {str(n): new, "1": {"content": "</s>", "rstrip": True}}
    assert ids("x <new>x", added_tokens_decoder=more) == [x, n, x]
    assert ids("</s>", added_tokens_decoder=more) == ids("</s>") != [1]         # still special
    added = tokenizer_of(spec, tmp_path, added_tokens_decoder=more).all_added
    assert [t.rstrip for t in added] == [False, True, False]
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<s>"}}')
    eos = lambda **config: tokenizer_of(spec, tmp_path, eos_token="</s>", **config).eos_id
    assert (eos(), eos(added_tokens_decoder={})) == (0, 1)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"</s>": 1, "<new>": n}))
    assert ids("x <new>x", added_tokens_decoder=more) == [x, n, x]
    for config, message in (({"added_tokens_decoder": {str(n + 1): new}}, f"and would get {n}"),
                            ({"add_prefix_space": True}, "lacks the add_prefix_space True"),
                            ({}, "added_tokens.json adds '<new>', tokenizer.json does not")):
        with pytest.raises(ValueError, match=message):
            ids("x", **config)


def test_a_sentencepiece_protobuf_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c")
    with pytest.raises(ValueError, match=r"SentencePiece protobuf\?\): expected the tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


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
NOTHING = "no example"


def read(row):
    """What is learned of a row, as [(turns, the field beside, answer)]. (In every form, with every key:
    fuzz/test_rows.py.)"""
    try:
        parsed = parse_row(row)
        return [([turn[:2] for turn in parsed.turns[:i]], parsed.input, parsed.turns[i].text)
                for i in learned_answers(parsed)]
    except Unusable:
        return NOTHING


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
    asked, said = MESSAGES
    assert read({"prompt": "Why?", "response": "So.", "messages": MESSAGES}) == [(TURNS[:1], "", "So.")]
    assert read({"prompt": "Why", "messages": MESSAGES}) == read({}) == read({"id": "x"}) == NOTHING
    assert read({"text": "Tom ate.", "prompt": "Who?", "answer": "Tom"}) == NOTHING     # it is not repeated
    assert read({"text": "Who? Tom", "prompt": "Who?", "answer": " Tom"}) != NOTHING
    twice = {"messages": [asked, said | {"weight": 0}, asked, said]}
    assert read(twice) == [([*TURNS, TURNS[0]], "", "So.")]
    said_beside = {"question": "Why?", "context": "x", "response": "So.", "system_prompt": "s"}
    assert read(said_beside) == [([("system", "s"), *TURNS[:1]], "x", "So.")]
    two = {"prompt": [asked, said, asked], "completion": [said, asked, said], "messages": None}
    assert [answer for _, _, answer in read(two)] == ["So.", "So."]
    assert [len(turns) for turns, _, _ in read(two | {"system": "s"})] == [4, 6]


INSTRUCTION = ("Below is an instruction that describes a task{}. Write a response that appropriately "
               "completes the request.\n\n### Instruction:\n{}\n\n{}### Response:\n").format


@pytest.mark.parametrize("template, input, said", [
    ("paper", "", "Question: {}\n\nAnswer: Yo"), ("paper", "x", "Question: {}\n\nx\n\nAnswer: Yo"),
    ("plain", "", "{}Yo"), ("alpaca", "", INSTRUCTION("", "{}", "") + "Yo"),
    ("alpaca", "x", INSTRUCTION(", paired with an input that provides further context", "{}",
                                "### Input:\nx\n\n") + "Yo")])
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


def test_loading_drops_and_counts(tokenizer):
    """From a pipe, which can be read once."""
    said = [("a", "b"), ("", "b"), ("a", " "), ("a", ""), ("a" * 100, "b"), ("c", "d")]
    rows = [{"question": q, "answer": a} for q, a in said]
    rows.append({"messages": [{"role": "user", "content": "a"}]})
    lines, items = "\n".join(map(json.dumps, rows)), json.dumps(rows, indent=1)
    for n, text in (("line", f"{lines}\n\n"), ("item", f"\n {items}")):
        read_end, write_end = os.pipe()
        os.write(write_end, text.encode())
        os.close(write_end)
        examples, dropped = load_examples(f"/dev/fd/{read_end}", tokenizer, "paper", 24)  # a, b fit
        os.close(read_end)
        said = [tokenizer.decode(e.prompt + e.answer) for e in examples]
        assert said == [f"<s>Question: {q}\n\nAnswer: {a}</s>" for q, a in ("ab", "cd")]
        assert dropped == {"empty": [1, f"{n} 2"], "no answer": [3, f"{n} 3"], "too long": [1, f"{n} 5"]}


@pytest.mark.parametrize("content, message", [
    (b'{"question": "\\ud800", "answer": "b"}', "data, line 1: it has half of a character"),
    (b'{"question": "a", "prompt": "a", "answer": "b"}', "dropped: 1 it has prompt and question, which say"),
    (b'\n{\n "question": "a",\n "answer": "b"\n}\n', "line 2: not JSON, an object a line or a list"),
    (b'{"question": "a"}\n[{"question": "a", "answer": "b"}]', "line 1\\); 1 a row is list, expected"),
    (b'{"data": [{"question": "a"}]}', "dropped: 1 it has data: expected messages, or one of prompt"),
    (b"\x1f\x8b\x08", "data is compressed by gzip"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "data is a Git LFS pointer, not the file that"),
    ("{}".encode("utf-16"), "data is UTF-16 text"), (b'{"question": "\xe9"}', "data is not UTF-8 text"),
    (b"\n[{},\n{]", "data, line 2: not JSON, an object a line or a list: .* line 3"),
    (b"", "no example left; dropped: none, it has no rows")])
def test_a_broken_file_is_refused_with_its_line(content, message, tokenizer, tmp_path):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_examples(tmp_path / "data", tokenizer, "paper", 40)


def test_order_is_fixed_by_seed_and_step_and_every_epoch_sees_all():
    steps = [draw(10, 4, 42, s) for s in range(5)]
    assert steps == [draw(10, 4, 42, s) for s in range(5)] != [draw(10, 4, 43, s) for s in range(5)]
    seen = sum(steps, [])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_batches_are_of_similar_length_the_longest_first():
    examples = [Example([0] * n, [1]) for n in (3, 9, 1, 7, 5)]
    assert [[len(e.prompt) for e in b] for b in batches(examples, 2)] == [[9, 7], [5, 3], [1]]
