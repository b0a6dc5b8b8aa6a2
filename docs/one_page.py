"""Bitune on one page, in PyTorch alone: python docs/one_page.py takes half a minute, or less.
    Ann sings now . Bob hides . Kim reads slowly . Tom waits again now now . ? Kim  ->  reads slowly .
A decoder of two layers and one head is pretrained to answer this, then frozen. LoRA and Bitune are to teach
it the same where names stand last: `reads slowly Kim .` A causal reader stores `reads` before it comes to
`Kim`: it cannot know whose it is. LoRA ends with 10.0 % right (after 600 steps, not 150: 43.0 %), Bitune
with 95.5 %. Chance is 25. (B batch, S past tokens, T new ones, P of a prompt, A of an answer.)"""
import copy, math, random
import torch
import torch.nn as nn
import torch.nn.functional as F

NAMES, ADVERBS = "Ann Bob Kim Tom".split(), "now again slowly".split()
VERBS = "sings reads hides jumps paints dreams cooks waits".split()
WORDS, SETS = [*NAMES, *VERBS, *ADVERBS, ".", "?"], ("answer", "prompt")
LAYERS, C, WIDE, RANK, TURN, c = 2, 48, 96, 8, 100.0, 0.01

class Linear(nn.Module):            # y = W x + B A x, with the set that is named: A (r, in), B (out, r)
    def __init__(self, i, o):
        super().__init__()
        self.W = nn.Parameter(0.15 * torch.randn(o, i))
        self.A = nn.ParameterDict({name: (2 * torch.rand(RANK, i) - 1) / math.sqrt(i) for name in SETS})
        self.B = nn.ParameterDict({name: torch.zeros(o, RANK) for name in SETS})  # 0: it starts as the base

    def forward(self, x, name):
        return x @ self.W.T + (x @ self.A[name].T @ self.B[name].T if name else 0)

def turn(x, at):                    # RoPE: each pair (a, b) of x (B, T, C) by its position's angle
    angle = at[:, None] * TURN ** -(torch.arange(0, C, 2) / C)                             # (T, C/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(C, C) for _ in range(4))
        self.gate, self.up, self.down = Linear(C, WIDE), Linear(C, WIDE), Linear(WIDE, C)
        self.norm1, self.norm2 = nn.RMSNorm(C, eps=1e-5), nn.RMSNorm(C, eps=1e-5)

    def forward(self, x, at, mask, past, name):                                             # x (B, T, C)
        h = self.norm1(x)
        q, k, v = turn(self.q(h, name), at), turn(self.k(h, name), at), self.v(h, name)     # (B, T, C)
        K, V = (torch.cat(pair, dim=1) for pair in zip(past, (k, v))) if past else (k, v)   # (B, S + T, C)
        scores = (q @ K.transpose(1, 2) / math.sqrt(C)).masked_fill(~mask, -math.inf)       # (B, T, S + T)
        x = x + self.o(scores.softmax(dim=-1) @ V, name)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h, name)) * self.up(h, name), name), (K, V)

class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Parameter(0.5 * torch.randn(len(WORDS), C))
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.RMSNorm(C, eps=1e-5)
        self.theta = nn.Parameter(torch.full((LAYERS, 2), c))           # θ of each layer's keys, and values

    def forward(self, ids, name=None, past=None, causal=True):          # (B, T) -> (B, T, words); the K, V
        S, T = past[0][0].shape[1] if past else 0, ids.shape[1]
        at, x, new = torch.arange(S, S + T), self.embed[ids], []
        mask = torch.arange(S + T) <= at[:, None] if causal else torch.ones(T, S + T, dtype=torch.bool)
        for i, block in enumerate(self.blocks):
            x, kv = block(x, at, mask, past and past[i], name)
            new.append(kv)
        return self.norm(x) @ self.embed.T, new

    def read(self, context, bitune):            # the prompt but its last token, (B, P - 1) -> the cache
        first = self(context, "answer")[1]                              # K_c, V_c: a token sees earlier ones
        if not bitune:
            return first                                                # which is all that LoRA has
        second = self(context, "prompt", causal=False)[1]               # K_b, V_b: a token sees all
        alpha = self.theta.abs() / (self.theta.abs() + c)               # α = |θ| / (|θ| + c), first a half
        return [[(1 - a) * one + a * two for a, one, two in zip(*kv)] for kv in zip(alpha, first, second)]

    def loss(self, prompt, answer, bitune):     # (B, P), (B, A): the mean of -log p of the answers' tokens
        stream = torch.cat((prompt[:, -1:], answer[:, :-1]), dim=1)     # x[P-1], y[0] ... y[A-2]
        logits, _ = self(stream, "answer", self.read(prompt[:, :-1], bitune))
        return F.cross_entropy(logits.transpose(1, 2), answer)          # row i predicts y[i]

    @torch.no_grad()
    def generate(self, prompt, bitune):         # (1, P): the prompt is read; then one token after the other
        past, said = self.read(prompt[:, :-1], bitune), prompt[0, -1:].tolist()
        while len(said) < 6 and WORDS[said[-1]] != ".":
            logits, past = self(torch.tensor([said[-1:]]), "answer", past)
            said.append(logits[0, -1].argmax().item())
        return said[1:]

def rows(n, last, questions):                   # who does what, each name first or last, and questions
    def row():
        names, verbs, adverbs = random.sample(NAMES, 4), random.sample(VERBS, 4), random.sample(range(4), 4)
        done = [[verb, *random.choices(ADVERBS, k=k)] for verb, k in zip(verbs, adverbs)]
        text = [w for name, d in zip(names, done) for w in ([*d, name, "."] if last else [name, *d, "."])]
        for i in random.sample(range(4), questions):                    # an answer is filled up to 5 words
            text += ["?", names[i], *done[i], *["."] * (5 - len(done[i]))]
        return [WORDS.index(word) for word in text]
    return torch.tensor([row() for _ in range(n)])

def train(parameters, steps, loss):
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 50, 4 * (1 - step / steps))
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

def pretraining(model):                         # names first, four questions: of each the answer is learned
    ids, answers = rows(32, False, 4), lambda t: t[:, -28:].unflatten(1, (4, 7))[:, :, 2:].flatten(0, 2)
    return F.cross_entropy(answers(model(ids[:, :-1])[0]), answers(ids))

if __name__ == "__main__":
    random.seed(1), torch.manual_seed(1), torch.set_num_threads(1)     # the same numbers again
    base, split = Decoder(), lambda ids: (ids[:, :-5], ids[:, -5:])     # a prompt ends with "?" and a name
    train([*base.parameters()], 500, lambda: pretraining(base))
    for name, last, bitune in ("base", False, False), ("LoRA", True, False), ("Bitune", True, True):
        model = copy.deepcopy(base).requires_grad_(False)
        sets = [p for path, p in model.named_parameters() if path.endswith((*SETS, "theta"))]
        loss = lambda: model.loss(*split(rows(32, True, 1)), bitune)
        train([p.requires_grad_() for p in sets], 150 * last, loss)
        prompts, answers = split(rows(200, last, 1))
        said = [model.generate(prompt[None], bitune) for prompt in prompts]
        right = sum(one == answer[:len(one)] for one, answer in zip(said, answers.tolist())) / 200
        print(f"{name}: {right:.1%} right;", *(WORDS[i] for i in [*prompts[0], *said[0]]), flush=True)
