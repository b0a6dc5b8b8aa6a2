"""Text to ids: the kinds of tokenizer files, and rows to examples. (Golden encodings are in
test_reference.py.)"""

import json

import pytest

from text.bpe import LETTERS
from text.examples import (
    batches,
    draw,
    encode_answer,
    encode_prompt,
    load_examples,
    parse_row,
    Example,
)
from text.tokenizer import Tokenizer
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
    assert tokenizer.encode("abc abc") == [
        96,
        98,
        BYTES["b"],
        BYTES["c"],
    ]  # "Ġa" is merged first, though its id is higher
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
    """As tokenizers 0.23.3 has it. tiktoken alone would make one token of each but the last."""
    tokens = [*LETTERS.values(), "ab", "abc", "bc", "cd", "abcd"]        # all bytes: tiktoken could run it
    change = {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges.split(", ")}
    tokenizer = Tokenizer.from_pretrained(tokenizer_json(tmp_path, added_tokens=[], **change))
    assert [tokenizer.names[i] for i in tokenizer.encode(text)] == pieces.split()


def test_digits_are_cut_off_before_the_pattern_sees_the_spaces(tmp_path):
    """SmolLM2's form: to GPT-2's pattern the stretch before a digit ends there, so all of its spaces stay
    together."""
    digits = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ]
    vocab = BYTES | {"Ġ": 94, "ĠĠ": 95, "12": 96}
    folder = tokenizer_json(
        tmp_path,
        pre_tokenizer={"type": "Sequence", "pretokenizers": digits},
        model={"type": "BPE", "vocab": vocab, "merges": ["Ġ Ġ", "1 2"]},
        added_tokens=[{"id": 97, "content": "</s>", "special": True}],
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("a  12") == [BYTES["a"], 95, BYTES["1"], BYTES["2"]]
    assert tokenizer.encode("a  b") == [BYTES["a"], 94, 94, BYTES["b"]]


def test_added_tokens_that_are_not_special_match_in_text(tmp_path):
    added = [
        {"id": 100, "content": "</s>", "special": True},
        {"id": 101, "content": "<x>", "special": False},
        {"id": 102, "content": "<x><x>", "special": False},
    ]
    tokenizer = Tokenizer.from_pretrained(tokenizer_json(tmp_path, added_tokens=added))
    assert tokenizer.encode("a<x><x><x>b") == [BYTES["a"], 102, 101, BYTES["b"]]
    assert tokenizer.decode([BYTES["a"], 102, 101, BYTES["b"]]) == "a<x><x><x>b"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "it is of kind 'WordPiece': expected byte-level or"),
        ({"model": {"type": "Unigram", "vocab": []}}, "it is of kind 'Unigram'"),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, "its pre_tokenizer BertPreTokenizer is not"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer Lowercase is not supported"),
        ({"post_processor": {"type": "BertProcessing"}}, "its post_processor BertProcessing"),
        ({"decoder": {"type": "WordPiece"}}, "its decoder WordPiece is not supported"),
        ({"normalizer": {"type": "NFC", "form": "D"}}, "its NFC has form, which is not known here"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": 1}}, "the add_prefix_space 1, which"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "wrap": 1}}, "its model has wrap"),
        ({"added_tokens": [{"id": 99, "content": "</s>"}]}, "has the id 99, and would get 100"),
        ({"merges": ["a b", "b x"]}, r"its merge \['b', 'x'\] is not of two tokens that make a third one"),
        ({"vocab": BYTES | {"Ġ": 1}}, "is not an object of tokens with an id each"),
    ],
)
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
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ("▁", "a", "b", "▁a", "▁ab", "ba", "▁▁"):
        vocab[piece] = len(vocab)
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "added_tokens": [
                    {"id": i, "content": c, "special": True} for i, c in enumerate(("<unk>", "<s>", "</s>"))
                ],
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Prepend", "prepend": "▁"},
                        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                    ],
                },
                "pre_tokenizer": None,
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<s>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
                },
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                        {"type": "ByteFallback"},
                        {"type": "Fuse"},
                        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                    ],
                },
                "model": {
                    "type": "BPE",
                    "vocab": vocab,
                    "merges": ["▁ a", "b a", "▁a b", "▁ ▁"],
                    "byte_fallback": True,
                },
            }
        )
    )
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
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    t.special |= {name: 300 + i for i, name in enumerate(names)}
    t.names |= {300 + i: name for i, name in enumerate(names)}
    assert t.decode(encode_prompt(t, "llama3", [("a", "b")])) == (
        "<s><|start_header_id|>a<|end_header_id|>\n\nb<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


# ---- rows and templates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "completion": "So."},
        {"prompt": "Why?", "answer": "So."},
        {"prompt": "Why?", "response": "So."},
        {"instruction": "Why?", "output": "So."},
        {"instruction": "Why?", "input": "", "output": "So."},
        {"question": "Why?", "answer": "So."},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
    ],
)
def test_all_forms_of_rows_say_the_same(row, tokenizer):
    assert parse_row(row) == ([("user", "Why?")], "", "So.")


@pytest.mark.parametrize("prompt", ["prompt", "instruction", "question"])
@pytest.mark.parametrize("second", ["input", "context"])
def test_a_second_field_is_read_beside_every_prompt(prompt, second):
    row = {prompt: "Why?", second: "It rains.", "answer": "So."}
    assert parse_row(row) == ([("user", "Why?")], "It rains.", "So.")


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
    with pytest.raises(ValueError, match=r"no special token <\|start_header_id\|>"):
        text("llama3")
    for i, name in enumerate(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")):
        tokenizer.special[name], tokenizer.names[258 + i] = 258 + i, name
    turns = [(role, f" {said}\n") for role, said in turns]      # is stripped
    chat = encode_prompt(tokenizer, "llama3", turns) + encode_answer(tokenizer, "llama3", "Yo")
    assert tokenizer.decode(chat) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
    )
    assert chat.count(256) == 1 and chat[-1] == 260


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


@pytest.mark.parametrize("line, reason", [
    ("[1]", "expected an object, got list"),
    ('{"text": "x"}', "it has text: expected messages, or one of prompt, instruction, question with one of"),
    ('{"question": 3, "answer": "b"}', "'question' is int, expected text"),
    ('{"question": null, "answer": "b"}', "it has answer: expected messages, or one of prompt"),
    ('{"messages": ["hi"]}', "'messages' is not a list of objects"),
])
def test_a_row_that_cannot_be_used_is_dropped_and_counted(tmp_path, tokenizer, line, reason):
    good = '{"question": "a", "answer": "b"}\n'
    (tmp_path / "data").write_text(f"{good}\n{line}\n{good}{line}\n")
    examples, dropped = load_examples(tmp_path / "data", tokenizer, "paper", 40)
    ((said, (n, place)),) = dropped.items()
    assert len(examples) == 2 and said.startswith(reason) and (n, place) == (2, "line 3")
    (tmp_path / "data").write_text(f" {line}" if line[0] == "{" else '{"a": 1}')
    with pytest.raises(ValueError, match="no example left; dropped: 1 .* \\(first: line 1\\)"):
        load_examples(tmp_path / "data", tokenizer, "paper", 40)


@pytest.mark.parametrize("content, message", [
    ('{"question": "a", "answer": "b"}\n{', "data, line 2: not JSON"),
    ('{"question": "\\ud800", "answer": "b"}', "data, line 1: it has half of a character"),
    ('{"question": "a", "prompt": "a", "answer": "b"}', "data, line 1: it has prompt and question, which"),
    ('\n{\n "question": "a",\n "answer": "b"\n}\n', "line 2: its objects stand on several lines, expect"),
    ('{"data": [{"question": "a"}]}', "line 1: its rows are a list under 'data': jq -c '.data\\[\\]' "),
    ('{"version": 1,\n "train": [{"question": "a"}]}', "line 1: its rows are a list under 'train'"),
    (b"PAR1\x15\x04", "is not read, as it is a parquet file: python -c .*read_parquet.*'data.jsonl'"),
    (b"\x1f\x8b\x08", "is not read, as it is compressed: gunzip -c .*data > data.jsonl"),
    ("{}".encode("utf-16"), "is not read, as it is UTF-16 text: iconv"),
    (b'{"question": "\xe9"}', "data is not UTF-8 text"),
    ("[{},\n{]", "data: not a JSON list: .* line 2"),
    ("", "no example left; dropped: none, it has no rows"),
])
def test_a_broken_file_is_refused_with_its_line(tmp_path, tokenizer, content, message):
    (tmp_path / "data").write_bytes(content if isinstance(content, bytes) else content.encode())
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
