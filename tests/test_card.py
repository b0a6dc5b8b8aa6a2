"""On a card that is not there (pretended.py), what is computed on the CPU: the same numbers, no tensor left
behind, and one wait for the card for a step, a micro-batch of a validation, a written token."""

from functools import partial

import pytest

import bitune as bitune_file
import model as model_file
from bitune import METHODS, Bitune
from cli.chat import conversation
from cli.memory import ready_to_answer
from experiments.evaluate import log_probs
from files.disk import write_files
from files.int8 import eight_bits
from files.run import load_bitune, load_state, run_bytes, state_bytes
from lora import KINDS, add_adapter
from pretended import Pretended, pretended, to_card
from text.examples import Example, batches
from tiny import ANSWERS, RAGGED, scatter, tiny_bitune, tiny_model
from train import make_optimizer, train_step, validate

EXAMPLES = [Example(p, a) for p, a in zip(RAGGED, ANSWERS)]
same = partial(pytest.approx, rel=2e-4, abs=2e-5)


def on_both(make, call):
    """What call(bitune) gives on the CPU and on the card, and how often the card was waited for."""
    want = call(make())
    with pretended() as waits:
        bitune = to_card(make())
        waits.clear()
        return want, call(bitune), len(waits)


@pytest.mark.parametrize("method, kind", [*((m, "lora") for m in METHODS), *(("bitune", k) for k in KINDS)])
def test_a_step_a_validation_and_answers(method, kind):
    def call(bitune):
        optimizer = make_optimizer(bitune, 1e-3, 1e-6, 0.0)
        step = train_step(bitune, optimizer, EXAMPLES, partial(batches, size=2), 1.0, 1.0)
        return [*step, *validate(bitune, EXAMPLES, batches).values(), *sum(bitune.generate(RAGGED, 4), [])]

    want, got, waits = on_both(lambda: tiny_bitune(method, kind), call)
    assert got == same(want)
    assert waits <= 1 + len(batches(EXAMPLES)) + 4


@pytest.mark.parametrize("how", ["sampled", "folded", "8 bits", "bfloat16", "checkpointing", "alternating",
                                 "choices"])
def test_everything_else(how, monkeypatch):
    def make():
        if how != "8 bits":
            return tiny_bitune()
        model = tiny_model()
        eight_bits(model)
        for name in ("answer", "prompt"):
            add_adapter(model, name)
        return scatter(Bitune(model))

    def call(bitune):
        bitune.model.checkpointing = how == "checkpointing"
        if how == "folded":
            monkeypatch.setattr("cli.memory.free_bytes", lambda device: 2**40)
            bitune = ready_to_answer(bitune)
        if how == "alternating":
            bitune = conversation(bitune, "chat-chatml", "alternating")
            said = bitune.generate(RAGGED[:1], 4)[0]
            return said + bitune.generate([RAGGED[0] + said + RAGGED[3]], 4)[0]
        if how == "choices":
            return sum(log_probs(bitune, RAGGED, [[[5, 6], [7]]] * 4), [])
        if how == "sampled":
            return sum(bitune.generate(RAGGED, 4, temperature=1.0, top_k=50, top_p=0.9), [])
        loss = bitune.losses(RAGGED, ANSWERS).sum()
        loss.backward()
        return [loss.tolist(), *sum(bitune.generate(RAGGED, 4), [])]

    want, got, _ = on_both(make, call)
    assert got == same(want)


@pytest.mark.parametrize("there", [True, False])
def test_a_run_goes_on_where_it_was_saved(there, tmp_path):
    """Saved on the card and resumed on the CPU, and the other way round."""
    def steps(bitune, optimizer):
        step = lambda: train_step(bitune, optimizer, EXAMPLES, batches, 1.0, 1.0)
        return [number for _ in range(2) for number in step()]

    def begun(bitune):
        optimizer = make_optimizer(bitune, 1e-3, 1e-6, 0.0)
        steps(bitune, optimizer)
        state = state_bytes(bitune, optimizer, 2)
        write_files(tmp_path, run_bytes(bitune, "base", step=2) | {"state.safetensors": state})
        return steps(bitune, optimizer)

    def resumed(model):
        bitune, _, _ = load_bitune(model, tmp_path)
        optimizer = make_optimizer(bitune, 1e-3, 1e-6, 0.0)
        assert load_state(tmp_path / "state.safetensors", bitune, optimizer) == 2
        return steps(bitune, optimizer)

    if there:
        want = begun(tiny_bitune())
        with pretended():
            got = resumed(to_card(tiny_model()))
    else:
        with pretended():
            want = begun(to_card(tiny_bitune()))
        got = resumed(tiny_model())
    assert got == same(want)


def inside(t):
    return t.inner if isinstance(t, Pretended) else t


@pytest.mark.parametrize("slip", ["a mask made on the CPU", "a cache buffer on the CPU",
                                  "an index list left behind"])
def test_a_tensor_left_on_the_cpu_is_an_error(slip, monkeypatch):
    if slip.startswith("a mask"):
        may_attend = bitune_file.may_attend
        monkeypatch.setattr(bitune_file, "may_attend", lambda *args: inside(may_attend(*args)))
    if slip.startswith("a cache"):
        init = model_file.KVCache.__init__

        def left(self, past, size):
            init(self, past, size)
            self.buffers = [tuple(map(inside, kv)) for kv in self.buffers]
        monkeypatch.setattr(model_file.KVCache, "__init__", left)
    if slip.startswith("an index"):
        answer_pass = Bitune.answer_pass
        monkeypatch.setattr(Bitune, "answer_pass", lambda *args: [
            tuple(map(inside, part)) if n == 2 else part for n, part in enumerate(answer_pass(*args))])
    with pretended(), pytest.raises(RuntimeError, match="of the CPU, .* meets one of the card"):
        to_card(tiny_bitune()).generate(RAGGED, 4)
