"""Bitune, bidirectional instruction-tuning (Kopiczko, Blankevoort, Asano; arXiv 2405.14862): the method.

A causal decoder reads each prompt token before it has seen what follows. Bitune reads the prompt a second
time with every token in sight, and mixes what the two passes leave behind, their keys and values, into the
cache from which the answer is then written, causally as ever. A prompt x of P tokens and an answer y of A
tokens are cut like this:

    x[0] ... x[P-2]  |  x[P-1]  y[0]  y[1] ... y[A-2]
        context      |         answer stream               its logits at row i predict y[i]

    1  causal pass   context, set "answer",  a token sees itself and earlier ones   ->  K_c, V_c a layer
    2  second pass   context, set "prompt",  a token sees all of them               ->  K_b, V_b a layer
    3  mixing        K = (1 - α) K_c + α K_b         α = |θ| / (|θ| + c), one θ a layer for K, one for V
    4  answer pass   answer stream, set "answer",    causal, and attending to K, V of the context
    5  decoding      goes on from that cache like any decoder: the prompt is never read again

Shapes are model.py's (B, T, S, G, D, L, V). Positions count from the start of the prompt; -1 is padding.
"""

from collections import namedtuple
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import NONE, KVCache, extended, may_attend

# A method is how the prompt is read: each of its passes is (what a token sees, adapter set). What two passes
# leave is mixed, what one leaves is not; without any, the prompt is read with the answer, causally.
METHODS = {
    "bitune":         [("causal", "answer"), ("bidirectional", "prompt")],
    "naive-bidir":    [("bidirectional", "answer")],
    "no-mixing":      [("bidirectional", "prompt")],
    "only-causal":    [("causal", "answer"), ("causal", "prompt")],
    "shared-weights": [("causal", "answer"), ("bidirectional", "answer")],
    "anticausal":     [("causal", "answer"), ("anticausal", "prompt")],
    "causal":         [],
}
LOGITS = 2**24      # at most so many at a time: 64 MB in float32, with 128,256 words those of 130 tokens
Tokens = namedtuple("Tokens", "ids positions")               # (B, T) each, position -1 for padding


def adapter_sets(method):
    """The adapter sets that a method trains: "answer", which writes the answer, and those of its passes."""
    return list(dict.fromkeys(["answer", *(adapter for _, adapter in METHODS[method])]))


def pad(lists, fill, device):
    """Lists of whole numbers, filled up on the right, as a tensor (B, T)."""
    width = max(map(len, lists))
    return send([[*numbers] + [fill] * (width - len(numbers)) for numbers in lists], device)


def send(numbers, device):
    """Whole numbers as a tensor on a device, without waiting until a GPU is through with its work."""
    return torch.as_tensor(numbers, dtype=torch.long).to(device, non_blocking="cuda" in str(device))


class Bitune(nn.Module):
    """A decoder with its adapter sets (see `lora.add_adapter`), trained and asked by one of METHODS. Without
    a set "answer" it is the bare base that answers. c is the constant of α and where every θ starts, so that
    α starts at a half; the smaller c is, the faster a step of θ moves α."""

    def __init__(self, model, method="bitune", c=0.01):
        super().__init__()
        self.model, self.method, self.c, self.passes = model, method, float(c), METHODS[method]
        self.answer_set = "answer" if "answer" in model.sets else None         # None is the base itself
        self.mixes = len(self.passes) > 1
        if self.mixes:
            with torch.device(self.device):
                self.start_mixing()

    def twin(self, kind):
        """The same Bitune, with the same tensors, as one of a subclass, which overrides what differs."""
        twin = object.__new__(type(kind.__name__, (kind, type(self)), {}))
        vars(twin).update(vars(self))
        return twin

    def start_mixing(self):
        """The parameters of the mixing, float32 whatever the base is: one θ a layer for K, one for V."""
        start = torch.full((self.model.config.num_hidden_layers,), self.c, dtype=torch.float32)       # (L,)
        self.theta_key, self.theta_value = nn.Parameter(start), nn.Parameter(start.clone())

    @property
    def device(self):
        return self.model.model.embed_tokens.weight.device

    def split(self, prompt):
        """Where the prompt ends: its ids as (context, opening of the answer stream). The last token opens
        the stream, because its logits predict y[0]. Of a method without passes, all tokens do."""
        if not prompt:
            raise ValueError("the prompt has no tokens: expected at least one, to predict the answer from")
        cut = len(prompt) - 1 if self.passes else 0
        return prompt[:cut], prompt[cut:]

    def lay_out(self, prompts, answers):
        """Prompts and answers (lists of ids) as two Tokens, contexts and answer streams."""
        def tokens(lists, starts):
            positions = [range(start, start + len(ids)) for start, ids in zip(starts, lists)]
            return Tokens(pad(lists, 0, self.device), pad(positions, -1, self.device))

        contexts, openings = zip(*map(self.split, prompts))
        streams = [opening + answer for opening, answer in zip(openings, answers)]
        return tokens(contexts, [0] * len(contexts)), tokens(streams, map(len, contexts))

    def sight(self, positions, past, sees="causal"):
        """Who sees whom, in every pass: the mask (B, 1, T, S + T) of tokens at `positions` (B, T) over the S
        keys of a past, if there is one, and their own."""
        keys = positions if past is None else torch.cat((past.positions, positions), dim=1)
        return may_attend(positions, keys, sees)

    # ---- 1-3: read the prompt ----------------------------------------------------------------------------

    def alpha(self, read, positions):
        """The mixing coefficients α in [0, 1), by name: of the keys and of the values, (L,) each. Here they
        do not depend on what was read; the arguments are those of `mix`."""
        return {"key": self.theta_key.abs() / (self.theta_key.abs() + self.c),
                "value": self.theta_value.abs() / (self.theta_value.abs() + self.c)}

    def encode(self, context, past=None):
        """What the prompt leaves in the cache: a Past with the keys and values of the context, behind those
        of an earlier past if there is one (None if there is neither). No gradient reaches q, o and MLP of
        the last layer in the set "prompt": only K and V go on from here. While LoRA's B is zero, A has no
        gradient, and θ[0] has none either, as both passes give layer 0 the same K and V."""
        if context.ids.shape[1] == 0:
            return past
        read = self.read(context, past)
        new = self.mix(read, context.positions) if self.mixes else read[0]
        return extended(past, new, context.positions)

    def read(self, context, past=None):
        """What each pass makes of the context: L pairs (k, v), (B, G, T, D) each."""
        ids, positions = context
        return [self.model.states(ids, positions, self.sight(positions, past, sees), past, adapter, NONE)[1]
                for sees, adapter in self.passes]

    def mix(self, read, positions):
        """The keys and values of the cache, from those that each pass has read at `positions` (B, T).
        Hidden states never meet: all that the second reading has to say, it says here. RoPE has turned both
        keys already, of one position by one angle, so that to mix turned keys is to turn mixed ones."""
        causal, second = read
        alpha = self.alpha(read, positions)
        return [(blend(alpha["key"][layer], k_c, k_b), blend(alpha["value"][layer], v_c, v_b))
                for layer, ((k_c, v_c), (k_b, v_b)) in enumerate(zip(causal, second))]

    # ---- 4: the answer pass ------------------------------------------------------------------------------

    def answer_pass(self, prompts, answers, past=None):
        """The answer stream's states (B, T', C), of which the head makes logits; labels (B, T') on the CPU,
        the answer token that each state should predict, or -100; the indices of those that have one; and of
        what `extended` makes the Past of both. past: that of the contexts, if they are read already."""
        context, stream = self.lay_out(prompts, [a[:-1] for a in answers])      # nothing follows y[A-1]
        before = [len(self.split(p)[1]) - 1 for p in prompts]       # opening tokens that predict none
        labels = pad([[-100] * n + a for n, a in zip(before, answers)], -100, "cpu")[:, min(before):]
        at = tuple(send((labels >= 0).nonzero().T, self.device))
        past = self.encode(context) if past is None else past
        sees = self.sight(stream.positions, past)
        x, new = self.model.states(*stream, sees, past, self.answer_set, slice(min(before), None))
        return x, labels, at, (past, new, stream.positions)

    def forward(self, prompts, answers):
        """Logits (B, T', V) and labels (B, T') for lists of prompt ids and of answer ids."""
        x, labels, _, _ = self.answer_pass(prompts, answers)
        return self.model.head(x), labels.to(self.device)

    def score(self, prompts, answers, measure, past=None):
        """measure(logits (n, V), labels (n,)) of every answer token, as (B, T', ...), 0 where there is none.
        More logits than LOGITS are made in parts, and made again in the backward pass."""
        x, labels, at, _ = self.answer_pass(prompts, answers, past)
        x, of = x[at], send(labels[labels >= 0], self.device)                           # (N, C), (N,)
        rows = max(1, LOGITS // self.model.config.vocab_size)
        part = lambda x, labels: measure(self.model.head(x), labels)
        part = partial(checkpoint, part, use_reentrant=False) if len(x) > rows else part
        found = torch.cat([part(*pair) for pair in zip(x.split(rows), of.split(rows))])
        return found.new_zeros(*labels.shape, *found.shape[1:]).index_put(at, found)

    def losses(self, prompts, answers):
        """Each example's loss (B,): the mean cross-entropy over its own answer tokens, in float32."""
        return self.score(prompts, answers, nll).sum(1) / send([len(a) for a in answers], self.device)

    # ---- 5: decoding -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def answer(self, prompts, max_new_tokens=256, stop_ids=(), temperature=0.0, top_k=0, top_p=1.0, seed=0):
        """Answer a batch of prompts, yielding after each step a list of each one's next id, None once ended.
        One ends at a stop id, which is not yielded; all end where the longest is at the model's limit.
        temperature 0 takes the likeliest token; else one is drawn of the top_k likeliest (0: all) that make
        up the first top_p of the mass."""
        config, longest = self.model.config, max(map(len, prompts))
        config.check_length(longest + 1)
        max_new_tokens = min(max_new_tokens, config.max_length - longest)
        generator = torch.Generator(self.device).manual_seed(seed)

        x, _, at, read = self.answer_pass(prompts, [[0]] * len(prompts))        # [0] stands for y[0]
        logits = self.model.head(x[at])                                                       # (B, V)
        cache, rows = KVCache(extended(*read), max_new_tokens), list(range(len(prompts)))       # not ended
        positions = send([[len(p)] for p in prompts], self.device)                            # (B, 1)
        for step in range(max_new_tokens):
            token = sample_token(logits, temperature, top_k, top_p, generator)                # (B,)
            mask = self.sight(positions, cache)                                        # (B, 1, 1, S + 1)
            *ids, whole = torch.cat((token, mask.all()[None])).tolist()         # the one wait for a GPU
            if -1 in ids:
                raise FloatingPointError("the model gives no numbers: its logits are not finite")
            stay = [b for b, i in enumerate(ids) if i not in stop_ids]
            if len(stay) < len(rows):           # what has ended leaves the batch
                rows, ids = [rows[b] for b in stay], [ids[b] for b in stay]
                stay = send(stay, self.device)
                token, positions, mask = token[stay], positions[stay], mask[stay]
                cache.keep(stay)
            if not rows:
                return
            yield [dict(zip(rows, ids)).get(row) for row in range(len(prompts))]
            if step + 1 < max_new_tokens:
                mask = None if whole else mask  # attention is quicker without one, if it hides nothing
                logits = self.model(token[:, None], positions, mask, cache, self.answer_set)[0][:, -1]
                cache.advance(positions)
                positions = positions + 1

    def generate(self, prompts, max_new_tokens, **options):
        """The answers, as `answer` yields them, as a list of ids for each prompt."""
        steps = list(self.answer(prompts, max_new_tokens, **options))
        return [[ids[b] for ids in steps if ids[b] is not None] for b in range(len(prompts))]


def blend(a, causal, second):
    """(1 - α) K_c + α K_b in float32, then in K's dtype again."""
    a = a if a.dim() else a[None]       # a number without dimensions would be taken in K's dtype
    return ((1 - a) * causal + a * second).to(causal.dtype)


def nll(logits, labels):
    """-log p of labels (...) under logits (..., V), in float32; 0 for label -100."""
    return F.cross_entropy(logits.movedim(-1, 1).float(), labels, reduction="none")


def sample_token(logits, temperature, top_k, top_p, generator):
    """The next token of each prompt: logits (B, V) to ids (B,), -1 where they are not finite."""
    finite = logits.isfinite().all(dim=-1, keepdim=True)
    if temperature == 0:
        return torch.where(finite[:, 0], logits.argmax(dim=-1), -1)
    logits = torch.where(finite, logits.float() - logits.float().amax(dim=-1, keepdim=True), 0.0)  # <= 0
    logits, order = (logits / temperature).sort(dim=-1, descending=True)
    if top_k:
        logits[:, top_k:] = -torch.inf
    p = logits.softmax(dim=-1)
    if top_p < 1:
        p[p.cumsum(dim=-1) - p >= top_p] = 0            # drop a token once those above it make up top_p
    drawn = p / torch.empty_like(p).exponential_(generator=generator)       # as multinomial, without a wait
    token = order.gather(1, drawn.argmax(dim=-1, keepdim=True))                               # (B, 1)
    return torch.where(finite, token, -1).squeeze(1)
