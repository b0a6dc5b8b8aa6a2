"""Chat markup: ids against transformers' apply_chat_template (chats.py makes the fixture), what is learned
of a conversation, and conversations that go on."""

import hashlib
import io
import json
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch

import chats
import sample
import train
from bitune import Bitune
from cli.chat import conversation
from experiments import ablate, evaluate
from experiments.evaluate import load_questions, score_text
from identities import assert_same
from model import extended
from test_commands import at_step
from text.chat import CHATS, KNOWN
from text.examples import TEMPLATES, encode_answer, encode_prompt, load_data, load_examples, stop_id
from text.examples import template_named
from text.tokenizer import Tokenizer
from tiny import call, tiny_bitune, tokenizer_of, write_checkpoint, write_rows, write_run

MADE = json.loads((chats.HERE / "chats.json").read_text())
NEW_LINE = [name for name in CHATS if CHATS[name].end in ("<|im_end|>", "<end_of_turn>")] + ["chat-zephyr"]


def tokenizer_like(kind, name, folder):
    own = chats.SHARED / chats.LIKE[name]
    if kind == "like" and own.name == "llama3":         # in its other form, which is read sooner
        return Tokenizer.from_pretrained(own / "tokenizer.model")
    return tokenizer_of(chats.KINDS[kind](name), folder)


FAMILIES = [[name for name in CHATS if chats.LIKE[name] == own] for own in sorted({*chats.LIKE.values()})
            if (chats.SHARED / own).is_dir()]           # beside the repository


@pytest.mark.reference
@pytest.mark.parametrize("kind, names", [*((kind, [name]) for kind in ("small", "pieces") for name in CHATS),
                                         *(("like", names) for names in FAMILIES)])
def test_ids_are_those_of_apply_chat_template(kind, names, tmp_path):
    tokenizer = tokenizer_like(kind, names[0], tmp_path)        # of all of them: it is large
    for name in names:
        made, asked, said = MADE["forms"][name], chats.conversations(name), chats.answers(name)
        assert chats.digest((asked, said)) == made["conversations"], "other conversations than the fixture's"
        for turns, ids in zip(asked, made[kind]["first"]):
            assert encode_prompt(tokenizer, name, turns) == ids, turns
        for turns, digest in zip(asked, made[kind]["ids"].split(), strict=True):
            assert chats.digest(encode_prompt(tokenizer, name, turns)) == digest, turns
        after = {"chat-mistral-first": " "}.get(name, "\n" if name in NEW_LINE else "")
        if kind == "small":         # of bytes, so that its texts are whole
            for turns, answer, digest in zip(asked, said, made["whole"].split(), strict=True):
                prompt = encode_prompt(tokenizer, name, chats.to_whole(name, turns))
                text = tokenizer.decode(prompt + encode_answer(tokenizer, name, *answer))
                assert chats.digest(text + after) == digest, (turns, answer)


# ---- which markup a model has ----------------------------------------------------------------------------

TEXT, BOS = "the text of a chat template", {"bos_token": "<bos>"}
NAMED = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": TEXT}]


@pytest.fixture
def known(monkeypatch):
    """TEXT is a chat template of a known form: known("chat-gemma")."""
    digest = hashlib.sha256(TEXT.encode()).hexdigest()[:16]
    return lambda name: monkeypatch.setitem(KNOWN, digest, name)


def test_the_list_of_templates_is_the_fixtures():
    assert KNOWN == MADE["known"] and set(KNOWN.values()) == set(CHATS)


@pytest.mark.parametrize("word, chat, file, config, found", [
    ("chat", TEXT, None, BOS, "chat-gemma"), ("chat", NAMED, None, BOS, "chat-gemma"),
    ("auto", TEXT + "\n", None, {"bos_token": {"content": "<bos>"}}, "chat-gemma"),
    ("chat", "other", TEXT + "\n", BOS, "chat-gemma"), ("auto", TEXT, "no UTF-8: \xff", BOS, "paper"),
    ("auto", "other", None, {}, "paper"), ("auto", None, None, {}, "paper"),
    ("plain", None, None, {}, "plain"),
    ("chat", None, None, {}, "--template chat: the model comes without a chat template; choose"),
    ("chat", "other", None, {}, "chat template, 'other'..., is not one of chat-llama2, "),
    ("chat", TEXT, None, {}, "chat-gemma has <bos> as its bos_token, and the model's is None"),
    ("chat", TEXT, None, BOS | {"odd": True}, "needs <start_of_turn> as a special token that takes")])
def test_a_models_own_markup_is_found(word, chat, file, config, found, known, tmp_path):
    known("chat-gemma")
    spec = chats.small("chat-gemma")
    spec["added_tokens"][1]["rstrip"] = "odd" in config
    if file:
        (tmp_path / "chat_template.jinja").write_bytes(file.encode("latin-1"))
    tokenizer = tokenizer_of(spec, tmp_path, chat_template=chat, **config)
    with nullcontext() if found in TEMPLATES else pytest.raises(ValueError, match=found):
        assert template_named(word, tokenizer, "paper") == found


@pytest.mark.parametrize("name", CHATS)
def test_no_text_makes_a_control_token(name, tmp_path):
    tokenizer = tokenizer_of(chats.small(name), tmp_path)
    controls = chats.controls_of(name)
    turns = [("user", "".join(controls)), ("assistant", CHATS[name].end), ("user", controls[0] + "system\n")]
    count = lambda ids: [i for i in ids if i in tokenizer.special.values()]
    clean = [(role, "x") for role, _ in turns]
    assert count(encode_prompt(tokenizer, name, turns)) == count(encode_prompt(tokenizer, name, clean))
    assert count(encode_answer(tokenizer, name, CHATS[name].end)) == [stop_id(tokenizer, name)]


# ---- what is learned of a conversation -------------------------------------------------------------------

def in_turn(*texts):
    return [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def messages(*texts):
    return {"messages": [chats.message(*turn) for turn in in_turn(*texts)]}


def test_every_answer_of_a_conversation_is_learned(tmp_path):
    """With all before it as its prompt; by the other templates only the last one, as ever."""
    tokenizer = tokenizer_of(chats.small("chat-chatml"), tmp_path)
    tokenizer.bos_id = tokenizer.special["<|im_start|>"]        # what a text begins with, a chat does not
    data = write_rows(tmp_path / "data", [
        messages("a", "b", "c", "d", "a", "b"), messages("e", "f", "g"), messages("h"),
        messages("i", " ", "j", "k"), {"prompt": "l", "completion": "m", "input": "n", "system": "o"},
        {"prompt": messages("p", "q", "r")["messages"], "completion": messages("", "s")["messages"][1:]}])
    examples, dropped = load_examples(data, tokenizer, "chat-chatml", 100)
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    for example, (answer, *asked) in zip(examples, [
            ("b", "a"), ("d", "a", "b", "c"), ("b", "a", "b", "c", "d", "a"), ("f", "e"),
            ("k", "i", " ", "j"), ("m", "l\n\nn"), ("s", "p", "q", "r")], strict=True):
        prompt = "".join(turn(*asked) for asked in [("system", "o")] * (answer == "m") + in_turn(*asked))
        assert tokenizer.decode(example.prompt) == prompt + "<|im_start|>assistant\n"
        assert tokenizer.decode(example.answer) == answer + "<|im_end|>"
    assert dropped == {"no answer": [2, "line 3"]}
    examples, dropped = load_examples(data, tokenizer, "chat-chatml", len(examples[0].prompt) + 2)
    assert len(examples) == 2 and dropped["too long"] == [5, "line 1"]
    tokenizer.eos_id = 0
    examples, dropped = load_examples(data, tokenizer, "plain", 100)
    assert len(examples) == 4 and tokenizer.decode(examples[0].prompt[1:]) == "a\n\nb\n\nc\n\nd\n\na"


@pytest.mark.parametrize("name, turns, reason", [
    ("chat-qwen2", "user tool user assistant", "a turn of 'tool': expected system, user and"),
    ("chat-llama2", "user system user assistant", "it is not user, assistant, user ... in turn"),
    ("chat-gemma", "user user assistant", "it is not user, assistant, user ... in turn"),
    ("chat-mistral", "user user assistant", "it is not user, assistant, user ... in turn"),
    ("chat-gemma", "system user assistant", "it is not user, assistant, user ... in turn"),
    ("chat-qwen2", "assistant", "empty"), ("chat-qwen2", "system assistant", "an answer to nobody"),
    ("chat-qwen3", "user assistant", "the answer of a tool, which is not supported")])
def test_turns_that_a_markup_does_not_have_are_dropped(name, turns, reason, tmp_path):
    tokenizer = tokenizer_of(chats.small(name), tmp_path)
    text = "<tool_response>a</tool_response>" if reason.startswith("the answer of a tool") else "a"
    row = {"messages": [chats.message(role, text) for role in turns.split()]}
    data = write_rows(tmp_path / "data", [messages("a", "b"), row])
    examples, dropped = load_examples(data, tokenizer, name, 200)
    ((said, (n, place)),) = dropped.items()
    assert said.startswith(reason) and (n, place, len(examples)) == (1, "line 2", 1)
    if reason.startswith("it is not"):
        with pytest.raises(ValueError, match=f"data, line 2: {reason}"):
            load_questions(data, "rows", tokenizer, name, 200)


def test_thoughts_are_qwens_alone_and_count_in_no_score(tmp_path):
    turns = ("user", "a"), ("assistant", "b", "~"), ("user", "c"), ("assistant", "d", "f")
    data = write_rows(tmp_path / "data", [{"messages": [chats.message(*turn) for turn in turns]}])
    tokenizer = tokenizer_of(chats.small("chat-qwen3"), tmp_path)
    (_, last), _ = load_examples(data, tokenizer, "chat-qwen3", 100)
    assert tokenizer.decode(last.answer) == "<think>\nf\n</think>\n\nd<|im_end|>"
    assert "~" not in tokenizer.decode(last.prompt)
    (asked,), _ = load_questions(data, "rows", tokenizer, "chat-qwen3", 100)
    assert score_text(asked, "<think>\n\n</think>\n\nd") == score_text(asked, "d") == {"exact_match": 1.0}
    assert score_text(asked._replace(template="plain"), "<think></think>d") == {"exact_match": 0.0}
    for longest in (100, 3):                    # of which the first question alone is too long
        with pytest.raises(ValueError, match="2 'reasoning_content', for which the template has no place"):
            load_examples(data, tokenizer, "chat-chatml", longest)


@pytest.mark.parametrize("name", ["chat-chatml", "chat-mistral-v3"])       # the system moves on
@pytest.mark.parametrize("size, validated", [(4, 3), (3, 3), (2, 2), (0, 0)])
def test_a_conversation_is_on_one_side_of_the_split(name, size, validated, tmp_path):
    tokenizer, rows = tokenizer_of(chats.small(name), tmp_path), [*["ab"] * 34, "abcdef", *["cd"] * 3]
    rows = [{"system": "s", **messages(*row)} for row in rows]  # 40 examples, of which 4 may be validated on
    s = Namespace(data=write_rows(tmp_path / "data", rows), val_data=None, val_size=size, template=name,
                  max_length=100, task="rows")
    examples, val, _ = load_data(s, tokenizer)
    assert len(val) == validated and len(examples) == 40 - validated


def test_a_long_conversation_is_encoded_once(tmp_path, monkeypatch):
    """And its ids are those of each prompt alone."""
    tokenizer, encode, seen = tokenizer_of(chats.pieces("chat-llama2"), tmp_path), Tokenizer.encode, []
    texts = [str(i) for i in range(80)]
    data, turns = write_rows(tmp_path / "data", [messages(*texts)]), in_turn(*texts)
    alone = [encode_prompt(tokenizer, "chat-llama2", turns[:i]) for i in range(1, 80, 2)]
    monkeypatch.setattr(Tokenizer, "encode", lambda *a: seen.append(a[1]) or encode(*a))
    for limit, n, dropped in ((10_000, 40, {}), (len(alone[3]) + 10, 4, {"too long": [36, "line 1"]})):
        seen.clear()
        examples, found = load_examples(data, tokenizer, "chat-llama2", limit)
        assert [e.prompt for e in examples] == alone[:n] and found == dropped
        assert len(seen) <= 3 * (n + 1)


# ---- conversations that go on ----------------------------------------------------------------------------

FIRST, NEXT = [5, 9, 250, 3, 7, 7, 1, 80], [11, 12, 13, 14, 80]


def alternating(bitune):
    return conversation(bitune, "chat-chatml", "alternating")


def read(bitune, prompt):
    """The keys and values that a prompt has after all that went before."""
    with torch.inference_mode():
        return bitune.encode(bitune.lay_out([prompt], [[]])[0]).layers


def first(layers, n, start=0):
    return [(k[:, :, start:n], v[:, :, start:n]) for k, v in layers]


@pytest.mark.parametrize("method", ["bitune", "naive-bidir", "no-mixing", "only-causal", "shared-weights",
                                    "anticausal"])
def test_a_first_turn_is_the_same_however_the_rest_is_read(method):
    bitune = tiny_bitune(method, dtype=torch.float64)
    goes_on = alternating(bitune)
    assert_same(read(goes_on, FIRST), read(bitune, FIRST))
    for prompt in (FIRST, NEXT):                # that does not go on from the last one
        assert goes_on.generate([prompt], 5) == bitune.generate([prompt], 5)


@pytest.mark.reference          # of today's method
@pytest.mark.parametrize("method", ["bitune", "only-causal", "anticausal"])
def test_without_a_second_reading_nothing_is_lost(method):
    """α = 0: all is read causally by one set, so that what stays is what would be read again."""
    bitune = tiny_bitune(method, dtype=torch.float64).twin(evaluate.CausalOnly)
    goes_on, prompt = alternating(bitune), FIRST
    for _ in range(3):
        (said,) = goes_on.generate([prompt], 3)
        assert [said] == bitune.generate([prompt], 3)
        prompt = prompt + said + NEXT
        assert_same(goes_on.past.layers, read(bitune, goes_on.read_ids + [0]))


@pytest.mark.reference          # of today's method
def test_what_was_read_and_answered_stays():
    bitune = tiny_bitune(dtype=torch.float64)
    goes_on = alternating(bitune)
    (said,) = goes_on.generate([FIRST], 3)
    before, whole = goes_on.past.layers, FIRST + said + NEXT
    again, fresh = read(goes_on, whole), read(bitune, whole)
    n, m = len(FIRST) - 1, len(FIRST) + len(said)
    assert_same(first(again, n), before)
    with torch.inference_mode():                # what the answer pass made of its tokens
        past = extended(*bitune.answer_pass([FIRST], [said + [0]])[-1])
    assert_same(first(again, m, start=n), first(past.layers, None, start=n))
    assert again[0][0].shape == fresh[0][0].shape and (again[1][0] - fresh[1][0]).abs().max() > 1e-3
    other = FIRST[:4] + [99] + NEXT             # goes on otherwise: new from there on
    assert_same(first(read(goes_on, other), 4), first(before, 4))


def chat_model(folder, name, **config):
    """A model with TEXT as its chat template."""
    tokenizer_of(chats.small(name), write_checkpoint(folder), chat_template=TEXT, **config)
    return folder


def test_a_chat_is_trained_resumed_and_held(known, tmp_path, capsys, says, monkeypatch):
    known("chat-chatml")
    base, run = chat_model(tmp_path / "base", "chat-chatml"), tmp_path / "run"
    data = write_rows(tmp_path / "data", [messages("a", f"{n}", "b", "c") for n in range(10)])
    with at_step(1), pytest.raises(SystemExit):
        call(train, "--model", base, "--data", data, "--out", run, "--steps=2")
    call(train, "--resume", run)
    assert capsys.readouterr().out.count("template chat-chatml: the model's own chat markup\n") == 2
    assert json.loads((run / "bitune.json").read_text())["template"] == "chat-chatml"
    assert json.loads((run / "settings.json").read_text())["derived"]["train_examples"] == 18

    asked, begun = [], [("system", "s"), ("user", "d")]
    monkeypatch.setattr(sample, "encode_prompt", lambda *a: asked.append(a[2]) or encode_prompt(*a))
    for how in ([run, "--chat"], [run, "--chat=alternating"], [base, "--chat"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("d\ne\n"))
        model = "--model" if base in how else "--adapter"
        answer = says(sample, model, *how, "--system=s", "--max-new-tokens=3").out.split("\n")[0]
        assert asked[-2:] == [begun, [*begun, ("assistant", answer), ("user", "e")]]


def test_an_answer_is_asked_for_as_the_flags_and_the_template_say(tmp_path, monkeypatch):
    """The template's end token, which is not the model's own, ends an answer, too."""
    base, run, asked = chat_model(tmp_path / "base", "chat-chatml"), tmp_path / "run", []
    end = Tokenizer.from_pretrained(base).special["<|im_end|>"]
    write_run(run, tiny_bitune(), base, template="chat-chatml")
    data = write_rows(tmp_path / "data", [{"prompt": "a", "completion": "b"}])

    def answer(self, prompts, max_new_tokens=256, stop_ids=(), temperature=0.0, top_k=0, top_p=1.0, seed=0):
        asked.append((max_new_tokens, {*stop_ids}, temperature, top_k, top_p, seed))
        return iter([])

    monkeypatch.setattr(Bitune, "answer", answer)
    common = "--adapter", run, "--max-new-tokens", 9
    call(sample, *common, "--prompt=a", "--temperature=0.5", "--top-k=7", "--top-p=0.75", "--seed=3")
    call(evaluate, *common, "--task=rows", "--data", data)
    assert asked == [(9, {257, end}, 0.5, 7, 0.75, 3), (9, {257, end}, 0.0, 0, 1.0, 0)]


def test_a_grid_keeps_the_papers_words_unless_told_otherwise(known, tmp_path, monkeypatch):
    known("chat-chatml")
    base, made = chat_model(tmp_path / "base", "chat-chatml"), []
    data = write_rows(tmp_path / "data", [{"prompt": "a", "completion": "b"}])
    monkeypatch.setattr(ablate, "grid", lambda runs, *args: made.extend(list(runs.values())[-1:]) or [])
    for more in ([], ["--template=auto"], ["--template=chat"]):
        with pytest.raises(SystemExit):                 # no run, no table
            ablate.main([f"--model={base}", f"--data={data}", f"--out={tmp_path}/{more}", *more])
    assert [s.template for s in made] == ["paper", "paper", "chat-chatml"]


def test_what_cannot_be_a_chat_is_refused(known, tmp_path, exits):
    base = chat_model(tmp_path / "base", "chat-gemma", **BOS)
    for message, *flags in (("the template plain does not say who speaks", "--chat"),
                            ("is not one of chat-llama2, ", "--template=chat"),
                            ("and no system: this chat markup has no other", "--system=s"),
                            ("method causal has no prompt passes", "--chat=alternating")):
        assert message in exits(2, sample, "--model", base, *flags)
        if "one of" in message:
            known("chat-gemma")
