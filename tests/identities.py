"""What must hold of any method, any kind of adapters and any mixing, whatever the weights: checks that stay
green under a right edit of the source, and turn red under a slip.

Each takes a factory, make(dtype=...), of a Bitune with everything that trains away from its start (see
tiny.scatter), and a folder to write to. `IDENTITIES` has them all; none knows the name of a parameter.
"""

import copy

import torch

from bitune import adapter_sets
from files.disk import write_files
from files.run import alpha_by_layer, load_run, load_state, run_bytes, state_bytes
from lora import merge
from model import KVCache, may_attend
from text.examples import Example
from tiny import ANSWERS, RAGGED, scatter, write_checkpoint
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


@identity
def cached_is_uncached(make, folder):
    """Decoding token by token from the cache gives the logits of one answer pass over the whole answer."""
    bitune = make(dtype=F64)
    for prompt, answer in zip(RAGGED[:2], bitune.generate(RAGGED[:2], 5)):
        logits = answer_logits(bitune, [prompt], [answer])[0]  # one pass, nothing cached
        assert logits.argmax(-1).tolist() == answer
        with torch.inference_mode():
            context, stream = bitune.lay_out([prompt], [[]])
            past = bitune.encode(context)
            sees = may_attend(stream.positions, torch.cat((context.positions, stream.positions), 1))
            row, new = bitune.model(*stream, sees, past, bitune.answer_set)
            both = new if past is None else [past.join(i, *kv) for i, kv in enumerate(new)]
            cache, steps = KVCache(both, len(prompt) + 5), [row[0, -1]]
            for n, token in enumerate(answer[:-1]):
                token, at = torch.tensor([[token]]), torch.tensor([[len(prompt) + n]])
                steps.append(bitune.model(token, at, None, cache, bitune.answer_set)[0][0, -1])
        assert_same([torch.stack(steps)], [logits])


@identity
def padding_and_its_contents_change_nothing(make, folder):
    bitune = make(dtype=F64)
    if bitune.passes:
        context, _ = bitune.lay_out(RAGGED, ANSWERS)
        past = bitune.encode(context)
        context.ids[context.positions < 0] = 299
        for pair, again in zip(past.layers, bitune.encode(context).layers):
            for t, t2 in zip(pair, again):
                real = (context.positions >= 0)[:, None, :, None].expand_as(t)
                assert torch.equal(t[real], t2[real]) and t.isfinite().all()


@identity
def equal_passes_are_mixed_to_themselves(make, folder):
    """If every pass reads alike, the cache is what one of them alone would leave."""
    bitune = make(dtype=F64)
    if bitune.mixes:
        same, one = copy.copy(bitune), copy.copy(bitune)
        same.passes = [bitune.passes[0]] * len(bitune.passes)
        one.passes, one.mixes = bitune.passes[:1], False
        context, _ = bitune.lay_out(RAGGED, ANSWERS)
        for mixed, single in zip(same.encode(context).layers, one.encode(context).layers):
            assert_same(mixed, single)


def layer_0_is_read_alike(bitune):
    """Whether passes give the same keys, or values, in layer 0, which has seen no other token yet: then
    there is nothing to mix. So it is with one set for all, or with sets that leave the projection alone."""
    found, one = [], copy.copy(bitune)
    for each in bitune.passes:
        one.passes, one.mixes = [each], False
        found.append(one.encode(bitune.lay_out(RAGGED[3:], ANSWERS[3:])[0]).layers[0])
    return any(torch.equal(a, b) for kv in found[1:] for a, b in zip(found[0], kv))


@identity
def alpha_is_where_it_says(make, folder):
    """A number of the mixing moves the caches of just the layers whose α, as it is shown, it moves."""
    bitune = make(dtype=F64)
    if not bitune.mixes:
        return
    context, _ = bitune.lay_out(RAGGED[3:], ANSWERS[3:])
    idle = {0} if layer_0_is_read_alike(bitune) else set()

    def state():
        with torch.no_grad():
            return alpha_by_layer(bitune), bitune.encode(context).layers

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

def unread(bitune, name):
    """Whether nothing reads what a parameter does. Of a set that only reads prompts, layers matter up to the
    last one that is mixed (where α is not 0), and of that one only the keys and values that are mixed."""
    others = [s for s in adapter_sets(bitune.method) if s != bitune.answer_set]
    if not any(f".sets.{s}." in name for s in others):
        return False
    layer, L = int(name.split(".layers.")[1].split(".")[0]), bitune.model.config.num_hidden_layers
    mixed = {"k_proj": {L - 1}, "v_proj": {L - 1}}              # linear -> layers whose cache it reaches
    if bitune.mixes:
        mixed = {"k_proj": set(), "v_proj": set()}
        for what, alphas in alpha_by_layer(bitune).items():     # names begin with "key" or "value"
            mixed["k_proj" if what.startswith("key") else "v_proj"] |= {l for l, a in enumerate(alphas) if a}
    last = max(set.union(*mixed.values()))
    return layer > last or layer == last and not any(p in name and last in ls for p, ls in mixed.items())


@identity
def every_parameter_has_a_gradient_and_moves_the_output(make, folder):
    bitune = make(dtype=F64)
    bitune.losses(RAGGED, ANSWERS).sum().backward()
    with torch.no_grad():
        before = torch.cat(answer_logits(bitune))
        alike = layer_0_is_read_alike(bitune)
        for name, p in bitune.named_parameters():
            if not p.requires_grad:
                assert p.grad is None, name
            elif unread(bitune, name):
                assert p.grad is None or not p.grad.any(), f"{name}: a gradient, though nothing reads it"
            else:
                own = not name.startswith("model.") and not alike       # then each of its numbers counts
                assert p.grad is not None and (p.grad.all() if own else p.grad.any()), f"{name}: no gradient"
                if ".layers." not in name or ".layers.0." in name:      # the other layers are alike
                    kept = p.clone()
                    p.mul_(1.5).add_(0.01)
                    change = (torch.cat(answer_logits(bitune)) - before).abs().max()
                    assert change > 1e-9, f"{name}: no effect"
                    p.copy_(kept)
    for module in bitune.modules():
        stray = [n for n, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not stray, f"{type(module).__name__}.{stray[0]}, no parameter and no buffer, is not saved"


# ----------------------------------------------------------------------------------------------------------
# What is kept

def write_run(make, folder):
    """A Bitune, and its run in folder/run on the checkpoint folder/base."""
    bitune, base = make(), folder / "base"
    write_checkpoint(base, **bitune.tiny_config)
    write_files(folder / "run", run_bytes(bitune, str(base), template="paper", step=1))
    return bitune


@identity
def saved_is_loaded_and_loaded_again(make, folder):
    bitune = write_run(make, folder)
    for _ in range(2):
        torch.rand(3)                               # what is random must come from the run
        loaded, _, n, about = load_run(folder / "run", device="cpu")
        assert about["mixing"] == bitune.mixing and n > 0
        assert all(torch.equal(a, b) for a, b in zip(answer_logits(loaded), answer_logits(bitune)))
        assert alpha_by_layer(loaded) == alpha_by_layer(bitune)


@identity
def resumed_is_uninterrupted(make, folder):
    def steps(bitune, optimizer, which):
        examples = [Example(p, a) for p, a in zip(RAGGED, ANSWERS)]
        return [train_step(bitune, optimizer, examples, 4, 0.01 / (1 + step), 1.0) for step in which]

    whole, half, rest = make(), make(), scatter(make(), seed=2)
    optimizers = [make_optimizer(b, 1e-6, 0.0) for b in (whole, half, rest)]
    record = steps(whole, optimizers[0], range(3))
    steps(half, optimizers[1], range(2))
    write_files(folder, {"state.safetensors": state_bytes(half, optimizers[1], 2)})
    assert load_state(folder / "state.safetensors", rest, optimizers[2]) == 2
    assert steps(rest, optimizers[2], range(2, 3)) == record[2:]
    for (name, a), b in zip(whole.state_dict().items(), rest.state_dict().values()):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), make().parameters()))


@identity
def merged_is_unmerged(make, folder):
    model = make(dtype=F64).model
    ids = torch.tensor([RAGGED[3]])
    positions = torch.arange(ids.shape[1])[None]
    mask = may_attend(positions, positions)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for name in model.sets:
        merged, _ = merge(model, name)(ids, positions, mask)
        assert_same([merged], [model(ids, positions, mask, adapter=name)[0]])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())  # the model is as it was


def failures(make, folder, names=IDENTITIES):
    """The identities that do not hold: name -> what was said. A crash is a failure, too."""
    failed = {}
    for name in names:
        try:
            IDENTITIES[name](make, folder / name)
        except Exception as problem:        # an AssertionError, or whatever a slip leads to
            failed[name] = f"{type(problem).__name__}: {problem}"
    return failed
