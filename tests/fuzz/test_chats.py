"""Random conversations, in rows of several forms, by tokenizers of several kinds: what is learned is asked
as transformers' apply_chat_template asks it."""

import json
import random

import pytest

import chats
from text.examples import load_examples
from text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

# The families' templates, in short. (tests/chats.py has the published ones' results.)
IN_TURN = ("{% for m in rounds %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
           "{{ raise_exception('in turn') }}{% endif %}{% endfor %}")
NO_SYSTEM = "{% set rounds = messages %}" + IN_TURN
SYSTEM = ("{% set own = messages[0].role == 'system' %}"
          "{% set rounds = messages[1:] if own else messages %}") + IN_TURN
WORDS = ("{% set said = m.content %}{% if m.role == 'assistant' and m.reasoning_content is not string and "
         "'</think>' in said %}{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}")


def each(user, opening, begin="", before="", text="m.content", rounds="messages"):
    """A template that writes all turns alike, of the parts of strings between which role and text stand."""
    first, second, third = user
    return (f"{{{{ {begin or repr('')} }}}}{{% for m in {rounds} %}}{before}"
            f"{{{{ {first!r} + m.role + {second!r} + {text} + {third} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {opening!r} }}}}{{% endif %}}")


def instructions(question, answer):
    """A template that writes questions and answers in ways of their own, as expressions in Jinja."""
    return ("{% for m in rounds %}{% if m.role == 'user' %}{{ " + question + " }}{% else %}{{ " + answer +
            " }}{% endif %}{% endfor %}")


CHATML = (("<|im_start|>", "\n", "'<|im_end|>\n'"), "<|im_start|>assistant\n")
QWEN2 = ("('' if messages[0].role == 'system' else "
         "'<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n')")
GEMMA = each(("<start_of_turn>", "\n", "'<end_of_turn>\n'"), "<start_of_turn>model\n", "bos_token",
             text="m.content|trim", rounds="rounds").replace(
                 "m.role +", "('model' if m.role == 'assistant' else 'user') +")
LLAMA2 = ("bos_token + '[INST] ' + (('<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if own "
          "and loop.first else '') + m.content)|trim + ' [/INST]'")
MERGED = "(messages[0].content + '\n\n' if own and loop.{} else '') + m.content"
JINJA = {
    "chat-llama3": each(("<|start_header_id|>", "<|end_header_id|>\n\n", "'<|eot_id|>'"),
                        "<|start_header_id|>assistant<|end_header_id|>\n\n", "bos_token",
                        text="m.content|trim"),
    "chat-chatml": each(*CHATML), "chat-qwen2": each(*CHATML, QWEN2),
    "chat-qwen3": each(*CHATML, before=WORDS, text="said"),
    "chat-gemma": NO_SYSTEM + GEMMA,
    "chat-llama2": SYSTEM + instructions(LLAMA2, "' ' + m.content|trim + ' ' + eos_token"),
    "chat-mistral": NO_SYSTEM + "{{ bos_token }}" + instructions(
        "'[INST] ' + m.content + ' [/INST]'", "m.content + eos_token"),
    "chat-mistral-v1": SYSTEM + "{{ bos_token }}" + instructions(
        "' [INST] ' + " + MERGED.format("first") + " + ' [/INST]'", "' ' + m.content + eos_token"),
    "chat-mistral-v3": SYSTEM + "{{ bos_token }}" + instructions(
        "'[INST] ' + " + MERGED.format("last") + " + '[/INST]'", "' ' + m.content|trim + eos_token"),
    "chat-zephyr": each(("<|", "|>\n", "eos_token + '\n'"), "<|assistant|>\n"),
}


def random_spec(rng, name):
    """A tokenizer.json: of bytes, or of pieces with its dummy space by Prepend or Metaspace."""
    spec = rng.choice([chats.small, chats.pieces, chats.pieces])(name)
    if spec["normalizer"] and rng.random() < 0.6:
        scheme = rng.choice(["first", "always", "never"])
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme,
                                 "split": rng.random() < 0.5}
    return spec


def random_messages(rng, name):
    """A conversation, mostly in turn, with answers that are not to be learned."""
    messages = [chats.message("system", chats.random_text(rng))] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 4)):
        messages.append(chats.message("user", chats.random_text(rng)))
        answer = chats.answer(rng, name, chats.random_text(rng))
        messages.append(chats.message("assistant", *answer))
        if rng.random() < 0.2:
            messages[-1]["weight"] = rng.choice([0, 0, 1])
    if rng.random() < 0.1:
        messages.insert(rng.randint(0, len(messages)), chats.message("user", "a"))
    return messages


def in_a_row(rng, messages):
    """A row that says this, and the first message that is there to be learned."""
    own = messages[0]["role"] == "system" and messages[0]["content"] != "" and rng.random() < 0.5
    row, said = ({"system": messages[0]["content"]}, messages[1:]) if own else ({}, messages)
    form = rng.choice(["messages", "conversations", "lists"])
    if form == "lists":
        n = rng.randrange(1, len(said))
        return row | {"prompt": said[:n], "completion": said[n:], "messages": None}, own + n
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        said = [{"from": names.get(m["role"], m["role"]), "value": m["content"],
                 **{k: v for k, v in m.items() if k not in ("role", "content")}} for m in said]
    return row | {form: said, "id": 1}, 0


def test_prompts_are_those_of_apply_chat_template(tmp_path, request):
    learned = turned_away = 0
    for seed in range(request.config.getoption("--fuzz")):
        rng = random.Random(seed)
        name = rng.choice([*JINJA])
        (tmp_path / "tokenizer.json").write_text(json.dumps(random_spec(rng, name)))
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=JINJA[name], **chats.names(name))
        messages = random_messages(rng, name)
        row, start = in_a_row(rng, messages)
        wanted = []
        for i, message in enumerate(messages):
            asks = i > 0 and messages[i - 1]["role"] == "user"
            if i >= start and message["role"] == "assistant" and message.get("weight") != 0 and asks \
                    and message["content"].strip() and any(m["content"].strip() for m in messages[:i]):
                try:
                    wanted.append(theirs.apply_chat_template(messages[:i], add_generation_prompt=True,
                                                             return_dict=False))
                except Exception:               # raise_exception in the template
                    pass
        (tmp_path / "data").write_text(json.dumps(row))
        try:
            tokenizer = Tokenizer.from_pretrained(tmp_path)
            found, dropped = load_examples(tmp_path / "data", tokenizer, name, 10_000)
        except ValueError as problem:
            assert "no example left" in str(problem), (seed, problem)
            found, dropped = [], {}
        assert [example.prompt for example in found] == wanted, (seed, name, row)
        learned, turned_away = learned + len(found), turned_away + sum(n for n, _ in dropped.values())
    print({"prompts that are the same": learned, "turned away": turned_away})
