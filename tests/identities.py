"""What must hold of any method, any kind of adapters and any mixing, whatever the weights: checks that stay
green under a right edit of the source, and turn red under a slip. Two of them take something for granted:
that the weights of a mixing sum to one (the_passes_are_what_is_mixed), and that prompts become only longer
contexts as they grow (prompts_are_cut_in_two). They are run without dropout.

Each takes a factory, make(dtype=...), of a Bitune with everything that trains away from its start (see
tiny.scatter), and a folder to write to. `IDENTITIES` has them all; none knows the name of a parameter.
"""

from functools import partial

import torch

from bitune import Tokens, adapter_sets
from files.checkpoint import merged_tensors
from files.disk import write_files
from files.run import alpha_by_layer, load_run, load_state, run_bytes, state_bytes
from lora import add_adapter, linears
from model import KVCache, Llama
from text.examples import Example, batches
from tiny import ANSWERS, LONG, RAGGED, write_checkpoint
from train import make_optimizer, train_step

F64 = torch.float64
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
def batched_is_alone(make, folder):
    bitune = make(dtype=F64)
    alone = [answer_logits(bitune, [p], [a])[0] for p, a in zip(RAGGED, ANSWERS)]
    assert_same(answer_logits(bitune), alone)
    assert bitune.generate(RAGGED, 4) == [bitune.generate([p], 4)[0] for p in RAGGED]
    both = answer_logits(bitune, [LONG, LONG[:40]], ANSWERS[:2])
    assert_same(both[:1], answer_logits(bitune, [LONG], ANSWERS[:1]))
    assert_same(both[1:], answer_logits(bitune, [LONG[:40]], ANSWERS[1:2]))


@identity
def cached_is_uncached(make, folder):
    """Decoding token by token from the cache gives the logits of one answer pass over the whole answer."""
    bitune = make(dtype=F64)
    for prompt, answer in zip([*RAGGED[:2], LONG], bitune.generate([*RAGGED[:2], LONG], 5)):
        logits = answer_logits(bitune, [prompt], [answer])[0]  # one pass, nothing cached
        assert logits.argmax(-1).tolist() == answer
        with torch.inference_mode():
            x, _, _, past = bitune.answer_pass([prompt], [[0]])
            cache, steps = KVCache(past, len(past) + 5), [bitune.model.head(x)[0, -1]]
            for n, token in enumerate(answer[:-1]):
                token, at = torch.tensor([[token]]), torch.tensor([[len(prompt) + n]])
                row, _ = bitune.model(token, at, bitune.sight(at, cache), cache, bitune.answer_set)
                steps.append(row[0, -1])
                cache.advance(at)
        assert_same([torch.stack(steps)], [logits])


@identity
def padding_and_its_contents_change_nothing(make, folder):
    bitune = make(dtype=F64)
    if bitune.passes:
        context, _ = bitune.lay_out(RAGGED, ANSWERS)
        past = bitune.encode(context)
        context.ids[context.positions < 0] = 299
        again = bitune.encode(context)
        for pair, pair2 in zip(past.layers, again.layers):
            for t, t2 in zip(pair, pair2):
                real = (past.positions >= 0)[:, None, :, None].expand_as(t)
                assert torch.equal(t[real], t2[real]) and t.isfinite().all()


@identity
def the_passes_are_what_is_mixed(make, folder):
    """If every pass reads alike, what is mixed of them is what each of them has read."""
    bitune = make(dtype=F64)
    if alpha_by_layer(bitune, RAGGED[3]):
        context, _ = bitune.lay_out(RAGGED, ANSWERS)
        read = bitune.read(context)[:1] * len(bitune.passes)
        for mixed, single in zip(bitune.mix(read, context.positions), read[0]):
            assert_same(mixed, single, 1e-5)        # RoPE's angles are float32


@identity
def layer_0_is_read_alike(make, folder):
    """No token has seen another yet in layer 0: with one set for all, passes leave the same there, whatever
    they see, at the positions that they stand for."""
    bitune = make(dtype=F64)
    bitune.passes = [(sees, "answer") for sees, _ in bitune.passes]
    first, *others = [layers[0] for layers in bitune.read(bitune.lay_out(RAGGED, ANSWERS)[0])] or [None]
    for pair in others:
        assert_same(pair, first, 1e-4)          # RoPE's angles are float32


@identity
def what_stands_before_is_seen(make, folder):
    """A context that goes on from a past, as in a chat, is read with that in sight: above layer 0 its
    keys and values are others behind another past, and the past itself stays as it is."""
    bitune = make(dtype=F64)
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
def both_sides_are_seen_alike(make, folder):
    """A pass that is called bidirectional sees as far ahead as back, and each token itself."""
    bitune = make()
    context, _ = bitune.lay_out([LONG, RAGGED[0]], ANSWERS[:2])
    if "bidirectional" in [sees for sees, _ in bitune.passes]:
        mask = bitune.sight(context.positions, None, "bidirectional")[:, 0]
        assert torch.equal(mask, mask.transpose(1, 2)) and mask.diagonal(dim1=1, dim2=2).all()


@identity
def prompts_are_cut_in_two(make, folder):
    """Nothing is lost, the answer stream has an opening, and a longer prompt has no shorter context."""
    bitune, before = make(), 0
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
def alpha_is_where_it_says(make, folder):
    """A number of the mixing moves the caches of just the layers whose α, as it is shown, it moves."""
    bitune = make(dtype=F64)
    if not alpha_by_layer(bitune, RAGGED[3]):
        return
    context, _ = bitune.lay_out(RAGGED[3:], ANSWERS[3:])
    idle = {0} if alike_in_layer_0(bitune) else set()

    def state():
        with torch.no_grad():
            return alpha_by_layer(bitune, RAGGED[3]), bitune.encode(context).layers

    (alpha, cache), L = state(), bitune.model.config.num_hidden_layers
    for name, p in bitune.named_parameters():
        if name.startswith("model."):
            continue
        for i in range(p.numel()):
            before = p.data.flatten()[i].item()
            p.data.view(-1)[i] = before * 1.5 + 0.01
            alpha2, cache2 = state()
            p.data.view(-1)[i] = before
            moved = {l for l in range(L) if any(abs(alpha[n][l] - alpha2[n][l]) > 1e-12 for n in alpha)}
            differ = lambda l: max((a - b).abs().max() for a, b in zip(cache[l], cache2[l])) > 1e-12
            seen = {l for l in range(L) if differ(l)}
            assert moved, f"{name}[{i}] moves no α, as it is shown"
            assert moved - idle <= seen <= moved, f"{name}[{i}]: α of layers {moved}, the caches of {seen}"


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
def every_parameter_has_a_gradient_and_moves_the_output(make, folder):
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
def gradients_are_slopes(make, folder):
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
def every_rate_acts(make, folder):
    """AdamW's first step takes each number by the rate of its group: half of its peak at half of the
    schedule. What else a group says must be AdamW's own."""
    bitune, examples = make(), [Example(p, a) for p, a in zip(RAGGED, ANSWERS)]
    optimizer = make_optimizer(bitune, 1e-3, 1e-12, 0.0)
    own = torch.optim.AdamW([torch.zeros(1)]).defaults      # of which "lr" is written over in each step
    for group in optimizer.param_groups:
        assert group.keys() == {"params", "peak", *own} and group["lr"] == own["lr"]
    peaks = {id(p): group["peak"] for group in optimizer.param_groups for p in group["params"]}
    before = {n: p.detach().clone() for n, p in bitune.named_parameters()}
    train_step(bitune, optimizer, examples, batches, 0.5, 1.0)
    for name, p in bitune.named_parameters():
        if p.requires_grad and p.grad is not None:
            steps = (p - before[name])[p.grad.abs() > 1e-6].abs()
            torch.testing.assert_close(steps, torch.full_like(steps, peaks[id(p)] / 2), atol=2e-6, rtol=1e-2)


@identity
def micro_batches_change_nothing(make, folder):
    """However a step's examples are cut, it is the same step; so it is with blocks computed twice."""
    def step(cut, checkpointing=False):
        bitune, examples = make(dtype=F64), [Example(p, a) for p, a in zip(RAGGED, ANSWERS)]
        bitune.model.checkpointing = checkpointing
        optimizer = make_optimizer(bitune, 0.01, 1e-6, 0.0)
        return train_step(bitune, optimizer, examples, cut, 1.0, 1.0), optimizer.param_groups[0]["params"]

    whole, params = step(partial(batches, size=4))
    for cut, checkpointing in ((partial(batches, size=1), False), (batches, True)):
        found, others = step(cut, checkpointing)
        assert_same(torch.tensor([found]), torch.tensor([whole]), 1e-6)
        assert_same(others, params, 1e-5)


# ----------------------------------------------------------------------------------------------------------
# What is kept

def save(bitune, folder, **more):
    """Its run in folder/run on the checkpoint folder/base."""
    base = write_checkpoint(folder / "base", **bitune.tiny_config)
    write_files(folder / "run", run_bytes(bitune, str(base), template="paper", step=1) | more)


@identity
def saved_is_loaded_and_loaded_again(make, folder):
    bitune = make()
    save(bitune, folder)
    for _ in range(2):
        torch.rand(3)                               # what is random must come from the run
        loaded, _, n, about = load_run(folder / "run", device="cpu")
        assert n > 0
        assert all(torch.equal(a, b) for a, b in zip(answer_logits(loaded), answer_logits(bitune)))


@identity
def resumed_is_uninterrupted(make, folder):
    def steps(bitune, optimizer, which):
        examples = [Example(p, a) for p, a in zip(RAGGED, ANSWERS)]
        return [train_step(bitune, optimizer, examples, batches, 1 / (1 + step), 1.0) for step in which]

    optimizer_of = partial(make_optimizer, lr=0.01, eps=1e-6, weight_decay=0.0)
    whole, half = make(), make()
    record = steps(whole, optimizer_of(whole), range(3))
    steps(half, optimizer := optimizer_of(half), range(2))
    save(half, folder, **{"state.safetensors": state_bytes(half, optimizer, 2)})
    rest, _, _, _ = load_run(folder / "run", device="cpu")
    optimizer = optimizer_of(rest.train())
    assert load_state(folder / "run/state.safetensors", rest, optimizer) == 2
    assert steps(rest, optimizer, range(2, 3)) == record[2:]
    there = rest.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, there[name]), name
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), make().parameters()))


@identity
def merged_is_unmerged(make, folder):
    """Of a set that holds its merged weights, and of the plain model that these make."""
    bitune = make(dtype=F64)
    model, ids, want = bitune.model, torch.tensor([RAGGED[3]]), answer_logits(bitune)
    positions = torch.arange(ids.shape[1])[None]
    mask = bitune.sight(positions, None)
    before = {name: model(ids, positions, mask, adapter=name)[0] for name in model.sets}
    for name in model.sets:
        plain = Llama(model.config)
        plain.load_state_dict(merged_tensors(model, name), assign=True)
        assert_same([plain(ids, positions, mask)[0]], [before[name]])
    assert_same(answer_logits(bitune), want)


@identity
def a_rank_is_only_a_size(make, folder):
    """A set whose rank and lora_alpha are doubled, its new rows zero, computes the same."""
    one, two = make(dtype=F64), make(dtype=F64)
    for name, (kind, options) in one.model.sets.items():
        if not {"rank", "lora_alpha"} <= options.keys():
            continue
        targets = {path for path, linear in linears(one.model).items() if name in linear.sets}
        for linear in linears(two.model).values():
            linear.sets.pop(name) if name in linear.sets else None
        more = {key: 2 * options[key] for key in ("rank", "lora_alpha")}
        with torch.no_grad():
            for path, wide in add_adapter(two.model, name, kind, targets, **options | more).items():
                for p, q in zip(wide.parameters(), linears(one.model)[path].sets[name].parameters()):
                    p.zero_()[tuple(map(slice, q.shape))] = q
    assert_same(answer_logits(two.double()), answer_logits(one))


def failures(make, folder, names=IDENTITIES):
    """The identities that do not hold: name -> what was said. A crash is a failure, too."""
    failed = {}
    for name in names:
        try:
            IDENTITIES[name](make, folder / name)
        except Exception as problem:        # an AssertionError, or whatever a slip leads to
            failed[name] = f"{type(problem).__name__}: {problem}"
    return failed
