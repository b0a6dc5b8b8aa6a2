"""Chat markup: a conversation in a model's own control tokens.

How a model was trained to read a conversation is said by the chat template that comes with its tokenizer, a
program in Jinja. None is run here. Those on a closed list are known by their text, and what they make of a
conversation is written out below; any other is refused. Each was compared with transformers'
apply_chat_template (tests/chats.py). Tools, and pieces that are not text, are not supported.
"""

import hashlib
from typing import NamedTuple

from text.rows import Unusable
from text.tokenizer import Added


class Special(str):
    """The name of a special token, as against the same characters in a text."""


class Chat(NamedTuple):
    """One form: `prompt` makes the pieces of a prompt, strings to encode and Special tokens, of turns (role,
    text), of which the last one asks; `answer` makes of an answer what stands before its end token."""
    prompt: object
    answer: object
    end: str
    begins: bool = False        # with the model's bos_token
    note: str = ""              # what differs from the template as transformers reads it


def chatml(default=None, thinks=False):
    """Qwen's and SmolLM2's. `default` is what stands as the system's turn where there is none. Qwen 3
    thinks: what it thought is left out of earlier turns, and is empty in an answer that has no thoughts."""
    def prompt(turns):
        if default is not None and turns[0][0] != "system":
            turns = [("system", default), *turns]
        asked = turns[-1][1]
        if thinks and asked.startswith("<tool_response>") and asked.endswith("</tool_response>"):
            raise Unusable("the answer of a tool, which is not supported")
        pieces = []
        for role, text in turns:
            said = thoughts_and_words(text)[1] if thinks and role == "assistant" else text
            pieces += [Special("<|im_start|>"), f"{role}\n{said}", Special("<|im_end|>"), "\n"]
        return [*pieces, Special("<|im_start|>"), "assistant\n"]

    def answer(text):
        if not thinks:
            return text
        thoughts, words = thoughts_and_words(text)
        thoughts, words = thoughts.strip("\n"), words.lstrip("\n")
        return f"<think>\n{thoughts}\n</think>\n\n{words}"

    return Chat(prompt, answer, "<|im_end|>")


def thoughts_and_words(text):
    if "</think>" not in text:
        return "", text
    before, *_, words = text.split("</think>")
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), words.lstrip("\n")


def llama3(head=None, note=""):
    """Llama 3's; from 3.1 on a system's turn is always there, and begins with the text `head`."""
    def prompt(turns):
        turns = [(role, text.strip()) for role, text in turns]
        if head:
            own = turns[0][0] == "system"
            turns = [("system", head + turns[0][1] if own else head), *turns[own:]]
        pieces = [Special("<|begin_of_text|>")]
        for role, text in turns:
            pieces += [Special("<|start_header_id|>"), role, Special("<|end_header_id|>"), "\n\n" + text,
                       Special("<|eot_id|>")]
        return pieces + [Special("<|start_header_id|>"), "assistant", Special("<|end_header_id|>"), "\n\n"]

    return Chat(prompt, str.strip, "<|eot_id|>", True, note)


def gemma(turns):
    """Gemma's: without a system's turn, and user and assistant, which is called model, take turns."""
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise Unusable("it is not user, assistant, user ... in turn, and no system: Gemma has no other chat")
    pieces = [Special("<bos>")]
    for role, text in turns:
        name = {"assistant": "model"}.get(role, role)
        pieces += [Special("<start_of_turn>"), f"{name}\n{text.strip()}", Special("<end_of_turn>"), "\n"]
    return pieces + [Special("<start_of_turn>"), "model\n"]


# Llama 3.2's template takes today's date where its caller names none. Here a prompt is the same on any day:
# it has the date that these templates fall back to.
DATED = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
CHATS = {
    "chat-llama3": llama3(),
    "chat-llama3.1": llama3(DATED, ", of 26 Jul 2024 on any day"),
    "chat-smollm2": chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "chat-qwen2": chatml("You are a helpful assistant."),
    "chat-qwen2.5": chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "chat-qwen3": chatml(thinks=True),
    "chat-chatml": chatml(),
    "chat-gemma": Chat(gemma, str.strip, "<end_of_turn>", begins=True),
}
# The templates that say so, by the start of their text's SHA-256.
KNOWN = {
    "ba03a121d097859c": "chat-llama3",      # Llama 3 Instruct
    "b48c47f644389271": "chat-llama3",      # the same, as it was first
    "93c0e9aa3629bbd7": "chat-llama3.1",    # Llama 3.1 and 3.3 Instruct
    "d82792f95932f1c9": "chat-llama3.1",    # Llama 3.2 Instruct
    "872be49dbb638044": "chat-smollm2",     # SmolLM2 Instruct
    "793202280c0910ab": "chat-qwen2",       # Qwen2
    "4039eed0f28b7aaa": "chat-qwen2",       # Qwen2.5, the base
    "e7ef0c0550d1e3ba": "chat-qwen2",       # Qwen2.5, the base
    "55b2f4a26ac9ee71": "chat-qwen2.5",     # Qwen2.5 Instruct
    "4e9918361c284a93": "chat-qwen2.5",     # the same, in other words about tools
    "87a2728cb8dc9fe4": "chat-qwen3",       # Qwen3
    "a55ee1b1660128b7": "chat-qwen3",       # Qwen3, later
    "153280e3ff55d19d": "chat-chatml",      # ChatML, as many finetunes have it
    "58c1a1f04baa7ada": "chat-chatml",      # the same
    "ecd6ae513fe103f0": "chat-gemma",       # Gemma and Gemma 2, it
}


def own_chat(tokenizer):
    """The name in CHATS of a model's own chat template; ValueError if it has none, or another."""
    if tokenizer.chat is None:
        raise ValueError("the model comes without a chat template")
    text, bos = tokenizer.chat
    name = KNOWN.get(hashlib.sha256(text.removesuffix("\n").encode()).hexdigest()[:16])
    if name is None:
        raise ValueError(f"the model's chat template, {text!r:.60}..., is not one of {', '.join(CHATS)}")
    first, *others = dict.fromkeys(p for p in CHATS[name].prompt([("user", "")]) if isinstance(p, Special))
    if CHATS[name].begins and bos != first:
        raise ValueError(f"{name} begins with {first}, and the model's bos_token is {bos!r}")
    plain = {t.content for t in tokenizer.parts.added if t == Added(t.content, t.id, special=True)}
    if odd := {first, *others} - plain:
        raise ValueError(f"{name} needs {min(odd)} as a special token that takes no white space with it")
    return name


def check_turns(turns):
    """Unusable for turns of which the forms above do not say what to make."""
    if odd := [role for role, _ in turns if role not in ("system", "user", "assistant")]:
        raise Unusable(f"a turn of {odd[0]!r:.40}: expected system, user and assistant")
    if turns[-1][0] != "user":
        raise Unusable("an answer to nobody: expected a turn of the user's before it")
