"""Chat markup: a conversation in a model's own control tokens.

The chat template that comes with a tokenizer is a program in Jinja, and none is run here. Those on a closed
list are known by their text, and what they make of a conversation stands in a table below; any other is
refused. Each was compared with transformers' apply_chat_template (tests/chats.py).
"""

import hashlib
import re
from functools import lru_cache
from typing import NamedTuple

from text.tokenizer import Added
from text.turns import Unusable
from text.words import listed

CONTROLS = re.compile(r"(<\|\w+\|>|</?s>|<bos>|<\w+_of_turn>|\[/?INST\])")
# Control tokens that a tokenizer need not have: then they are written as text.
MAY_BE_TEXT = ("[INST]", "[/INST]", "<|system|>", "<|user|>", "<|assistant|>")


class Control(str):
    """The name of a control token, as against the same characters in a text."""


class Markup(NamedTuple):
    """What one form writes for each turn, {} being its text, and in what it differs from the others."""
    user: str
    answer: str                         # the assistant's, up to its end token and what follows that
    opening: str = ""                   # what stands before an answer
    system: str | None = None
    begin: str = ""
    in_turn: bool = False               # user and assistant take turns
    question: int | None = None         # the system's text is a part of this question, the first or the last
    strips: tuple = ()                  # the roles whose texts lose their white space at both ends
    default: str | None = None          # what the system says where it says nothing
    head: str = ""                      # what stands before the system's text
    thinks: bool = False                # its answers begin with thoughts, which later prompts leave out
    note: str = ""                      # what differs from the template as transformers reads it
    known: str = ""                     # the templates that say so: of each, its text's SHA-256 begins so

    @property
    def end(self):
        """The control token that ends an answer; of words alone, none does."""
        return "".join(CONTROLS.findall(self.answer)[:1])

    def prompt(self, turns):
        """The pieces, texts and Controls, of a prompt of turns (role, text); the last asks."""
        if self.thinks and re.fullmatch("(?s)<tool_response>.*</tool_response>", turns[-1][1]):
            raise Unusable("the answer of a tool, which is not supported")
        own = turns[0][0] == "system"
        roles = [role for role, _ in turns[own:]]
        alternate = roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        if self.in_turn and (own and not self.system or not alternate):
            raise Unusable("it is not user, assistant, user ... in turn"
                           f"{'' if self.system else ', and no system'}: this chat markup has no other")
        if own and self.question is not None:
            (_, said), *turns = turns
            turns[self.question] = ("user", self.system.format(said) + turns[self.question][1])
        elif not own and self.default is not None:
            turns, own = [("system", self.default), *turns], True
        pieces = [*controls(self.begin)]
        forms = {"system": self.system, "user": self.user, "assistant": self.opening + self.answer}
        for i, (role, text) in enumerate(turns):
            text = text.strip() if role in self.strips else text
            before, after = map(controls, forms[role].split("{}"))
            pieces += [*before, self.head + text if own and i == 0 else text, *after]
        return [*pieces, *controls(self.opening)]

    def said(self, text, thoughts=None):
        """What stands before the end token of an answer."""
        thoughts, text = self.thoughts_and_words(text, thoughts)
        text = text.strip() if "assistant" in self.strips else text
        if self.thinks:
            text = "<think>\n{}\n</think>\n\n{}".format(thoughts.strip("\n"), text.lstrip("\n"))
        before, after = CONTROLS.split(self.answer)[0].split("{}")
        return before + text + after

    def thoughts_and_words(self, text, thoughts=None):
        """An answer's thoughts, which stand apart or, where there is a place for them, in its text; and its
        words."""
        if thoughts and not self.thinks:
            raise Unusable("'reasoning_content', for which the template has no place")
        if not self.thinks or thoughts is not None or "</think>" not in text:
            return thoughts or "", text
        before, *_, words = text.split("</think>")
        return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), words.lstrip("\n")


@lru_cache
def controls(markup):
    return tuple(Control(s) if i % 2 else s for i, s in enumerate(CONTROLS.split(markup)) if s)


CHATML = Markup("<|im_start|>user\n{}<|im_end|>\n", "{}<|im_end|>\n", "<|im_start|>assistant\n",
                "<|im_start|>system\n{}<|im_end|>\n")
EVERYONE = ("system", "user", "assistant")
LLAMA3 = Markup("<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>", "{}<|eot_id|>",
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
                begin="<|begin_of_text|>", strips=EVERYONE)
MISTRAL = Markup("[INST] {} [/INST]", "{}</s>", begin="<s>", in_turn=True)
CHATS = {               # docs/data.md says whose they are
    "chat-llama2": Markup("<s>[INST] {} [/INST]", " {} </s>", system="<<SYS>>\n{}\n<</SYS>>\n\n", question=0,
                          in_turn=True, strips=("user", "assistant"),
                          known="ea2472f29dbd93c3 e8d5b5a546d3f19d"),
    "chat-llama3": LLAMA3._replace(known="ba03a121d097859c b48c47f644389271"),
    # Llama 3.2's template takes today's date where its caller names none. Here a prompt is the same on any
    # day: it has the date that these templates fall back to.
    "chat-llama3.1": LLAMA3._replace(
        head="Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n", default="",
        note=", of 26 Jul 2024 on any day", known="93c0e9aa3629bbd7 d82792f95932f1c9"),
    "chat-mistral": MISTRAL._replace(known="26a59556925c9873"),
    "chat-mistral-first": MISTRAL._replace(answer="{}</s> ", known="7e995b379ec01747"),
    "chat-mistral-v1": MISTRAL._replace(user=" [INST] {} [/INST]", answer=" {}</s>", system="{}\n\n",
                                        question=0, known="bbc58aad99454df6"),
    "chat-mistral-v3": MISTRAL._replace(user="[INST] {}[/INST]", answer=" {}</s>", system="{}\n\n",
                                        question=-1, strips=("assistant",), known="cafb64e0e9e5fd25"),
    "chat-zephyr": Markup("<|user|>\n{}</s>\n", "{}</s>\n", "<|assistant|>\n", "<|system|>\n{}</s>\n",
                          known="66291cf0045c2425"),
    "chat-smollm2": CHATML._replace(known="872be49dbb638044", default="You are a helpful AI assistant named "
                                    "SmolLM, trained by Hugging Face"),
    "chat-qwen2": CHATML._replace(known="793202280c0910ab 4039eed0f28b7aaa e7ef0c0550d1e3ba",
                                  default="You are a helpful assistant."),
    "chat-qwen2.5": CHATML._replace(known="55b2f4a26ac9ee71 4e9918361c284a93", default="You are Qwen, "
                                    "created by Alibaba Cloud. You are a helpful assistant."),
    "chat-qwen3": CHATML._replace(thinks=True, known="87a2728cb8dc9fe4 a55ee1b1660128b7"),
    "chat-chatml": CHATML._replace(known="153280e3ff55d19d 58c1a1f04baa7ada"),
    "chat-gemma": Markup("<start_of_turn>user\n{}<end_of_turn>\n", "{}<end_of_turn>\n",
                         "<start_of_turn>model\n", begin="<bos>", in_turn=True, strips=EVERYONE,
                         known="ecd6ae513fe103f0"),
}
KNOWN = {digest: name for name, form in CHATS.items() for digest in form.known.split()}


def own_chat(tokenizer):
    """The name in CHATS of a model's own chat template; ValueError if it has none, or another."""
    if tokenizer.chat is None:
        raise ValueError("the model comes without a chat template")
    text, bos, eos = tokenizer.chat
    name = KNOWN.get(hashlib.sha256(text.removesuffix("\n").encode()).hexdigest()[:16])
    if name is None:
        names = listed([*CHATS], ", ")
        raise ValueError(f"the model's chat template, {text!r:.60}..., is not one of {names}")
    pieces = [*CHATS[name].prompt([("user", "")]), Control(CHATS[name].end)]
    for token, kind, own in ((pieces[0], "bos", bos), (pieces[-1], "eos", eos)):
        if token in ("<s>", "</s>", "<bos>", "<|begin_of_text|>") and token != own:
            raise ValueError(f"{name} has {token} as its {kind}_token, and the model's is {own!r}")
    plain = {t.content for t in tokenizer.all_added if t == Added(t.content, t.id, special=True)}
    if odd := {piece for piece in pieces if is_control(piece, tokenizer)} - plain:
        raise ValueError(f"{name} needs {min(odd)} as a special token that takes no white space with it")
    return name


def is_control(piece, tokenizer):
    """Whether a piece becomes a token by its name, not by its characters."""
    return isinstance(piece, Control) and (piece not in MAY_BE_TEXT or piece in tokenizer.special)
