"""A conversation in the terminal, and what of its earlier rounds stays read."""

from os.path import commonprefix

from bitune import Bitune, Tokens
from model import NONE, Past, extended
from text.chat import CHATS


def conversation(bitune, template, kind):
    """What answers in a conversation of the kind "recompute" or "alternating", or in none (None). ValueError
    for a template that does not say who speaks."""
    if kind and template not in CHATS:
        raise ValueError(f"--chat: the template {template} does not say who speaks; expected a model with a "
                         f"chat template, or --template {' or '.join(CHATS)}")
    if kind != "alternating":
        return bitune
    if not bitune.passes:
        raise ValueError(f"--chat alternating: method {bitune.method} has no prompt passes")
    alternating = bitune.twin(Alternating)
    alternating.past, alternating.read_ids, alternating.written = None, [], []
    return alternating


class Alternating(Bitune):
    """A conversation whose earlier turns stay read: only the tokens that a prompt adds to the last one and
    its answer go through the prompt passes, with all before them in sight. From the first token that is
    another than before, all is new. An answer is read by the set "answer", in one pass, when the next prompt
    comes. `past` is of the context read so far, whose ids are `read_ids`; `written` are those that came
    after."""

    def answer(self, prompts, *limits):
        """As Bitune.answer, for one prompt."""
        for ids in super().answer(prompts, *limits):
            self.written += ids
            yield ids

    def answer_pass(self, prompts, answers, past=None):
        found = super().answer_pass(prompts, answers, past)
        self.written = list(self.split(prompts[0])[1])
        return found

    def encode(self, context, past=None):
        """As Bitune.encode, for one context."""
        ids = context.ids[0].tolist()
        known = len(commonprefix([ids, self.read_ids + self.written]))
        stays = min(known, len(self.read_ids))
        part = lambda start, end: Tokens(*(t[:, start:end] for t in context))
        past = first_tokens(self.past, stays) if stays else None
        if known > stays:
            said = part(stays, known)
            mask = self.sight(said.positions, past)
            _, new = self.model.states(*said, mask, past, self.answer_set, NONE)
            past = extended(past, new, said.positions)
        self.past, self.read_ids = super().encode(part(known, None), past), ids
        return self.past


def first_tokens(past, n):
    """What a Past of one row holds of the first n tokens."""
    here = past.positions[0] < n
    return Past([(k[:, :, here], v[:, :, here]) for k, v in past.layers], past.positions[:, here])
