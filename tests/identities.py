"""What must hold of any method, any kind of adapters and any mixing, whatever the weights: checks that stay
green under a right edit of the source, and turn red under a slip. Two of them take something for granted:
that the weights of a mixing sum to one (the_passes_are_what_is_mixed), and that prompts become only longer
contexts as they grow (prompts_are_cut_in_two). They are run without dropout.

Each takes a Bitune in float64, with everything that trains away from its start (see tiny.scatter), which it
leaves as it is; a function make(dtype=...) of others like it; and a folder to write to. `IDENTITIES` has
them all; none knows the name of a parameter. """

from functools import cache, partial

import torch

from bitune import Tokens, adapter_sets
from files.checkpoint import load_model, merged_tensors
from files.disk import write_files
from files.run import alpha_by_layer, base_of, load_bitune, load_state, state_bytes
from lora import add_adapter, linears
from model import KVCache, Llama, extended
from text.examples import Example, batches
from tiny import ANSWERS, LONG, RAGGED, write_checkpoint, write_run
from train import make_optimizer, train_step

F64 = torch.float64
EXAMPLES = [Example(p, a) for p, a in zip(RAGGED, ANSWERS)]
WHOLE = partial(batches, size=4)            # all of them at a time
IDENTITIES = {}


def identity(check):
    IDENTITIES[check.__name__] = check
    return check


def answer_logits(bitune, prompts=RAGGED, answers=ANSWERS):
    """The logits of each one's answer tokens, one tensor (A, V) each."""
    logits, labels = bitune(prompts, answers)
    return [row[label >= 0] for row, label in zip(logits, labels)]


def assert_same(a, b, tolerance=1e-9):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


# ----------------------------------------------------------------------------------------------------------
# The numbers

@identity
def batched_is_alone(bitune, make, folder):
    prompts, answers = [*RAGGED, LONG, LONG[:40]], [*ANSWERS, *ANSWERS[:2]]
    alone = [answer_logits(bitune, [p], [a])[0] for p, a in zip(prompts, answers)]
    assert_same(answer_logits(bitune, prompts, answers), alone)


@identity
def cached_is_uncached(bitune, make, folder):
    """Decoding a batch, or a prompt token by token, gives what one pass over the whole answer does."""
    prompts = [*RAGGED[:2], LONG]
    for prompt, answer in zip(prompts, bitune.generate(prompts, 5)):
        logits = answer_logits(bitune, [prompt], [answer])[0]       # one pass, nothing cached
        assert logits.argmax(-1).tolist() == answer
        with torch.inference_mode():
            x, _, _, read = bitune.answer_pass([prompt], [[0]])
            past = extended(*read)
            kept, steps = KVCache(past, 5), [bitune.model.head(x)[0, -1]]
            for n, token in enumerate(answer[:-1]):
                token, at = torch.tensor([[token]]), torch.tensor([[len(prompt) + n]])
                row, _ = bitune.model(token, at, bitune.sight(at, kept), kept, bitune.answer_set)
                steps.append(row[0, -1])
                kept.advance(at)
        assert_same(steps, logits)


@identity
def the_passes_are_what_is_mixed(bitune, make, folder):
    """If every pass reads alike, what is mixed of them is what each of them has read."""
    if alpha_by_layer(bitune, RAGGED[3]):
        context, _ = bitune.lay_out(RAGGED, ANSWERS)
        read = bitune.read(context)[:1] * len(bitune.passes)
        for mixed, single in zip(bitune.mix(read, context.positions), read[0]):
            assert_same(mixed, single, 1e-5)        # RoPE's angles are float32


@identity
def layer_0_is_read_alike(bitune, make, folder):
    """No token has seen another yet in layer 0: with one set for all, passes leave the same there, whatever
    they see, at the positions that they stand for."""
    bitune = make(dtype=F64)
    bitune.passes = [(sees, "answer") for sees, _ in bitune.passes]
    first, *others = [layers[0] for layers in bitune.read(bitune.lay_out(RAGGED, ANSWERS)[0])] or [None]
    for pair in others:
        assert_same(pair, first, 1e-4)              # RoPE's angles are float32


@identity
def what_stands_before_is_seen(bitune, make, folder):
    """A context that goes on from a past, as in a chat, is read with that in sight: above layer 0 its
    keys and values are others behind another past, and the past itself stays as it is."""
    if not bitune.passes:
        return
    (first, _), (other, _) = (bitune.lay_out([ids], [[]]) for ids in (LONG[:20], LONG[20:40]))
    more = Tokens(torch.tensor([LONG[40:50]]), torch.arange(len(first.ids[0]), len(first.ids[0]) + 10)[None])
    pasts = [bitune.encode(context) for context in (first, other)]
    one, two = (bitune.encode(more, past) for past in pasts)
    n = len(pasts[0])
    assert len(one) == len(two) > n
    for layer, ((k, v), (k2, v2)) in enumerate(zip(one.layers, two.layers)):
        assert torch.equal(k[:, :, :n], pasts[0].layers[layer][0])
        assert layer == 0 or (k[:, :, n:] - k2[:, :, n:]).abs().max() > 1e-6 < (v - v2)[:, :, n:].abs().max()


@identity
def both_sides_are_seen_alike(bitune, make, folder):
    """A pass that is called bidirectional sees as far ahead as back, and each token itself."""
    context, _ = bitune.lay_out([LONG, RAGGED[0]], ANSWERS[:2])
    if "bidirectional" in [sees for sees, _ in bitune.passes]:
        mask = bitune.sight(context.positions, None, "bidirectional")[:, 0]
        assert torch.equal(mask, mask.transpose(1, 2)) and mask.diagonal(dim1=1, dim2=2).all()


@identity
def prompts_are_cut_in_two(bitune, make, folder):
    """Nothing is lost, the answer stream has an opening, and a longer prompt has no shorter context."""
    before = 0
    for n in range(1, 40):
        context, opening = bitune.split(LONG[:n])
        assert context + opening == LONG[:n] and opening
        assert len(context) >= before, f"of {n} tokens, {len(context)} are context, of {n - 1} {before}"
        before = len(context)


def alike_in_layer_0(bitune):
    """Whether passes leave the same keys, or values, in layer 0: then there is nothing to mix. So it is with
    one set for all, or with sets that leave the projection alone."""
    first, *others = [layers[0] for layers in bitune.read(bitune.lay_out(RAGGED[3:], ANSWERS[3:])[0])]
    return any(torch.equal(a, b) for pair in others for a, b in zip(first, pair))


@identity
def alpha_is_where_it_says(bitune, make, folder):
    """A number of the mixing moves the caches of just the layers whose α, as it is shown, it moves."""
    if not alpha_by_layer(bitune, RAGGED[3]):
        return
    context, _ = bitune.lay_out(RAGGED[3:], ANSWERS[3:])
    idle, L = {0} if alike_in_layer_0(bitune) else set(), bitune.model.config.num_hidden_layers

    @torch.no_grad()
    def state():
        return alpha_by_layer(bitune, RAGGED[3]), bitune.encode(context).layers

    def try_out(row, i, name):
        before = row[i].item()
        row[i] = before * 1.5 + 0.01
        alpha2, cache2 = state()
        row[i] = before
        differ = lambda l: max((a - b).abs().max() for a, b in zip(kept[l], cache2[l])) > 1e-12
        moved = {l for l in range(L) if any(abs(alpha[n][l] - alpha2[n][l]) > 1e-12 for n in alpha)}
        seen = {l for l in range(L) if differ(l)}
        assert moved, f"{name}[{i}] moves no α, as it is shown"
        assert moved - idle <= seen <= moved, f"{name}[{i}]: α of layers {moved}, the caches of {seen}"

    alpha, kept = state()
    for name, p in bitune.named_parameters():
        if not name.startswith("model."):
            for row in p.data.view(p.shape[0] if p.dim() else 1, -1):       # a layer each; its two ends
                for i in {0, len(row) - 1}:
                    try_out(row, i, name)


# ----------------------------------------------------------------------------------------------------------
# What trains

def unread(bitune, name, alpha):
    """Whether nothing reads what a parameter does, where α is `alpha`. Of a set that only reads prompts,
    layers matter up to the last one that is mixed (where α is not 0), and of that one only the keys and
    values that are mixed."""
    others = [s for s in adapter_sets(bitune.method) if s != bitune.answer_set]
    if not any(f".sets.{s}." in name for s in others):
        return False
    layer, L = int(name.split(".layers.")[1].split(".")[0]), bitune.model.config.num_hidden_layers
    mixed = {"k_proj": {L - 1}, "v_proj": {L - 1}}              # linear -> layers whose cache it reaches
    if alpha:
        mixed = {"k_proj": set(), "v_proj": set()}
        for what, alphas in alpha.items():                      # names begin with "key" or "value"
            mixed["k_proj" if what.startswith("key") else "v_proj"] |= {l for l, a in enumerate(alphas) if a}
    last = max(set.union(*mixed.values()))
    return layer > last or layer == last and not any(p in name and last in ls for p, ls in mixed.items())


@identity
def every_parameter_has_a_gradient_and_moves_the_output(bitune, make, folder):
    bitune = make(dtype=F64)
    bitune.losses(RAGGED, ANSWERS).sum().backward()
    with torch.no_grad():
        before, alpha = torch.cat(answer_logits(bitune)), alpha_by_layer(bitune, RAGGED[3])
        alike = len(bitune.passes) > 1 and alike_in_layer_0(bitune)
        for name, p in bitune.named_parameters():
            if not p.requires_grad:
                assert p.grad is None, name
            elif unread(bitune, name, alpha):
                assert p.grad is None or not p.grad.any(), f"{name}: a gradient, though nothing reads it"
            else:
                own = not name.startswith("model.") and not alike       # then each of its numbers counts
                assert p.grad is not None and (p.grad.all() if own else p.grad.any()), f"{name}: no gradient"
                if not name.startswith("model."):                       # the others' slopes: see below
                    kept = p.clone()
                    p.mul_(1.5).add_(0.01)
                    change = (torch.cat(answer_logits(bitune)) - before).abs().max()
                    assert change > 1e-9, f"{name}: no effect"
                    p.copy_(kept)
    for module in bitune.modules():
        stray = [n for n, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not stray, f"{type(module).__name__}.{stray[0]}, no parameter and no buffer, is not saved"


@identity
def gradients_are_slopes(bitune, make, folder):
    """Along a random direction of all that trains, the logits move as their gradient says. (DoRA's gradient
    takes a norm for a constant, as its paper does: there only what is not adapters moves.)"""
    bitune = make(dtype=F64)
    exact = not any(kind == "dora" for kind, _ in bitune.model.sets.values())
    trained = [p for n, p in bitune.named_parameters() if p.requires_grad and (exact or ".sets." not in n)]
    if not trained:
        return
    directions = [torch.randn_like(p) for p in trained]

    def loss():
        logits = torch.cat(answer_logits(bitune))
        return (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()

    def moved(step):
        with torch.no_grad():
            for p, d in zip(trained, directions):
                p.add_(d, alpha=step)
            return loss().item()

    loss().backward()
    slope = sum((p.grad * d).sum().item() for p, d in zip(trained, directions) if p.grad is not None)
    ahead, behind = moved(1e-6), moved(-2e-6)
    assert abs((ahead - behind) / 2e-6 - slope) < 1e-4 * abs(slope) + 1e-5


@identity
def every_rate_acts(bitune, make, folder):
    """AdamW's first step takes each number by the rate of its group: half of its peak at half of the
    schedule. What else a group says must be AdamW's own."""
    bitune = make()
    optimizer = make_optimizer(bitune, 1e-3, 1e-12, 0.0)
    own = torch.optim.AdamW([torch.zeros(1)]).defaults      # of which "lr" is written over in each step
    for group in optimizer.param_groups:
        assert group.keys() == {"params", "peak", *own} and group["lr"] == own["lr"]
    peaks = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    before = {n: p.detach().clone() for n, p in bitune.named_parameters()}
    train_step(bitune, optimizer, EXAMPLES, WHOLE, 0.5, 1.0)
    for name, p in bitune.named_parameters():
        if p.requires_grad and p.grad is not None:
            steps = (p - before[name])[p.grad.abs() > 1e-6].abs()
            torch.testing.assert_close(steps, torch.full_like(steps, peaks[id(p)] / 2), atol=2e-6, rtol=1e-2)


@identity
def micro_batches_change_nothing(bitune, make, folder):
    """However a step's examples are cut, and though blocks are computed twice, it is the same step."""
    def step(cut, checkpointing):
        bitune = make(dtype=F64)
        bitune.model.checkpointing = checkpointing
        optimizer = make_optimizer(bitune, 0.01, 1e-6, 0.0)
        return train_step(bitune, optimizer, EXAMPLES, cut, 1.0, 1.0), optimizer.param_groups[0]["params"]

    (whole, params), (found, others) = step(WHOLE, False), step(partial(batches, size=3), True)
    assert_same(torch.tensor(found), torch.tensor(whole), 1e-6)
    assert_same(others, params, 1e-5)


# ----------------------------------------------------------------------------------------------------------
# What is kept

def saved(bitune, folder, **more):
    """Its run, in folder/run on the checkpoint folder/base, loaded again; and how many tensors it has."""
    base, run = write_checkpoint(folder / "base", **bitune.tiny_config), folder / "run"
    write_run(run, bitune, base)
    write_files(run, more)
    torch.rand(3)                                   # what is random must come from the run
    loaded, n, _ = load_bitune(load_model(base_of(run)), run, base_of(run))
    return loaded, n


@identity
def saved_is_loaded(bitune, make, folder):
    bitune = make()
    loaded, n = saved(bitune, folder)
    assert n > 0
    assert all(torch.equal(a, b) for a, b in zip(answer_logits(loaded), answer_logits(bitune)))


@identity
def resumed_is_uninterrupted(bitune, make, folder):
    optimizer_of = partial(make_optimizer, lr=0.01, eps=1e-6, weight_decay=0.0)
    step = lambda b, optimizer, rate: train_step(b, optimizer, EXAMPLES, WHOLE, rate, 1.0)
    whole = make()
    step(whole, optimizer := optimizer_of(whole), 1.0)
    rest, _ = saved(whole, folder, **{"state.safetensors": state_bytes(whole, optimizer, 1)})
    resumed = optimizer_of(rest)
    assert load_state(folder / "run/state.safetensors", rest, resumed) == 1
    assert step(rest, resumed, 0.5) == step(whole, optimizer, 0.5)
    there = rest.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, there[name]), name


@identity
def merged_is_unmerged(bitune, make, folder):
    """Of a set that holds its merged weights, and of the plain model that these make."""
    folded, ids = make(dtype=F64), torch.tensor([RAGGED[3]])
    model, positions = folded.model, torch.arange(ids.shape[1])[None]
    mask = bitune.sight(positions, None)
    for name in model.sets:
        plain, before = Llama(model.config), model(ids, positions, mask, adapter=name)[0]
        try:
            plain.load_state_dict(merged_tensors(model, name), assign=True)
        except ValueError as problem:               # a kind that makes a bias, say, where the base has none
            assert "checkpoints have no place for it" in str(problem)
            continue
        assert_same(plain(ids, positions, mask)[0], before)
    assert_same(answer_logits(folded), answer_logits(bitune))


@identity
def a_rank_is_only_a_size(bitune, make, folder):
    """A set whose rank and lora_alpha are doubled, its new rows zero, computes the same."""
    wide = make(dtype=F64)
    for name, (kind, options) in bitune.model.sets.items():
        if not {"rank", "lora_alpha"} <= options.keys():
            continue
        targets = {path for path, linear in linears(bitune.model).items() if name in linear.sets}
        for linear in linears(wide.model).values():
            linear.sets.pop(name) if name in linear.sets else None
        more = {key: 2 * options[key] for key in ("rank", "lora_alpha")}
        with torch.no_grad():
            for path, adapter in add_adapter(wide.model, name, kind, targets, **options | more).items():
                for p, q in zip(adapter.parameters(), linears(bitune.model)[path].sets[name].parameters()):
                    p.zero_()[tuple(map(slice, q.shape))] = q
    assert_same(answer_logits(wide.double()), answer_logits(bitune))


def failures(make, folder, names=IDENTITIES):
    """The identities that do not hold: name -> what was said. A crash is a failure, too."""
    failed, shared = {}, cache(partial(make, dtype=F64))
    for name in names:
        try:
            IDENTITIES[name](shared(), make, folder / name)
        except Exception as problem:        # an AssertionError, or whatever a slip leads to
            failed[name] = f"{type(problem).__name__}: {problem}"
    return failed
