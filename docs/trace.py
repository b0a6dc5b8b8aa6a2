"""One example from text to loss, with all shapes: `python -m docs.trace` draws docs/trace.svg."""

from pathlib import Path

import torch

from bitune import Bitune, adapter_sets
from experiments.curves import STYLE, label
from files.checkpoint import load_base
from lora import add_adapter
from text.examples import encode_answer, encode_prompt

QUESTION = "red foxes sing, says Ann; old owls read, says Tom. What did Tom say?"
FULL, LEFT, RIGHT, TALL, STEP = (20, 700), (20, 340), (380, 340), 58, 84    # x and width; heights
GREY, BLUE, RED, MIXED = "#999999", "#4499cc", "#cc6677", "#aa66cc"
DOWN, BOTH = ["M370,62v18"], ["M190,62v18", "M550,62v18"]       # from a row to the next; ends are arrows
WAYS = [DOWN, BOTH, ["M190,62v18", "M330,60v9h220v11", "M722,30h8v252h-8"], BOTH, DOWN, DOWN, DOWN, []]
ARROW = ('<marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
         f'orient="auto"><path d="M0,0l8,4l-8,4" fill="{GREY}"/></marker>')


@torch.inference_mode()
def traced():
    """Rows of boxes, (place, colour, title, text) each, of a new Bitune on the demonstration's base."""
    model, tokenizer = load_base("experiments/demo/base", "cpu", "float32")
    for name in adapter_sets("bitune"):
        add_adapter(model, name)
    bitune, shape = Bitune(model), lambda t: " × ".join(map(str, t.shape))
    words = lambda ids: " ".join(repr(tokenizer.decode([i]))[1:-1].strip() for i in ids)
    prompt = encode_prompt(tokenizer, "paper", [("user", QUESTION)])
    answer = encode_answer(tokenizer, "paper", "old owls read.")
    context, stream = bitune.lay_out([prompt], [answer[:-1]])
    past, (first, second) = bitune.encode(context), bitune.read(context)
    x, labels, *_ = bitune.answer_pass([prompt], [answer], past)
    of, at = f"in each of {len(past.layers)} layers", stream.positions[0].tolist()
    return [
        [(FULL, GREY, "text", f"{QUESTION} → old owls read.")],
        [(FULL, GREY, f"prompt ids x: P = {len(prompt)}", f"{words(prompt[:11])} … {words(prompt[-4:])}")],
        [(LEFT, GREY, f"context, x[0 : P-1]: {shape(context.ids)}", f"{words(prompt[:6])} … Answer"),
         (RIGHT, GREY, f"stream, x[P-1], y[0 : A-1]: {shape(stream.ids)}", words(stream.ids[0].tolist()))],
        [(LEFT, BLUE, f"1  causal pass, mask {shape(bitune.sight(context.positions, None))}",
          f"K_c, V_c: {shape(first[0][0])} {of}"),
         (RIGHT, RED, "2  second pass, all in sight", f"K_b, V_b: {shape(second[0][0])} {of}")],
        [(FULL, MIXED, "3  mixing: K = (1 - α) K_c + α K_b, and V likewise; every α is 0.5 at the start",
          f"cache: K, V {shape(past.layers[0][0])} (batch × heads × tokens × size of a head) {of}")],
        [(FULL, BLUE, f"4  answer pass over it, positions {at[0]} to {at[-1]}, mask "
          f"{shape(bitune.sight(stream.positions, past))}",
          f"hidden states {shape(x)} → logits {shape(model.head(x))}")],
        [(FULL, GREY, f"labels y[0 : A]: {shape(labels)}", words(labels[0].tolist()))],
        [(FULL, GREY, "loss: the mean of -log p(y[i])", f"{bitune.losses([prompt], [answer]).item():.3f}")]]


if __name__ == "__main__":
    rows, svg = traced(), []
    for y, row, to in zip(range(16, 2000, STEP), rows, WAYS):
        for (x, width), colour, title, text in row:
            svg += [f'<rect x="{x}" y="{y}" width="{width}" height="{TALL}" rx="6" fill="{colour}" '
                    f'fill-opacity="0.18" stroke="{colour}"/>',
                    label(x + 12, y + 23, title), label(x + 12, y + 44, text)]
        svg += [f'<path transform="translate(0 {y})" d="{d}" stroke="{GREY}" fill="none" '
                'marker-end="url(#arrow)"/>' for d in to]
    head = f'<svg class="drawn" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 {STEP * len(rows) + 6}">'
    Path("docs/trace.svg").write_text("\n".join([head, STYLE, ARROW, *svg, "</svg>"]) + "\n", encoding="utf-8")
