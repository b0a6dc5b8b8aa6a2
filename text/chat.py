"""Chat markup: a conversation in a model's own control tokens.

How a model was trained to read a conversation is said by the chat template that comes with its tokenizer, a
program in Jinja. None is run here. Those on a closed list are known by their text, and what they make of a
conversation is written out below; any other is refused. Each was compared with transformers'
apply_chat_template (tests/chats.py). Tools, and pieces that are not text, are not supported.
"""

import hashlib
from functools import partial
from typing import NamedTuple

from text.tokenizer import Added
from text.turns import Unusable
from text.words import listed


class Special(str):
    """The name of a special token, as against the same characters in a text."""


class Mark(str):
    """A mark that is a special token where the tokenizer has one of this name, and else a text."""


class Template(NamedTuple):
    """How turns are put: `prompt` makes of turns (role, text, thoughts, ...), of which the last one asks, the
    pieces of a prompt, texts and Special tokens; `answer` makes of an answer (with its thoughts, where there
    is a place for them) what stands before the `end` token; if that is None, it is the tokenizer's own."""
    prompt: object
    answer: object
    end: str | None = None
    bos: str | None = None      # the bos_token that a chat markup begins with
    thinks: bool = False        # it has a place for thoughts
    note: str = ""              # what differs from the template as transformers reads it


def chatml(turns, default=None, thinks=False):
    """Qwen's and SmolLM2's. `default` is what stands as the system's turn where there is none. Qwen 3
    thinks: what it thought is left out of earlier turns."""
    if default is not None and turns[0][0] != "system":
        turns = [("system", default), *turns]
    asked = turns[-1][1]
    if thinks and asked.startswith("<tool_response>") and asked.endswith("</tool_response>"):
        raise Unusable("the answer of a tool, which is not supported")
    pieces = []
    for role, text, *thoughts in turns:
        if thinks and role == "assistant":
            _, text = thoughts_and_words(text, *thoughts[:1])
        pieces += [Special("<|im_start|>"), f"{role}\n{text}", Special("<|im_end|>"), "\n"]
    return [*pieces, Special("<|im_start|>"), "assistant\n"]


def thoughts_and_words(text, thoughts=None):
    """An answer's thoughts, where they do not come apart from its text, and its words."""
    if thoughts is not None or "</think>" not in text:
        return thoughts or "", text
    before, *_, words = text.split("</think>")
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), words.lstrip("\n")


def with_thoughts(text, thoughts=None):
    """Qwen 3's answer: thoughts, even if there are none, and words."""
    thoughts, words = thoughts_and_words(text, thoughts)
    thoughts, words = thoughts.strip("\n"), words.lstrip("\n")
    return f"<think>\n{thoughts}\n</think>\n\n{words}"


def llama3(turns, head=None):
    """Llama 3's; from 3.1 on a system's turn is always there, and begins with the text `head`."""
    turns = [(role, text.strip()) for role, text, *_ in turns]
    if head:
        own = turns[0][0] == "system"
        turns = [("system", head + turns[0][1] if own else head), *turns[own:]]
    pieces = [Special("<|begin_of_text|>")]
    for role, text in turns:
        pieces += [Special("<|start_header_id|>"), role, Special("<|end_header_id|>"), "\n\n" + text,
                   Special("<|eot_id|>")]
    return pieces + [Special("<|start_header_id|>"), "assistant", Special("<|end_header_id|>"), "\n\n"]


def zephyr(turns):
    pieces = []
    for role, text, *_ in turns:
        pieces += [Mark(f"<|{role}|>"), f"\n{text}", Special("</s>"), "\n"]
    return [*pieces, Mark("<|assistant|>"), "\n"]


def in_turn(turns, system=True):
    """The system's text, or None, and the other turns as (role, text). Unusable if these are not the user's
    and the assistant's in turn, or if the first is the system's, and may not be."""
    own = system and turns[0][0] == "system"
    others = [turn[:2] for turn in turns[own:]]
    if [role for role, _ in others] != ["user", "assistant"] * (len(others) // 2) + ["user"]:
        raise Unusable("it is not user, assistant, user ... in turn"
                       f"{'' if system else ', and no system'}: this chat markup has no other chat")
    return turns[0][1] if own else None, others


def gemma(turns):
    pieces = [Special("<bos>")]
    for role, text in in_turn(turns, system=False)[1]:
        name = {"assistant": "model"}.get(role, role)
        pieces += [Special("<start_of_turn>"), f"{name}\n{text.strip()}", Special("<end_of_turn>"), "\n"]
    return pieces + [Special("<start_of_turn>"), "model\n"]


def behind_a_space(text):
    return f" {text.strip()}"


def llama2(turns):
    """Llama 2's, which writes the system's text into the first question."""
    system, others = in_turn(turns)
    if system is not None:
        others[0] = ("user", f"<<SYS>>\n{system}\n<</SYS>>\n\n{others[0][1]}")
    pieces = []
    for role, text in others:
        if role == "user":
            pieces += [Special("<s>"), Mark("[INST]"), f"{behind_a_space(text)} ", Mark("[/INST]")]
        else:
            pieces += [f"{behind_a_space(text)} ", Special("</s>")]
    return pieces


def mistral(turns, answer=str, before="", after=" ", between="", system=None):
    """Mistral's, whose spaces have come and gone. The system's text stands in the first question, or in the
    last, as `system` is 0 or -1, if it may be there at all."""
    said, others = in_turn(turns, system is not None)
    if said is not None:
        others[system] = ("user", f"{said}\n\n{others[system][1]}")
    pieces = [Special("<s>")]
    for role, text in others:
        if role == "user":
            pieces += [before, Mark("[INST]"), f" {text}{after}", Mark("[/INST]")]
        else:
            pieces += [answer(text), Special("</s>"), between]
    return pieces


# Llama 3.2's template takes today's date where its caller names none. Here a prompt is the same on any day:
# it has the date that these templates fall back to.
DATED = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN2 = "You are a helpful assistant."
QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SPACE = " {}".format
CHATS = {
    "chat-llama2": Template(llama2, lambda text: f"{behind_a_space(text)} ", "</s>", "<s>"),
    "chat-llama3": Template(llama3, str.strip, "<|eot_id|>", "<|begin_of_text|>"),
    "chat-llama3.1": Template(partial(llama3, head=DATED), str.strip, "<|eot_id|>", "<|begin_of_text|>",
                              note=", of 26 Jul 2024 on any day"),
    "chat-mistral": Template(mistral, str, "</s>", "<s>"),
    "chat-mistral-first": Template(partial(mistral, between=" "), str, "</s>", "<s>"),
    "chat-mistral-v1": Template(partial(mistral, answer=SPACE, before=" ", system=0), SPACE, "</s>", "<s>"),
    "chat-mistral-v3": Template(partial(mistral, answer=behind_a_space, after="", system=-1), behind_a_space,
                                "</s>", "<s>"),
    "chat-zephyr": Template(zephyr, str, "</s>"),
    "chat-smollm2": Template(partial(chatml, default=SMOLLM2), str, "<|im_end|>"),
    "chat-qwen2": Template(partial(chatml, default=QWEN2), str, "<|im_end|>"),
    "chat-qwen2.5": Template(partial(chatml, default=QWEN25), str, "<|im_end|>"),
    "chat-qwen3": Template(partial(chatml, thinks=True), with_thoughts, "<|im_end|>", thinks=True),
    "chat-chatml": Template(chatml, str, "<|im_end|>"),
    "chat-gemma": Template(gemma, str.strip, "<end_of_turn>", "<bos>"),
}
# The templates that say so, by the start of their text's SHA-256.
KNOWN = {
    "ea2472f29dbd93c3": "chat-llama2",          # Llama 2 Chat
    "e8d5b5a546d3f19d": "chat-llama2",          # the same, in other words
    "ba03a121d097859c": "chat-llama3",          # Llama 3 Instruct
    "b48c47f644389271": "chat-llama3",          # the same, as it was first
    "93c0e9aa3629bbd7": "chat-llama3.1",        # Llama 3.1 and 3.3 Instruct
    "d82792f95932f1c9": "chat-llama3.1",        # Llama 3.2 Instruct
    "26a59556925c9873": "chat-mistral",         # Mistral 7B Instruct 0.2 and 0.3, Mixtral, as they were first
    "7e995b379ec01747": "chat-mistral-first",   # Mistral 7B Instruct 0.1, as it was first
    "bbc58aad99454df6": "chat-mistral-v1",      # Mistral 7B Instruct 0.1 and 0.2, Mixtral
    "cafb64e0e9e5fd25": "chat-mistral-v3",      # Mistral 7B Instruct 0.3, Mistral Small and Large of 2024
    "66291cf0045c2425": "chat-zephyr",          # Zephyr 7B, TinyLlama Chat
    "872be49dbb638044": "chat-smollm2",         # SmolLM2 Instruct
    "793202280c0910ab": "chat-qwen2",           # Qwen2
    "4039eed0f28b7aaa": "chat-qwen2",           # Qwen2.5, the base
    "e7ef0c0550d1e3ba": "chat-qwen2",           # Qwen2.5, the base
    "55b2f4a26ac9ee71": "chat-qwen2.5",         # Qwen2.5 Instruct
    "4e9918361c284a93": "chat-qwen2.5",         # the same, in other words about tools
    "87a2728cb8dc9fe4": "chat-qwen3",           # Qwen3
    "a55ee1b1660128b7": "chat-qwen3",           # Qwen3, later
    "153280e3ff55d19d": "chat-chatml",          # ChatML, as many finetunes have it
    "58c1a1f04baa7ada": "chat-chatml",          # the same
    "ecd6ae513fe103f0": "chat-gemma",           # Gemma and Gemma 2, it
}


def own_chat(tokenizer):
    """The name in CHATS of a model's own chat template; ValueError if it has none, or another."""
    if tokenizer.chat is None:
        raise ValueError("the model comes without a chat template")
    text, bos, eos = tokenizer.chat
    name = KNOWN.get(hashlib.sha256(text.removesuffix("\n").encode()).hexdigest()[:16])
    if name is None:
        raise ValueError(f"the model's chat template, {text!r:.60}..., is not one of {listed([*CHATS], ', ')}")
    chat = CHATS[name]
    ends = chat.end if chat.end == "</s>" else eos          # as eos_token, in these templates
    for said, token, own in (("bos", chat.bos or bos, bos), ("eos", ends, eos)):
        if token != own:
            raise ValueError(f"{name} has {token} as its {said}_token, and the model's is {own!r}")
    pieces = [Special(chat.end), *chat.prompt([("user", "")])]
    plain = {t.content for t in tokenizer.parts.added if t == Added(t.content, t.id, special=True)}
    if odd := {piece for piece in pieces if is_special(piece, tokenizer)} - plain:
        raise ValueError(f"{name} needs {min(odd)} as a special token that takes no white space with it")
    return name


def is_special(piece, tokenizer):
    return isinstance(piece, Special) or isinstance(piece, Mark) and piece in tokenizer.special


def words_of(template, said):
    """What an answer says, without the thoughts that a template has a place for."""
    return thoughts_and_words(said)[1] if template in CHATS and CHATS[template].thinks else said
