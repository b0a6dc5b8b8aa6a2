"""One traversal: the passes over the prompt and the answer stream go through the layers together.

bitune.py runs the model once for each pass and once for the answer. But layer by layer, the answer stream
needs no more of the passes than their keys and values of the same layer. So here all tokens stand in one
line, without padding: at each layer the linears run once over all of them (fast/linear.py), attention runs
for each stream apart, and the answer stream's sees the keys and values as mixed there and then. A step reads
the weights once instead of three times, and ragged prompts cost what their tokens cost.
"""

import copy
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from bitune import nll, pad
from fast.linear import Sets
from fast.product import product
from model import ALL, Attention, may_attend


class Rows:
    """Tokens of a batch, which stand in a line, as rows (B, T) with gaps where `real` (B, T) is False. That
    is known on the CPU, so that nothing waits for a GPU."""

    def __init__(self, real, device):
        self.shape, self.whole, self.n = real.shape, bool(real.all()), int(real.sum())
        self.at = real.flatten().nonzero()[:, 0].to(device)             # (n,): their places in the rows
        self.from_line = (real.flatten().cumsum(0) - 1).clamp(min=0).to(device)     # (B T,): and back

    def rows(self, x):
        """x (1, heads, n, D) to (B, heads, T, D)."""
        x = x[0] if self.whole else x[0].index_select(1, self.from_line)
        return x.unflatten(1, self.shape).transpose(0, 1)

    def line(self, x):
        """And back."""
        x = x.transpose(0, 1).flatten(1, 2)
        return (x if self.whole else x.index_select(1, self.at))[None]


class Stream(Rows):
    """A pass over the contexts, or the answer stream: its tokens, what they see, and its adapter set."""

    def __init__(self, tokens, lengths, sees, adapter):
        self.real = torch.arange(tokens.ids.shape[1]) < torch.tensor(lengths)[:, None]
        super().__init__(self.real, tokens.ids.device)
        self.tokens, self.sees, self.adapter = tokens, sees, adapter
        self.ids, self.positions = (t.flatten()[self.at] for t in tokens)                    # (n,) each


class Streams:
    """What a traversal carries through the layers, in the place of model.py's mask and past."""

    def __init__(self, bitune, prompts, answers, asked):
        """asked (B, T): the tokens of the answer stream whose logits are wanted."""
        context, stream = bitune.lay_out(prompts, answers)
        lengths = [len(bitune.split(p)[0]) for p in prompts]
        passes = bitune.passes if any(lengths) else []
        self.bitune, self.context = copy.copy(bitune), context
        self.passes = [Stream(context, lengths, *one) for one in passes]
        lengths = [len(p) + len(a) - n for p, a, n in zip(prompts, answers, lengths)]
        self.answer = Stream(stream, lengths, "causal", bitune.answer_set)
        self.line = sorted([self.answer, *self.passes], key=lambda s: (s is not self.answer, s.adapter))
        self.line.sort(key=lambda s: s.adapter != bitune.answer_set)        # equal sets stand side by side
        self.sizes = [s.n for s in self.line]
        seen = torch.cat((context.positions, stream.positions), 1) if passes else stream.positions
        self.masks = {s: mask_of(s) for s in self.passes}
        self.masks[self.answer] = may_attend(stream.positions, seen) if passes else mask_of(self.answer)
        self.alphas = bitune.alpha() if bitune.mixes and passes else None

        first = int(asked.any(0).nonzero()[0, 0])                           # column with a wanted token
        self.asked = Rows(asked[:, first:], bitune.device)
        self.last_mask = may_attend(stream.positions[:, first:], seen)
        keep = asked[self.answer.real].nonzero()[:, 0]                      # the answer stream comes first
        self.keep = keep.to(bitune.device)

    def sets(self):
        """The adapter sets of the line, of neighbours with the same one together; None of a bare base."""
        if self.answer.adapter is None:
            return None
        parts = []
        for s in self.line:
            if parts and parts[-1][0] == s.adapter:
                parts[-1] = (s.adapter, parts[-1][1] + s.n)
            else:
                parts.append((s.adapter, s.n))
        return Sets(self.answer.adapter, parts)

    def join(self, layer, k, v):
        """Keys and values of the line (1, G, N, D), as rows by stream; the answer stream's with those of the
        context before them, mixed as `Bitune.mix` does it."""
        k, v = ({s: s.rows(part) for s, part in zip(self.line, t.split(self.sizes, 2))} for t in (k, v))
        read = [[(k[s], v[s])] for s in self.passes]
        if read:
            if self.alphas:             # of this layer alone, as if the model had no other
                self.bitune.alpha = lambda: {n: a[layer:layer + 1] for n, a in self.alphas.items()}
                read = [self.bitune.mix(read, self.context.positions)]
            (k_past, v_past), = read[0]
            k[self.answer] = torch.cat((k_past, k[self.answer]), 2)
            v[self.answer] = torch.cat((v_past, v[self.answer]), 2)
        return k, v


def mask_of(stream):
    """What scaled_dot_product_attention is told about who sees whom: where no row has gaps, it is quicker
    without a mask."""
    if stream.whole and stream.sees in ("causal", "bidirectional"):
        return stream.sees
    return may_attend(stream.tokens.positions, stream.tokens.positions, stream.sees)


class FastAttention(Attention):
    """The Attention of a model that `hasten` has been at."""

    def attend(self, q, k, v, mask, keep):
        if not isinstance(mask, Streams):
            return super().attend(q, k, v, mask, keep)
        if keep is not ALL:                                             # the last layer: the wanted tokens
            s = mask.answer
            return mask.asked.line(self.one(mask.asked.rows(q), k[s], v[s], mask.last_mask))
        outs = [s.line(self.one(s.rows(part), k[s], v[s], mask.masks[s]))
                for s, part in zip(mask.line, q.split(mask.sizes, 2))]
        return torch.cat(outs, 2)

    def one(self, q, k, v, mask):
        dtype = q.dtype
        if dtype == torch.bfloat16 and q.device.type == "cpu":      # else its backward pass takes 3 times as
            q, k, v = q.float(), k.float(), v.float()               # long, whichever CPU it is
        if isinstance(mask, str):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal",
                                                 enable_gqa=self.n_q != self.n_kv)
        else:
            out = super().attend(q, k, v, mask, ALL)
        return out.to(dtype)


# ----------------------------------------------------------------------------------------------------------
# The losses

class NLL(torch.autograd.Function):
    """-log p of the labels (n,) by a frozen head W, b on x (n, C), in float32. The logits (n, V) are never
    there at once, but some rows of them at a time: their gradient goes through W before the next ones come.
    """

    ELEMENTS = 2 ** 24          # of logits at a time

    @staticmethod
    def rows(V):
        """How many rows of V logits are there at a time."""
        return max(1, NLL.ELEMENTS // V)

    @staticmethod
    def bytes_at_once(n, V):
        """Of the logits that are there at a time, of n rows, and of their probabilities, in float32."""
        return 2 * 4 * V * min(n, NLL.rows(V))

    @staticmethod
    def forward(ctx, x, head, bias, labels):
        grad, losses = torch.empty_like(x), []
        for x_part, label, grad_part in zip(*(t.split(NLL.rows(len(head))) for t in (x, labels, grad))):
            logits = product(x_part, head, bias)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            log_sum, label = logits.logsumexp(1, keepdim=True), label[:, None]
            losses.append(log_sum - logits.gather(1, label))
            if ctx.needs_input_grad[0]:
                p = logits.sub_(log_sum).exp_()
                p.scatter_add_(1, label, p.new_full(label.shape, -1))       # d loss / d logits
                grad_part.copy_(product(p.to(head.dtype), head.t()))
        ctx.save_for_backward(grad)
        return torch.cat(losses)[:, 0]

    @staticmethod
    def backward(ctx, grad_losses):
        grad, = ctx.saved_tensors
        return (grad_losses[:, None] * grad).to(grad.dtype), None, None, None


def on_a_line(model, headless):
    """A twin of a model for tokens on a line, whose length says nothing of how far they look. It shares all
    with the model; headless, it gives hidden states (1, n, C) for logits."""
    twin = copy.copy(model)
    twin.config = replace(model.config, sliding_window=None)
    if headless:
        twin.config = replace(twin.config, tie_word_embeddings=False)
        twin._modules = model._modules | {"lm_head": nn.Identity()}
    return twin


def losses(bitune, prompts, answers):
    """`Bitune.losses` by one traversal."""
    before = [len(bitune.split(p)[1]) - 1 for p in prompts]
    labels = pad([[-100] * n + a for n, a in zip(before, answers)], -100, "cpu")
    asked = labels >= 0
    streams = Streams(bitune, prompts, [a[:-1] for a in answers], asked)
    labels, example = (t.to(bitune.device) for t in (labels[asked], asked.nonzero()[:, 0]))
    ids, positions = (torch.cat(t)[None] for t in zip(*((s.ids, s.positions) for s in streams.line)))
    model = bitune.model
    head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    frozen = not head.weight.requires_grad
    x, _ = on_a_line(model, frozen)(ids, positions, streams, streams, streams.sets(), streams.keep)
    nlls = NLL.apply(x[0], head.weight, getattr(head, "bias", None), labels) if frozen else \
        nll(x, labels[None])[0]                                                                       # (n,)
    return nlls.new_zeros(len(prompts)).index_add(0, example, nlls) / asked.sum(1).to(bitune.device)
