"""Bitune, bidirectional instruction-tuning (Kopiczko, Blankevoort, Asano; arXiv 2405.14862): the method.

A causal decoder reads each prompt token before it has seen what follows. Bitune reads the prompt a second
time with every token in sight, and mixes what the two passes leave behind, their keys and values, into the
cache from which the answer is then written, causally as ever. A prompt x of P tokens and an answer y of A
tokens are cut like this:

    x[0] ... x[P-2]  |  x[P-1]  y[0]  y[1] ... y[A-1]
        context      |         answer stream               its logits at row i predict y[i]

    1  causal pass   context, adapter set "answer",  each token sees earlier ones    ->  K_c, V_c a layer
    2  second pass   context, adapter set "prompt",  each token sees all the others  ->  K_b, V_b a layer
    3  mixing        K = (1 - α) K_c + α K_b         α = |θ| / (|θ| + c), one θ a layer for K, one for V
    4  answer pass   answer stream, set "answer",    causal, and attending to K, V of the context
    5  decoding      goes on from that cache like any decoder: the prompt is never read again

Shapes are model.py's (B, T, S, G, D, L, V). Positions count from the start of the prompt; -1 is padding.
"""

from collections import namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import NONE, KVCache, Past, may_attend

# A method is how the prompt is read: each of its passes is (what a token sees, adapter set). Two passes are
# mixed, one is taken as it is. Without any, the prompt is read with the answer: plain causal finetuning.
METHODS = {
    "bitune":         [("causal", "answer"), ("bidirectional", "prompt")],
    "naive-bidir":    [("bidirectional", "answer")],
    "no-mixing":      [("bidirectional", "prompt")],
    "only-causal":    [("causal", "answer"), ("causal", "prompt")],
    "shared-weights": [("causal", "answer"), ("bidirectional", "answer")],
    "anticausal":     [("causal", "answer"), ("anticausal", "prompt")],
    "causal":         [],
}
Tokens = namedtuple("Tokens", "ids positions")               # (B, T) each, position -1 for padding


def adapter_sets(method):
    """The adapter sets that a method trains: "answer", which writes the answer, and those of its passes."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown: expected one of {', '.join(METHODS)}")
    return list(dict.fromkeys(["answer", *(adapter for _, adapter in METHODS[method])]))


def pad(lists, fill, device):
    """Lists of whole numbers, filled up on the right, as a tensor (B, T)."""
    width = max(map(len, lists))
    padded = [[*numbers] + [fill] * (width - len(numbers)) for numbers in lists]
    return torch.tensor(padded, dtype=torch.long, device=device).view(len(lists), width)


class Bitune(nn.Module):
    """A decoder with its adapter sets (see `lora.add_adapter`), trained and asked by one of METHODS. Without
    a set "answer" it is the bare base that answers. c is the constant of α, and where every θ starts, so α
    starts at 0.5 whatever it is: c sets how fast α moves for a given learning rate. Whatever parameters an
    edit adds are trained, saved and resumed.
    """
    mixing = "abs"              # the name of how `alpha` and `mix` mix, which runs remember

    def __init__(self, model, method="bitune", c=0.01):
        super().__init__()
        lacking = [s for s in adapter_sets(method) if s not in model.sets]
        if lacking and METHODS[method]:
            raise ValueError(f"method {method!r} needs the adapter set {lacking[0]!r}: see lora.add_adapter")
        if not (isinstance(c, (int, float)) and c > 0):
            raise ValueError(f"c is {c}: expected a number above 0")
        self.model, self.method, self.c, self.passes = model, method, float(c), METHODS[method]
        self.answer_set = "answer" if "answer" in model.sets else None         # None is the base itself
        self.mixes = len(self.passes) > 1
        if self.mixes:
            with torch.device(self.device):
                self.start_mixing()

    def start_mixing(self):
        """The parameters of the mixing, float32 whatever the base is: one θ a layer for K, one for V."""
        start = torch.full((self.model.config.num_hidden_layers,), self.c, dtype=torch.float32)       # (L,)
        self.theta_key, self.theta_value = nn.Parameter(start), nn.Parameter(start.clone())

    @property
    def device(self):
        return self.model.model.embed_tokens.weight.device

    def split(self, prompt):
        """Where the prompt ends: its ids as (context, opening of the answer stream). The last token opens
        the stream, because its logits predict y[0]; without prompt passes all of them do."""
        if not prompt:
            raise ValueError("the prompt has no tokens: expected at least one, to predict the answer from")
        cut = len(prompt) - 1 if self.passes else 0
        return prompt[:cut], prompt[cut:]

    def lay_out(self, prompts, answers):
        """A batch of prompts and answers (lists of ids) as two Tokens, contexts and answer streams."""
        def tokens(lists, starts):
            positions = [range(start, start + len(ids)) for start, ids in zip(starts, lists)]
            return Tokens(pad(lists, 0, self.device), pad(positions, -1, self.device))

        contexts, openings = zip(*map(self.split, prompts))
        streams = [opening + answer for opening, answer in zip(openings, answers)]
        return tokens(contexts, [0] * len(contexts)), tokens(streams, map(len, contexts))

    # ---- 1-3: read the prompt ----------------------------------------------------------------------------

    def alpha(self):
        """The mixing coefficients α in [0, 1), by name: of the keys and of the values, (L,) each."""
        return {"key": self.theta_key.abs() / (self.theta_key.abs() + self.c),
                "value": self.theta_value.abs() / (self.theta_value.abs() + self.c)}

    def encode(self, context, past=None):
        """The keys and values of the context: a Past of L pairs (B, G, S, D), or None if that is empty. With
        a past, they follow it: the passes see in it what their mask lets them see.

        What gets no gradient: the last layer's q, o and MLP in the set "prompt", as only K and V go on from
        here. As long as B = 0, at the start: A, which acts through B, and θ[0], since both passes then give
        layer 0 the same K and V (always, if they have one set, or sets that leave k and v alone).
        """
        ids, positions = context
        if ids.shape[1] == 0:
            return past
        before = torch.arange(len(past) if past else 0, device=self.device).expand(len(ids), -1)
        keys = torch.cat((before, positions), dim=1)
        read = []                               # by each pass, L pairs (B, G, T, D)
        for sees, adapter in self.passes:
            mask = may_attend(positions, keys, sees)                                      # (B, 1, T, S + T)
            _, keys_values = self.model(ids, positions, mask, past, adapter, NONE)        # only K, V
            read.append(keys_values)
        new = self.mix(read, positions) if self.mixes else read[0]
        return Past([past.join(i, *kv) for i, kv in enumerate(new)] if past else new)

    def mix(self, read, positions):
        """What the passes have read, of each L pairs (B, G, T, D), to the keys and values of the cache.
        Hidden states never meet: all that the second reading has to say, it says here. (Where in the context
        a token stands, positions (B, T), makes no difference; it would to an α by position.)"""
        causal, second = read
        alpha = self.alpha()
        return [(blend(alpha["key"][layer], k_c, k_b), blend(alpha["value"][layer], v_c, v_b))
                for layer, ((k_c, v_c), (k_b, v_b)) in enumerate(zip(causal, second))]

    # ---- 4: the answer pass ------------------------------------------------------------------------------

    def forward(self, prompts, answers):
        """Logits (B, T', V) and labels (B, T') for lists of prompt ids and of answer ids: labels[b, t] is
        the answer token that logits[b, t] should predict, -100 where there is none."""
        context, stream = self.lay_out(prompts, [a[:-1] for a in answers])      # nothing follows y[A-1]
        before = [len(self.split(p)[1]) - 1 for p in prompts]    # stream tokens that come before x[P-1]
        labels = pad([[-100] * n + a for n, a in zip(before, answers)], -100, self.device)

        keep = slice(min(before), None)
        mask = may_attend(stream.positions, torch.cat((context.positions, stream.positions), dim=1))
        logits, _ = self.model(*stream, mask, self.encode(context), self.answer_set, keep)
        return logits, labels[:, keep]

    def losses(self, prompts, answers):
        """Each example's loss (B,): the mean cross-entropy over its own answer tokens, in float32."""
        logits, labels = self(prompts, answers)
        return nll(logits, labels).sum(1) / (labels >= 0).sum(1)

    # ---- 5: decoding -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def answer(self, prompts, max_new_tokens=256, stop_ids=(), temperature=0.0, top_k=0, top_p=1.0, seed=0):
        """Answer a batch of prompts, yielding after each step a list of each one's next id, None once ended.

        One ends at a stop id, which is not yielded, and all of them end where the longest is at the model's
        limit. temperature 0 takes the likeliest token; else it is sampled, from the top_k likeliest (0: all)
        that make up the first top_p of the mass.
        """
        config, longest = self.model.config, max(map(len, prompts))
        config.check_length(longest + 1)
        max_new_tokens = min(max_new_tokens, config.max_length - longest)
        generator = torch.Generator(self.device).manual_seed(seed)

        context, stream = self.lay_out(prompts, [[]] * len(prompts))
        keys = torch.cat((context.positions, stream.positions), dim=1)                        # (B, S)
        past = self.encode(context)
        ends = (stream.positions >= 0).sum(1) - 1                             # each prompt's last token
        keep = slice(int(ends.min()), None)
        logits, new = self.model(*stream, may_attend(stream.positions, keys), past, self.answer_set, keep)
        logits = logits[torch.arange(len(prompts), device=self.device), ends - keep.start]    # (B, V)
        cache = KVCache(new if past is None else [past.join(i, *kv) for i, kv in enumerate(new)],
                        keys.shape[1] + max_new_tokens)

        ragged = len({*map(len, prompts)}) > 1  # else the cache has no padding, and nothing is masked
        positions = torch.tensor([[len(p)] for p in prompts], device=self.device)             # (B, 1)
        rows = list(range(len(prompts)))        # the prompts whose answers have not ended
        for step in range(max_new_tokens):
            token = sample_token(logits, temperature, top_k, top_p, generator)                # (B,)
            stay = [b for b, i in enumerate(token.tolist()) if i not in stop_ids]
            if len(stay) < len(rows):           # what has ended leaves the batch
                rows = [rows[b] for b in stay]
                token, positions, keys = token[stay], positions[stay], keys[stay]
                cache.keep(stay)
            if not rows:
                return
            ids = dict(zip(rows, token.tolist()))
            yield [ids.get(row) for row in range(len(prompts))]
            if step + 1 < max_new_tokens:
                mask = None
                if ragged:
                    keys = torch.cat((keys, positions), dim=1)
                    mask = may_attend(positions, keys)
                logits = self.model(token[:, None], positions, mask, cache, self.answer_set)[0][:, -1]
                positions = positions + 1

    def generate(self, prompts, max_new_tokens, **options):
        """The answers, as `answer` yields them, as a list of ids for each prompt."""
        steps = list(self.answer(prompts, max_new_tokens, **options))
        return [[ids[b] for ids in steps if ids[b] is not None] for b in range(len(prompts))]


def blend(a, causal, second):
    """(1 - α) K_c + α K_b, computed in α's float32 and then in K's dtype again. (For that, α needs a
    dimension: one number times a bfloat16 tensor would be computed in bfloat16.)"""
    a = a if a.dim() else a[None]
    return ((1 - a) * causal + a * second).to(causal.dtype)


def nll(logits, labels):
    """The negative log-likelihood of labels (B, T') under logits (B, T', V), float32; 0 for label -100."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def sample_token(logits, temperature, top_k, top_p, generator):
    """The next token of each prompt: logits (B, V) to ids (B,)."""
    if not logits.isfinite().all():
        raise FloatingPointError("the model gives no numbers: its logits are not finite")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)     # 0 is the highest at any temperature
    logits, order = (logits / temperature).sort(dim=-1, descending=True)
    if top_k:
        logits[:, top_k:] = -torch.inf
    p = logits.softmax(dim=-1)
    if top_p < 1:
        p[p.cumsum(dim=-1) - p >= top_p] = 0            # drop a token once those above it make up top_p
    return order.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)
