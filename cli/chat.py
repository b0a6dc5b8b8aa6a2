"""A conversation in the terminal, and what of its earlier rounds stays read."""

import copy
from os.path import commonprefix

from bitune import Tokens
from model import NONE, Past, may_attend
from text.chat import CHATS


def conversation(bitune, template, kind):
    """What answers in a conversation of the kind "recompute" or "alternating", or in none (None). ValueError
    for a template that does not say who speaks."""
    if kind and template not in (*CHATS, "llama3"):
        raise ValueError(f"--chat: the template {template} does not say who speaks; expected a model with a "
                         f"chat template, or --template {' or '.join(CHATS)}")
    return Alternating(bitune).bitune if kind == "alternating" else bitune


class Alternating:
    """`bitune` is a twin of a Bitune, for a conversation: where a prompt goes on from the last one and its
    answer, the keys and values of both stay, and only what is new goes through the prompt passes, with all
    before it in sight. Where it goes on otherwise, it is new from there on. (Those of an answer are its
    reading by the set "answer", made again in one pass when the next prompt comes.)"""

    def __init__(self, bitune):
        if not bitune.passes:
            raise ValueError(f"--chat alternating: method {bitune.method} has no prompt passes")
        self.bitune, self.encode_new = copy.copy(bitune), bitune.encode
        self.answer_one = self.bitune.answer                    # the twin's, which calls its encode
        self.bitune.encode, self.bitune.answer = self.encode, self.answer
        self.past, self.read, self.written = None, [], []       # ids: with keys in `past`, and after them

    def answer(self, prompts, *limits):
        """As Bitune.answer, for one prompt."""
        self.opening = prompts[0][-1:]
        for ids in self.answer_one(prompts, *limits):
            self.written += ids
            yield ids

    def encode(self, context):
        """As Bitune.encode, for one context."""
        ids = context.ids[0].tolist()
        known = len(commonprefix([ids, self.read + self.written]))
        stays = min(known, len(self.read))
        part = lambda start, end: Tokens(*(t[:, start:end] for t in context))
        past = Past([(k[:, :, :stays], v[:, :, :stays]) for k, v in self.past.layers]) if stays else None
        if known > stays:
            mask = may_attend(part(stays, known).positions, part(0, known).positions)
            _, new = self.bitune.model(*part(stays, known), mask, past, self.bitune.answer_set, NONE)
            past = Past([past.join(i, *kv) for i, kv in enumerate(new)])
        self.past = self.encode_new(part(known, None), past)
        self.read, self.written = ids, self.opening
        return self.past
