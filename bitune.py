"""Bitune, bidirectional instruction-tuning (Kopiczko, Blankevoort, Asano; arXiv 2405.14862): the method.

A causal decoder reads each prompt token before it has seen what follows. Bitune reads the prompt a second
time with every token in sight, and mixes what the two passes leave behind, their keys and values, into the
cache from which the answer is then written, causally as ever. A prompt x of P tokens and an answer y of A
tokens are cut like this:

    x[0] ... x[P-2]  |  x[P-1]  y[0]  y[1] ... y[A-1]
        context      |         answer stream               its logits at row i predict y[i]

    1  causal pass   context, adapter "causal",        each token sees earlier ones    ->  K_c, V_c a layer
    2  second pass   context, adapter "bidirectional", each token sees all the others  ->  K_b, V_b a layer
    3  mixing        K = (1 - α) K_c + α K_b           α = |θ| / (|θ| + c), one θ a layer for K, one for V
    4  answer pass   answer stream, adapter "causal",  causal, and attending to K, V of the context
    5  decoding      goes on from that cache like any decoder: the prompt is never read again

Shapes are model.py's (B, T, S, G, D, L, V). Positions count from the start of the prompt; -1 is padding.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import adapted, adapter_files, load_adapter, plain_files
from lora import finish_writing, json_bytes, read_json, read_tensors, tensor_bytes
from model import NONE, KVCache, Past, may_attend

# The method and its ablations differ only in how they read the prompt: each pass is (what a token sees,
# adapter set). Two passes are mixed, one is taken as it is, and without any the prompt is part of the
# answer stream: plain LoRA.
METHODS = {
    "bitune":         [("causal", "causal"), ("bidirectional", "bidirectional")],
    "naive-bidir":    [("bidirectional", "causal")],
    "no-mixing":      [("bidirectional", "bidirectional")],
    "only-causal":    [("causal", "causal"), ("causal", "bidirectional")],
    "shared-weights": [("causal", "causal"), ("bidirectional", "causal")],
    "lora":           [],
}
SECOND_MASKS = ("bidirectional", "causal", "anticausal")     # what a token may see in the bidirectional pass


def adapter_sets(method):
    """The adapter sets that a method trains; "causal", which writes the answer, is always one."""
    if method not in list(METHODS):
        raise ValueError(f"method {method!r} is unknown: expected one of {', '.join(METHODS)}")
    return ["causal"] + ["bidirectional"] * any(adapter == "bidirectional" for _, adapter in METHODS[method])


class Tokens(NamedTuple):
    ids: torch.Tensor           # (B, T)
    positions: torch.Tensor     # (B, T), -1 for padding


def pad(rows, fill, device):
    """Lists of whole numbers, filled up on the right, as a tensor (B, T)."""
    width = max(map(len, rows))
    padded = [[*row] + [fill] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), width)


class Bitune(nn.Module):
    """A decoder with its adapter sets (see `lora.add_adapter`), trained and asked by one of METHODS. Without
    a set "causal" it is the base itself that answers: bare, or in full finetuning.

    theta_init is c and where every θ starts, so α starts at 0.5 whatever it is: it sets how fast α moves
    for a given learning rate. second_mask replaces what the bidirectional pass sees (the paper's ablation).
    """

    def __init__(self, model, method="bitune", theta_init=0.01, second_mask="bidirectional"):
        super().__init__()
        sets = adapter_sets(method)
        if second_mask not in SECOND_MASKS:
            raise ValueError(f"second mask {second_mask!r} is unknown: expected {' or '.join(SECOND_MASKS)}")
        if not (isinstance(theta_init, (int, float)) and theta_init > 0):
            raise ValueError(f"theta_init is {theta_init}: expected a number above 0")
        if second_mask != "bidirectional" and "bidirectional" not in [sees for sees, _ in METHODS[method]]:
            raise ValueError(f"method {method!r} has no bidirectional pass that could be {second_mask!r}")
        assert all(adapted(model, s) for s in sets[1:]), f"{method!r} needs the sets {sets}: see add_adapter"
        self.model, self.method, self.theta_init, self.second_mask = model, method, theta_init, second_mask
        self.passes = [(second_mask if sees == "bidirectional" else sees, adapter)
                       for sees, adapter in METHODS[method]]
        self.mixes = len(self.passes) == 2
        if self.mixes:
            shape = (model.config.num_hidden_layers,)
            start = torch.full(shape, float(theta_init), dtype=torch.float32, device=self.device)
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
        def tokens(rows, starts):
            positions = [range(start, start + len(row)) for start, row in zip(starts, rows)]
            return Tokens(pad(rows, 0, self.device), pad(positions, -1, self.device))

        contexts, openings = zip(*map(self.split, prompts))
        streams = [opening + answer for opening, answer in zip(openings, answers)]
        return tokens(contexts, [0] * len(contexts)), tokens(streams, map(len, contexts))

    # ---- 1-3: read the prompt ----------------------------------------------------------------------------

    def alpha(self):
        """The mixing coefficients α in [0, 1), of the keys and of the values: two tensors (L,)."""
        def coefficient(theta):
            size = theta.abs()
            return size / (size + self.theta_init)

        return coefficient(self.theta_key), coefficient(self.theta_value)

    def encode(self, context):
        """The keys and values of the context: a Past of L pairs (B, G, S, D), or None if that is empty."""
        ids, positions = context
        if ids.shape[1] == 0:
            return None
        passes = []
        for sees, adapter in self.passes:
            mask = may_attend(positions, positions, sees)                                     # (B, 1, T, T)
            _, keys_values = self.model(ids, positions, mask, adapter=adapter, rows=NONE)
            passes.append(keys_values)
        return Past(self.mix(*passes) if self.mixes else passes[0])

    def mix(self, causal, bidirectional):
        """The keys and values of the two passes, layer by layer, to those of the cache. The hidden states
        of the passes never meet: all that the second reading has to say, it says here."""
        def blend(a, c, b):                     # (1 - α) K_c + α K_b
            return ((1 - a) * c + a * b).to(c.dtype)

        # Coefficients are float32: as a scalar, (), one would be rounded to K's bfloat16; as (1,) it is not.
        alpha_key, alpha_value = self.alpha()
        mixed = []
        for layer, ((k_c, v_c), (k_b, v_b)) in enumerate(zip(causal, bidirectional)):
            k = blend(alpha_key[layer, None], k_c, k_b)                                       # (B, G, T, D)
            v = blend(alpha_value[layer, None], v_c, v_b)                                     # (B, G, T, D)
            mixed.append((k, v))
        return mixed

    # ---- 4: the answer pass ------------------------------------------------------------------------------

    def forward(self, prompts, answers):
        """Logits (B, T', V) and labels (B, T') for lists of prompt ids and of answer ids: labels[b, t] is
        the answer token that logits[b, t] should predict, -100 where there is none."""
        context, stream = self.lay_out(prompts, [a[:-1] for a in answers])      # nothing follows y[A-1]
        before = [len(self.split(p)[1]) - 1 for p in prompts]    # tokens of the stream with no y to predict
        labels = pad([[-100] * n + a for n, a in zip(before, answers)], -100, self.device)

        rows = slice(min(before), None)
        sees = may_attend(stream.positions, torch.cat((context.positions, stream.positions), dim=1))
        logits, _ = self.model(*stream, sees, self.encode(context), "causal", rows)
        return logits, labels[:, rows]

    def losses(self, prompts, answers):
        """Each example's loss (B,): the mean cross-entropy over its own answer tokens, in float32."""
        logits, labels = self(prompts, answers)
        return surprise(logits, labels).sum(1) / (labels >= 0).sum(1)

    # ---- 5: decoding -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def answer(self, prompts, max_new_tokens, stop_ids=(), temperature=0.0, top_k=0, top_p=1.0, seed=0):
        """Answer a batch of prompts, yielding after each step a list of each row's next id, None once ended.

        A row ends at a stop id, which is not yielded, and all of them end where the longest is at the
        model's limit. temperature 0 takes the likeliest token; else it is drawn, from the top_k likeliest
        (0: all) that make up the first top_p of the mass.
        """
        if not prompts:
            return
        config, longest = self.model.config, max(map(len, prompts))
        config.check_length(longest + 1)
        max_new_tokens = min(max_new_tokens, config.max_length - longest)
        generator = torch.Generator(self.device).manual_seed(seed)

        context, stream = self.lay_out(prompts, [[]] * len(prompts))
        keys = torch.cat((context.positions, stream.positions), dim=1)                        # (B, S)
        past = self.encode(context)
        ends = (stream.positions >= 0).sum(1) - 1                                    # each row's last token
        rows = slice(int(ends.min()), None)
        logits, new = self.model(*stream, may_attend(stream.positions, keys), past, "causal", rows)
        logits = logits[torch.arange(len(prompts), device=self.device), ends - rows.start]    # (B, V)
        cache = KVCache(new if past is None else [past.join(i, *kv) for i, kv in enumerate(new)],
                        keys.shape[1] + max_new_tokens)

        ragged = len({*map(len, prompts)}) > 1  # else the cache has no padding, and nothing is masked
        positions = torch.tensor([[len(p)] for p in prompts], device=self.device)             # (B, 1)
        live = [True] * len(prompts)
        for step in range(max_new_tokens):
            token = pick(logits, temperature, top_k, top_p, generator)                        # (B,)
            ids = token.tolist()
            live = [alive and i not in stop_ids for alive, i in zip(live, ids)]
            if not any(live):
                return
            yield [i if alive else None for alive, i in zip(live, ids)]
            if step + 1 < max_new_tokens:
                keys = torch.cat((keys, positions), dim=1)
                mask = may_attend(positions, keys) if ragged else None
                logits = self.model(token[:, None], positions, mask, cache, "causal")[0][:, -1]
                positions = positions + 1

    def generate(self, prompts, max_new_tokens, **options):
        """The answers, as `answer` yields them, as a list of ids for each prompt."""
        steps = list(self.answer(prompts, max_new_tokens, **options))
        return [[ids[b] for ids in steps if ids[b] is not None] for b in range(len(prompts))]

    # ---- Files: a run is a folder ------------------------------------------------------------------------

    def files(self, base, **about):
        """The files of a run, for `lora.write_files`: bitune.json with the method, the base's name and
        config, and `about`; the thetas; the causal set, which decodes, as a PEFT adapter or, in full
        finetuning, as a checkpoint; the bidirectional one as an adapter in a folder of its own."""
        files = {"bitune.json": json_bytes({
            "method": self.method, "theta_init": self.theta_init, "second_mask": self.second_mask, **about,
            "base": base, "base_config": asdict(self.model.config)})}
        if self.mixes:
            files["mixing.safetensors"] = tensor_bytes({"key": self.theta_key, "value": self.theta_value})
        for name in reversed(adapter_sets(self.method)):
            prefix = "" if name == "causal" else f"{name}/"
            full = not adapted(self.model, name)
            one = plain_files(self.model, base) if full else adapter_files(self.model, name, base)
            files |= {prefix + f: data for f, data in one.items()}
        return files

    @classmethod
    def load(cls, model, folder, base=""):
        """The run in `folder` on `model`, which comes from `base`, how many tensors it holds, and its
        bitune.json (a bare PEFT adapter has none: it is plain LoRA). ValueError if it was finetuned from
        another base. A fully finetuned run is its own base."""
        folder = Path(folder)
        finish_writing(folder)
        full = (folder / "bitune.json").exists() and (folder / "config.json").exists()
        if full and Path(base).resolve() != folder.resolve():
            raise ValueError(f"{folder} is a whole checkpoint, not an adapter of {base}: it is its own "
                             "base, give no other")
        about = {"method": "lora"}
        if (folder / "bitune.json").exists():
            keys = ("method", "theta_init", "second_mask", "base", "base_config")
            about = read_json(folder / "bitune.json", *keys)
        elif (folder / "mixing.safetensors").exists() or (folder / "bidirectional").exists():
            raise ValueError(f"{folder} has no bitune.json, which says how its two sets are used")
        here = asdict(model.config)
        there = about.get("base_config", here)
        if differ := [k for k in here if k in there and there[k] != here[k]]:
            raise ValueError(f"{folder} was finetuned from {about['base']}, which {base} is not: " +
                             ", ".join(f"{k} is {there[k]} there and {here[k]} here" for k in differ))
        n = len(model.state_dict()) if full else 0
        n += sum(load_adapter(model, name, folder if name == "causal" else folder / name)
                 for name in adapter_sets(about["method"])[full:])
        bitune = cls(model, **{k: about[k] for k in ("method", "theta_init", "second_mask") if k in about})
        if bitune.mixes:
            theta, shape = read_tensors(folder / "mixing.safetensors"), bitune.theta_key.shape
            if {k: t.shape for k, t in theta.items()} != {"key": shape, "value": shape}:
                raise ValueError(f"{folder}/mixing.safetensors: expected key and value, {tuple(shape)} each")
            bitune.theta_key.data.copy_(theta["key"])
            bitune.theta_value.data.copy_(theta["value"])
            n += 2
        return bitune, n, about


def surprise(logits, labels):
    """-log p of each label (B, T') under logits (B, T', V), in float32; 0 where there is no label."""
    nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return nll.view(labels.shape)


def pick(logits, temperature, top_k, top_p, generator):
    """The next token of each row: logits (B, V) to ids (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.max(dim=-1, keepdim=True).values  # 0 is the highest at any temperature
    logits, order = (logits / temperature).sort(dim=-1, descending=True)
    if top_k:
        logits[:, top_k:] = -torch.inf
    p = logits.softmax(dim=-1)
    if top_p < 1:
        p[p.cumsum(dim=-1) - p >= top_p] = 0            # drop a token once those above it make up top_p
    return order.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)
