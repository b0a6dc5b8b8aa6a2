"""Chat markup: ids against transformers' apply_chat_template (chats.py makes the fixture), what is learned
of a conversation, and conversations that go on."""

import hashlib
import io
import json

import pytest
import torch

import chats
import sample
import train
from bitune import Bitune
from cli.chat import conversation
from cli.explain import causal_only
from experiments import ablate, evaluate
from experiments.evaluate import load_questions, score_text
from files.disk import write_files
from files.run import run_bytes
from text.chat import CHATS, KNOWN, Control
from text.examples import (
    encode_answer, encode_prompt, load_examples, stop_id, template_in_words, template_named,
)
from text.tokenizer import Tokenizer
from tiny import tiny_bitune, write_checkpoint

MADE = json.loads((chats.HERE / "chats.json").read_text())
NEW_LINE = [name for name in CHATS if CHATS[name].end in ("<|im_end|>", "<end_of_turn>")] + ["chat-zephyr"]


def tokenizer_of(spec, folder, **config):
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_pretrained(folder)


@pytest.mark.reference
@pytest.mark.parametrize("kind", chats.KINDS)
@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_apply_chat_template(name, kind, tmp_path):
    file, made = chats.SHARED / chats.LIKE[name], MADE["forms"][name]
    if kind == "like" and not file.is_dir():
        pytest.skip(f"no {file.name} beside the repository")
    if kind == "like" and file.name == "llama3":        # the same in its other form, which is read sooner
        tokenizer = Tokenizer.from_pretrained(file / "tokenizer.model")
    else:
        tokenizer = tokenizer_of(chats.KINDS[kind](name), tmp_path)
    asked, said = chats.conversations(name), chats.answers(name)
    assert chats.digest((asked, said)) == made["conversations"], "other conversations than the fixture's"
    for turns, ids in zip(asked, made[kind]["first"]):
        assert encode_prompt(tokenizer, name, turns) == ids, turns
    for turns, digest in zip(asked, made[kind]["ids"].split(), strict=True):
        assert chats.digest(encode_prompt(tokenizer, name, turns)) == digest, turns
    if kind == "small":         # of bytes, so that its texts are whole
        after = {"chat-mistral-first": " "}.get(name, "\n" if name in NEW_LINE else "")
        for turns, answer, digest in zip(asked, said, made["whole"].split(), strict=True):
            prompt = encode_prompt(tokenizer, name, chats.to_whole(name, turns))
            text = tokenizer.decode(prompt + encode_answer(tokenizer, name, *answer))
            assert chats.digest(text + after) == digest, (turns, answer)


# ---- which markup a model has ----------------------------------------------------------------------------

TEXT = "the text of a chat template"


@pytest.fixture
def known(monkeypatch):
    """TEXT is a chat template of a known form: known("chat-gemma")."""
    digest = hashlib.sha256(TEXT.encode()).hexdigest()[:16]
    return lambda name: monkeypatch.setitem(KNOWN, digest, name)


def test_the_list_of_templates_is_the_fixtures():
    assert KNOWN == MADE["known"] and set(KNOWN.values()) == set(CHATS)


def test_a_models_own_markup_is_found(known, tmp_path):
    known("chat-gemma")
    spec, other = chats.small("chat-gemma"), "something else"
    own = lambda template="chat", **config: template_named(template, tokenizer_of(spec, tmp_path, **config), "paper")
    assert own(chat_template=TEXT, bos_token="<bos>") == "chat-gemma"
    assert own(chat_template=TEXT + "\n", bos_token={"content": "<bos>"}, template="auto") == "chat-gemma"
    named = [{"name": "tool_use", "template": other}, {"name": "default", "template": TEXT}]
    assert own(chat_template=named, bos_token="<bos>") == "chat-gemma"
    assert own("auto", chat_template=other) == own("auto") == "paper" and own("plain") == "plain"
    with pytest.raises(ValueError, match="--template chat: the model comes without a chat template; choose"):
        own()
    with pytest.raises(ValueError, match="chat template, 'something else'..., is not one of chat-llama2, "):
        own(chat_template=other)
    with pytest.raises(ValueError, match="chat-gemma has <bos> as its bos_token, and the model's is '<s>'"):
        own(chat_template=TEXT, bos_token="<s>")
    spec["added_tokens"][1]["rstrip"] = True
    with pytest.raises(ValueError, match="chat-gemma needs <start_of_turn> as a special token that takes"):
        own(chat_template=TEXT, bos_token="<bos>")
    spec = chats.small("chat-gemma")
    (tmp_path / "chat_template.jinja").write_text(TEXT + "\n")      # comes first
    assert own(chat_template=other, bos_token="<bos>") == "chat-gemma"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    assert own("auto", chat_template=TEXT) == "paper"


def test_a_line_says_which_template_was_taken(known, tmp_path):
    known("chat-llama3.1")
    spec = chats.small("chat-llama3.1")
    tokenizer = tokenizer_of(spec, tmp_path, chat_template=TEXT, bos_token="<|begin_of_text|>")
    said = "template chat-llama3.1: the model's own chat markup, of 26 Jul 2024 on any day"
    assert template_in_words("chat-llama3.1", tokenizer) == said
    said = "template paper: the model's own chat markup is chat-llama3.1"
    assert template_in_words("paper", tokenizer) == said
    said = "template paper: the model comes without a chat template"
    assert template_in_words("paper", tokenizer_of(spec, tmp_path)) == said


@pytest.mark.parametrize("name", CHATS)
def test_no_text_makes_a_control_token(name, tmp_path):
    tokenizer = tokenizer_of(chats.small(name), tmp_path)
    controls = [p for p in CHATS[name].prompt([("user", "")]) if isinstance(p, Control)]
    turns = [("user", "".join(controls)), ("assistant", CHATS[name].end), ("user", controls[0] + "system\n")]
    count = lambda ids: [i for i in ids if i in tokenizer.special.values()]
    clean = [(role, "x") for role, _ in turns]
    assert count(encode_prompt(tokenizer, name, turns)) == count(encode_prompt(tokenizer, name, clean))
    assert count(encode_answer(tokenizer, name, CHATS[name].end)) == [stop_id(tokenizer, name)]


# ---- what is learned of a conversation -------------------------------------------------------------------


def messages(*texts, roles=("user", "assistant")):
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_every_answer_of_a_conversation_is_learned(tmp_path):
    """With all before it as its prompt; by the other templates only the last one, as ever."""
    tokenizer = tokenizer_of(chats.small("chat-chatml"), tmp_path)
    tokenizer.bos_id = tokenizer.special["<|im_start|>"]        # what a text begins with, a chat does not
    rows = [messages("a", "b", "c", "d", "a", "b"), messages("e", "f", "g"), messages("h"),
            messages("i", " ", "j", "k"), {"prompt": "l", "completion": "m", "input": "n", "system": "o"},
            {"prompt": messages("p", "q", "r")["messages"], "completion": messages("", "s")["messages"][1:]}]
    (tmp_path / "data").write_text("\n".join(map(json.dumps, rows)))
    examples, dropped = load_examples(tmp_path / "data", tokenizer, "chat-chatml", 100)
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    asked = lambda *texts: "".join(turn(("user", "assistant")[i % 2], t) for i, t in enumerate(texts))
    opening = "<|im_start|>assistant\n"
    said = [(tokenizer.decode(e.prompt).removesuffix(opening), tokenizer.decode(e.answer)) for e in examples]
    assert said == [
        (asked("a"), "b<|im_end|>"), (asked("a", "b", "c"), "d<|im_end|>"),
        (asked("a", "b", "c", "d", "a"), "b<|im_end|>"), (asked("e"), "f<|im_end|>"),
        (asked("i", " ", "j"), "k<|im_end|>"), (turn("system", "o") + asked("l\n\nn"), "m<|im_end|>"),
        (asked("p", "q", "r"), "s<|im_end|>")]
    assert dropped == {"no answer": [2, "line 3"]}
    longest = len(examples[0].prompt) + 2
    examples, dropped = load_examples(tmp_path / "data", tokenizer, "chat-chatml", longest)
    assert len(examples) == 2 and dropped["too long"] == [5, "line 1"]
    tokenizer.eos_id = 0
    examples, dropped = load_examples(tmp_path / "data", tokenizer, "plain", 100)
    assert len(examples) == 4 and tokenizer.decode(examples[0].prompt[1:]) == "a\n\nb\n\nc\n\nd\n\na"


@pytest.mark.parametrize("name, turns, reason", [
    ("chat-qwen2", ["user", "tool", "user", "assistant"], "a turn of 'tool': expected system, user and"),
    ("chat-llama2", ["user", "system", "user", "assistant"], "it is not user, assistant, user ... in turn"),
    ("chat-qwen2", ["assistant"], "empty"),
    ("chat-qwen2", ["system", "assistant"], "an answer to nobody: expected a turn of the user's before it"),
    ("chat-gemma", ["user", "user", "assistant"], "it is not user, assistant, user ... in turn"),
    ("chat-gemma", ["system", "user", "assistant"], "it is not user, assistant, user ... in turn"),
    ("chat-qwen3", ["user", "assistant"], "the answer of a tool, which is not supported"),
])
def test_turns_that_a_markup_does_not_have_are_dropped(name, turns, reason, tmp_path):
    tokenizer = tokenizer_of(chats.small(name), tmp_path)
    text = "<tool_response>a</tool_response>" if "tool" in reason else "a"
    row = {"messages": [{"role": role, "content": text} for role in turns]}
    (tmp_path / "data").write_text(json.dumps(messages("a", "b")) + "\n" + json.dumps(row))
    examples, dropped = load_examples(tmp_path / "data", tokenizer, name, 200)
    ((said, (n, place)),) = dropped.items()
    assert said.startswith(reason) and (n, place, len(examples)) == (1, "line 2", 1)
    if reason.startswith("it is not"):
        with pytest.raises(ValueError, match=f"data, line 2: {reason}"):
            load_questions(tmp_path / "data", "rows", tokenizer, name, 200)


def test_thoughts_are_qwens_alone_and_count_in_no_score(tmp_path):
    row = messages("a", "b", "c", "d")
    row["messages"][1]["reasoning_content"], row["messages"][3]["reasoning_content"] = "~", "f"
    (tmp_path / "data").write_text(json.dumps(row))
    tokenizer = tokenizer_of(chats.small("chat-qwen3"), tmp_path)
    (_, last), _ = load_examples(tmp_path / "data", tokenizer, "chat-qwen3", 100)
    assert tokenizer.decode(last.answer) == "<think>\nf\n</think>\n\nd<|im_end|>"
    assert "~" not in tokenizer.decode(last.prompt)
    (asked,), _ = load_questions(tmp_path / "data", "rows", tokenizer, "chat-qwen3", 100)
    assert score_text(asked, "<think>\n\n</think>\n\nd") == score_text(asked, "d") == {"exact_match": 1.0}
    assert score_text(asked._replace(template="plain"), "<think></think>d") == {"exact_match": 0.0}
    with pytest.raises(ValueError, match="2 'reasoning_content', for which the template has no place"):
        load_examples(tmp_path / "data", tokenizer, "chat-chatml", 100)


def test_a_long_conversation_is_encoded_once(tmp_path, monkeypatch):
    """And its ids are those of each prompt alone."""
    tokenizer, encode, seen = tokenizer_of(chats.pieces("chat-llama2"), tmp_path), Tokenizer.encode, []
    (tmp_path / "data").write_text(json.dumps(messages(*map(str, range(80)))))
    turns = [(("user", "assistant")[i % 2], str(i)) for i in range(80)]
    alone = [encode_prompt(tokenizer, "chat-llama2", turns[:i]) for i in range(1, 80, 2)]
    monkeypatch.setattr(Tokenizer, "encode", lambda *a: seen.append(a[1]) or encode(*a))
    examples, _ = load_examples(tmp_path / "data", tokenizer, "chat-llama2", 10_000)
    assert [e.prompt for e in examples] == alone and len(seen) <= 3 * 40
    seen.clear()
    examples, dropped = load_examples(tmp_path / "data", tokenizer, "chat-llama2", len(alone[3]) + 10)
    assert len(examples) == 4 and dropped == {"too long": [36, "line 1"]} and len(seen) <= 3 * 5


# ---- conversations that go on ----------------------------------------------------------------------------

FIRST, SAID, NEXT = [5, 9, 250, 3, 7, 7, 1, 80], [3, 2, 1], [11, 12, 13, 14, 80]


def alternating(*args, **options):
    bitune = tiny_bitune(*args, dtype=torch.float64, **options)
    return bitune, conversation(bitune, "chat-chatml", "alternating")


def read(alternating, prompt):
    """The keys and values that a prompt has after all that went before."""
    with torch.inference_mode():
        return alternating.encode(alternating.lay_out([prompt], [[]])[0]).layers


def assert_same(some, others):
    for pair, other in zip(some, others, strict=True):
        torch.testing.assert_close(pair, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("method", ["bitune", "naive-bidir", "no-mixing", "only-causal", "shared-weights",
                                    "anticausal"])
def test_a_first_turn_is_the_same_however_the_rest_is_read(method):
    bitune, goes_on = alternating(method)
    assert_same(read(goes_on, FIRST), bitune.encode(bitune.lay_out([FIRST], [[]])[0]).layers)
    for prompt in (FIRST, NEXT):                # that does not go on from the last one
        assert [ids for (ids,) in goes_on.answer([prompt], 5)] == bitune.generate([prompt], 5)[0]


@pytest.mark.reference          # of today's method
@pytest.mark.parametrize("method", ["bitune", "only-causal", "anticausal"])
def test_without_a_second_reading_nothing_is_lost(method):
    """α = 0: all is read causally by one set, so that what stays is what would be read again."""
    bitune = causal_only(tiny_bitune(method, dtype=torch.float64))
    goes_on = conversation(bitune, "chat-chatml", "alternating")
    prompt = FIRST
    for _ in range(3):
        said = [ids for (ids,) in goes_on.answer([prompt], 3)]
        assert said == bitune.generate([prompt], 3)[0]
        prompt = prompt + said + NEXT
        assert_same(goes_on.kept.layers,
                    bitune.encode(bitune.lay_out([goes_on.read_ids + [0]], [[]])[0]).layers)


@pytest.mark.reference          # of today's method
def test_what_was_read_and_answered_stays():
    bitune, goes_on = alternating("bitune")
    said = [ids for (ids,) in goes_on.answer([FIRST], 3)]
    before, whole = goes_on.kept.layers, FIRST + said + NEXT
    again = read(goes_on, whole)
    n, m = len(FIRST) - 1, len(FIRST) + len(said)
    assert_same([(k[:, :, :n], v[:, :, :n]) for k, v in again], before)
    with torch.inference_mode():                # what the answer pass made of its tokens
        *_, past = bitune.answer_pass([FIRST], [said + [0]])
        made = [(k[:, :, n:], v[:, :, n:]) for k, v in past.layers]
    assert_same([(k[:, :, n:m], v[:, :, n:m]) for k, v in again], made)
    fresh = bitune.encode(bitune.lay_out([whole], [[]])[0]).layers
    assert again[0][0].shape == fresh[0][0].shape and (again[1][0] - fresh[1][0]).abs().max() > 1e-3
    other = FIRST[:4] + [99] + NEXT             # goes on otherwise: new from there on
    assert_same([(k[:, :, :4], v[:, :, :4]) for k, v in read(goes_on, other)],
                [(k[:, :, :4], v[:, :, :4]) for k, v in before])


def test_a_chat_is_trained_resumed_and_held(known, tmp_path, capsys, monkeypatch):
    known("chat-chatml")
    base, run = write_checkpoint(tmp_path / "base"), tmp_path / "run"
    tokenizer_of(chats.small("chat-chatml"), base, chat_template=TEXT)
    rows = [messages("a", f"{n}", "b", "c") for n in range(9)]
    (tmp_path / "data").write_text("\n".join(map(json.dumps, rows)))
    new = ["--model", base, "--data", tmp_path / "data", "--out", run, "--steps", 2, "--save-every", 1]
    with monkeypatch.context() as patch:
        steps = iter([train.train_step])
        patch.setattr(train, "train_step", lambda *a: next(steps)(*a))      # there is one step
        with pytest.raises(StopIteration):
            train.main([str(x) for x in new])
    train.main(["--resume", str(run)])
    said = capsys.readouterr().out
    assert said.count("template chat-chatml: the model's own chat markup\n") == 2
    assert json.loads((run / "bitune.json").read_text())["template"] == "chat-chatml"
    assert json.loads((run / "settings.json").read_text())["derived"]["train_examples"] == 17

    asked = []
    monkeypatch.setattr(sample, "encode_prompt", lambda *a: asked.append(a[2]) or encode_prompt(*a))
    runs = [["--adapter", run, "--chat"], ["--adapter", run, "--chat", "alternating"],
            ["--model", base, "--chat"]]
    for how in runs:
        monkeypatch.setattr("sys.stdin", io.StringIO("d\ne\n"))
        sample.main([str(x) for x in [*how, "--system", "s", "--max-new-tokens", 3]])
        first = capsys.readouterr().out.split("\n")[0]
        assert asked[-2:] == [[("system", "s"), ("user", "d")],
                              [("system", "s"), ("user", "d"), ("assistant", first), ("user", "e")]]


def test_an_answer_is_asked_for_as_the_flags_and_the_template_say(tmp_path, monkeypatch):
    """The template's end token, which is not the model's own, ends an answer, too."""
    base, run, asked = write_checkpoint(tmp_path / "base"), tmp_path / "run", []
    end = tokenizer_of(chats.small("chat-chatml"), base).special["<|im_end|>"]
    write_files(run, run_bytes(tiny_bitune(), str(base), template="chat-chatml"))
    (tmp_path / "data").write_text(json.dumps({"prompt": "a", "completion": "b"}))

    def answer(self, prompts, max_new_tokens=256, stop_ids=(), temperature=0.0, top_k=0, top_p=1.0, seed=0):
        asked.append((max_new_tokens, {*stop_ids}, temperature, top_k, top_p, seed))
        return iter([])

    monkeypatch.setattr(Bitune, "answer", answer)
    common = [f"--adapter={run}", "--max-new-tokens=9"]
    sampling = ["--temperature=0.5", "--top-k=7", "--top-p=0.75", "--seed=3"]
    sample.main([*common, "--prompt=a", *sampling])
    evaluate.main([*common, "--task=rows", f"--data={tmp_path / 'data'}"])
    assert asked == [(9, {257, end}, 0.5, 7, 0.75, 3), (9, {257, end}, 0.0, 0, 1.0, 0)]


def test_a_grid_keeps_the_papers_words_unless_told_otherwise(known, tmp_path, monkeypatch):
    known("chat-chatml")
    base, made = write_checkpoint(tmp_path / "base"), []
    tokenizer_of(chats.small("chat-chatml"), base, chat_template=TEXT)
    monkeypatch.setattr(ablate, "grid", lambda runs, *args: made.extend(list(runs.values())[-1:]) or [])
    for more in ([], ["--template=auto"], ["--template=chat"]):
        with pytest.raises(SystemExit):                 # no run, no table
            ablate.main([f"--model={base}", f"--data={base}/config.json", f"--out={tmp_path / f'grid{len(made)}'}", *more])
    assert [s.template for s in made] == ["paper", "paper", "chat-chatml"]


def test_what_cannot_be_a_chat_is_refused(known, tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base")
    tokenizer_of(chats.small("chat-gemma"), base, chat_template=TEXT, bos_token="<bos>")

    def refusal(*flags):
        with pytest.raises(SystemExit) as end:
            sample.main(["--model", str(base), *flags])
        assert end.value.code == 2
        return capsys.readouterr().err
    assert "--chat: the template plain does not say who speaks" in refusal("--chat")
    assert "is not one of chat-llama2, " in refusal("--template", "chat")
    known("chat-gemma")
    assert "and no system: this chat markup has no other" in refusal("--system", "s")
    assert "method causal has no prompt passes" in refusal("--chat", "alternating")
