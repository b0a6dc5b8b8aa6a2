"""One prompt, step by step: the page that one shows a class (sample.py --explain)."""

import math

import torch

from bitune import Bitune, adapter_sets, nll
from cli.terminal import bars

SHOWN = 12          # tokens of a text, and rows of a mask, that are drawn
ANSWER = 6          # tokens of the answer whose probabilities are shown


@torch.inference_mode()
def explain(bitune, tokenizer, prompt, stop_ids=(), answer_length=ANSWER):
    """What becomes of the ids of a prompt: where it is cut, what each pass sees, the size of what it leaves
    behind, α by layer, and what the second reading changes in the first tokens of the answer, up to a stop
    id."""
    context, opening = bitune.split(prompt)
    words = lambda ids: " ".join(repr(tokenizer.decode([i]))[1:-1] for i in ids)
    sets = ", ".join(adapter_sets(bitune.method)) if bitune.answer_set else "none: the bare base"
    parts = [f"method {bitune.method}, adapter sets: {sets}",
             f"the prompt's {len(prompt)} tokens: {len(context)} of context, which the passes read, and "
             f"{len(opening)} that open the answer stream\n"
             f"    context: {cut(context, words)}\n    opening: {cut(opening, words)}"]
    answer = bitune.generate([prompt], answer_length)[0]
    answer = answer[:next((n for n, token in enumerate(answer, 1) if token in stop_ids), None)]
    titles = [f"pass {n}, set {adapter}: {sees}" for n, (sees, adapter) in enumerate(bitune.passes, 1)]
    titles = titles * bool(context) + ["the answer stream, set " + (bitune.answer_set or "none")]
    masks = zip(titles, masks_of(bitune, prompt, answer))
    parts.append("who sees whom (a row: one token; ■ what it sees, of the context and then of the stream)\n"
                 + side_by_side(masks))
    if context and bitune.passes:
        parts.append(sizes(bitune, prompt))
    if bitune.mixes:
        parts += ["α, how much of the cache comes from the second reading:\n" + bars(bitune, prompt),
                  changes(bitune, tokenizer, prompt, answer)]
    return "\n\n".join(parts)


def cut(ids, words):
    half = SHOWN // 2
    return words(ids) if len(ids) <= SHOWN else f"{words(ids[:half])} … {words(ids[-half:])}"


def masks_of(bitune, prompt, answer):
    """Who sees whom, pass by pass and then in the answer stream, of the first few tokens."""
    few, (context, stream) = SHOWN // 2, bitune.lay_out([prompt], [answer])
    past = bitune.encode(context)
    passes = bitune.passes * bool(len(bitune.split(prompt)[0]))
    masks = [bitune.sight(context.positions, None, sees)[0, 0, :few, :few] for sees, _ in passes]
    before = len(past) if past else 0                   # the stream's own keys stand behind the cache's
    seen = bitune.sight(stream.positions, past)[0, 0, :few]
    return [*masks, torch.cat((seen[:, :min(few, before)], seen[:, before:before + few]), dim=1)]


def side_by_side(masks):
    """Masks below their titles, as lines of squares."""
    columns = []
    for title, mask in masks:
        rows = ["".join("■ " if sees else "· " for sees in row) for row in mask.tolist()]
        width = max(map(len, [title, *rows]))
        columns.append([line.ljust(width) for line in [title, *rows]])
    height = max(map(len, columns))
    columns = [column + [" " * len(column[0])] * (height - len(column)) for column in columns]
    return "\n".join("    " + "     ".join(line).rstrip() for line in zip(*columns))


def sizes(bitune, prompt):
    """The shape of what the passes leave behind, and its bytes."""
    past = bitune.encode(bitune.lay_out([prompt], [[]])[0])
    k, _ = past.layers[0]
    L, total = len(past.layers), sum(t.numel() * t.element_size() for kv in past.layers for t in kv)
    shape = " × ".join(map(str, k.shape[1:]))
    return (f"each pass leaves behind, in each of {L} layers, K and V: {shape} (key/value heads × tokens × "
            f"size)\n    mixed, they are the cache that the answer starts from: {total:,} bytes in "
            f"{str(k.dtype).removeprefix('torch.')}")


def changes(bitune, tokenizer, prompt, answer):
    """The probability of each token of the answer that is given, with α as it is and with α = 0."""
    likely = lambda logits, labels: torch.exp(-nll(logits, labels))
    before, after = (model.score([prompt], [answer], likely)[0].tolist()
                     for model in (causal_only(bitune), bitune))
    before, after = before[-len(answer):], after[-len(answer):]
    lines = ["the answer's first tokens: how likely with the causal reading alone (α = 0), and as trained"]
    for token, p, q in zip(answer, before, after):
        gain = f"× {q / p:.3g}" if p > 0 else "× ∞"
        lines.append(f"    {tokenizer.decode([token]) or '(the end)'!r:<16} {p:>7.1%} → {q:>7.1%}   {gain}")
    lines.append(f"    all of them together: {math.prod(before):.3g} → {math.prod(after):.3g}")
    return "\n".join(lines)


class CausalOnly(Bitune):
    """α = 0: the answer reads what the first pass has left, the causal one."""

    def mix(self, read, positions):
        return read[0]


def causal_only(bitune):
    """The same Bitune with α = 0. ValueError if it mixes nothing."""
    if not bitune.mixes:
        raise ValueError(f"method {bitune.method} mixes nothing: there is no α to set to 0")
    return bitune.twin(CausalOnly)
