"""On a card, what is computed on the CPU: the same numbers, no tensor left behind, and one wait for the card
for a step, a micro-batch of a validation, a written token. Each check is made on a card that is not there
(pretended.py) and, where there is one, on a real card, whose waits are not counted."""

import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import bitune as bitune_py
import sample
import train
from bitune import METHODS, Bitune
from cli.chat import conversation
from cli.memory import ready_to_answer
from experiments import evaluate
from files.disk import write_files
from files.int8 import eight_bits
from files.run import load_bitune, load_state, run_bytes, state_bytes
from lora import KINDS
from model import KVCache
from pretended import each, pretended
from test_cards import torchrun
from test_commands import files
from text.examples import Example, batches
from tiny import ANSWERS, RAGGED, tiny_bitune, tiny_model, write_checkpoint, write_data

EXAMPLES = [Example(p, a) for p, a in zip(RAGGED, ANSWERS)]
SMALL = {"num_hidden_layers": 2}
same = partial(pytest.approx, rel=2e-4, abs=2e-5)
make_optimizer = partial(train.make_optimizer, lr=1e-3, eps=1e-6, weight_decay=0.0)
real = partial(nullcontext, [])


@pytest.fixture(params=[pretended, real])
def card(request):
    if request.param is real and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def on_both(card, make, call):
    """What call(bitune) gives on the CPU and on the card, and how often the card was waited for."""
    want = call(make())
    with card() as waits:
        bitune = make().to("cuda")
        waits.clear()
        return want, call(bitune), len(waits)


def one_step(bitune, optimizer=None):
    cut = partial(batches, size=2)
    return train.train_step(bitune, optimizer or make_optimizer(bitune), EXAMPLES, cut, 1.0, 1.0)


@pytest.mark.parametrize("method, kind, family", [
    *((method, "lora", "llama") for method in METHODS),
    *(("bitune", *pair) for pair in zip([k for k in KINDS if k != "lora"], ["phi", "gemma", "qwen3"]))])
def test_a_step_a_validation_and_answers(method, kind, family, card):
    def call(bitune):
        valid = train.validate(bitune, EXAMPLES, batches)
        return [*one_step(bitune), *valid.values(), *sum(bitune.generate(RAGGED, 4), [])]

    make = partial(tiny_bitune, method, kind, SMALL | {"model_type": family, "head_dim": 8})
    want, got, waits = on_both(card, make, call)
    assert got == same(want)
    assert waits <= 1 + len(batches(EXAMPLES)) + 4


@pytest.mark.parametrize("how", ["sampled", "merged", "8 bits", "checkpointing", "alternating", "choices"])
def test_everything_else(how, card, monkeypatch):
    def make():
        bitune = tiny_bitune(config=SMALL)
        if how == "8 bits":
            eight_bits(bitune.model)
        return bitune

    def call(bitune):
        bitune.model.checkpointing = how == "checkpointing"
        if how == "merged":
            monkeypatch.setattr("cli.memory.free_bytes", lambda device: 2**40)
            bitune = ready_to_answer(bitune)                        # which waits for each layer
        if how == "alternating":
            bitune = conversation(bitune, "chat-chatml", "alternating")
            said = bitune.generate(RAGGED[:1], 4)[0]
            return said + bitune.generate([RAGGED[0] + said + RAGGED[3]], 4)[0]
        if how == "choices":
            return sum(evaluate.log_probs(bitune, RAGGED, [[[5, 6], [7]]] * 4), [])
        if how == "sampled":
            temperature = 1.0 if card is pretended else 1e-3        # a real one draws other numbers
            return sum(bitune.generate(RAGGED, 4, temperature=temperature, top_k=50, top_p=0.9), [])
        loss = bitune.losses(RAGGED, ANSWERS).sum()
        loss.backward()
        return [loss.tolist(), *sum(bitune.generate(RAGGED, 4), [])]

    want, got, waits = on_both(card, make, call)
    assert got == same(want)
    assert waits <= 1 + 4 or how in ("merged", "alternating", "choices")


def test_a_bfloat16_base_is_near_a_float32_one(card):
    call = lambda bitune: [*bitune.losses(RAGGED, ANSWERS).tolist(), *one_step(bitune)]
    want, bitune = call(tiny_bitune(config=SMALL)), tiny_bitune(config=SMALL)
    for p in bitune.model.parameters():
        p.data = p.data if p.requires_grad else p.data.to(torch.bfloat16)
    with card():
        assert call(bitune.to("cuda")) == pytest.approx(want, rel=0.1)


def test_a_run_goes_on_where_it_was_saved(card, tmp_path):
    """Saved on the CPU and resumed on the card, and the other way round."""
    def second_step(device, resumes):
        if resumes:
            bitune, _, _ = load_bitune(tiny_model(**SMALL).to(device), tmp_path)
            optimizer = make_optimizer(bitune)
            assert load_state(tmp_path / "state.safetensors", bitune, optimizer) == 1
        else:
            bitune = tiny_bitune(config=SMALL).to(device)
            one_step(bitune, optimizer := make_optimizer(bitune))
            state = state_bytes(bitune, optimizer, 1)
            write_files(tmp_path, run_bytes(bitune, "base") | {"state.safetensors": state})
        return one_step(bitune, optimizer)

    want = same(second_step("cpu", resumes=False))
    with card():
        assert second_step("cuda", resumes=True) == want
        assert second_step("cuda", resumes=False) == want
    assert second_step("cpu", resumes=True) == want


# ---- whole commands --------------------------------------------------------------------------------------

@pytest.fixture
def flags(tmp_path):
    """Makes the words of a line: the flags of a run that starts from an adapter, or of what asks it."""
    base, _ = write_checkpoint(tmp_path / "base", **SMALL), write_data(tmp_path / "data.jsonl", 12)
    write_files(tmp_path / "begun", run_bytes(tiny_bitune(config=SMALL), str(base), template="paper"))
    choices = json.dumps({"question": "Which?", "choices": ["one", "2"], "answer": 0})
    (tmp_path / "choices.jsonl").write_text(f"{choices}\n" * 3)
    return lambda line: f"{line} --dtype float32".format(tmp=tmp_path).split()


TRAIN = ("--model {tmp}/base --data {tmp}/data.jsonl --steps 3 --batch-size 4 --lr 0.001 --eval-every 3 "
         "--save-every 3 --val-size 4 --keep best")


class Counted(train.Progress):
    """Notes how many waits there were up to the end of each step."""
    def step(self, run, record):
        self.steps.append(len(self.waits))


def assert_near(folder, other):
    """Two folders hold the same logs, scores and saves, but for times."""
    def lines(side, number):
        texts = [line for file in sorted(side.glob("*.jsonl")) for line in file.read_text().splitlines()]
        return [json.loads(line, parse_float=number) | {"seconds": 0, "tokens_per_s": 0} for line in texts]

    assert lines(folder, float) == lines(other, lambda text: same(float(text)))
    got, want = ({name: t for name, t in files(side).items() if torch.is_tensor(t) and "rng" not in name}
                 for side in (folder, other))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("starts", ["--adapter {tmp}/begun", "--peft full"])
def test_the_commands(starts, card, flags, tmp_path, monkeypatch, capsys):
    """train.py, which waits once a step; scores of the CPU's run, and its answer."""
    def commands(device):
        train.main(flags(f"{TRAIN} {starts} --out {{tmp}}/{device} --device {device}"))
        ask = f"--adapter {{tmp}}/cpu --max-new-tokens 4 --device {device}"
        for data in ("choices", "data"):
            score = f"--task rows --limit 2 --data {{tmp}}/{data}.jsonl --out {{tmp}}/{device}"
            evaluate.main(flags(f"{ask} {score}"))
        capsys.readouterr()
        sample.main(flags(f"{ask} --show-mixing --prompt Why?"))
        return [line for line in "".join(capsys.readouterr()).splitlines() if "tokens/s" not in line]

    monkeypatch.setattr(train, "Progress", Counted)
    Counted.waits, Counted.steps = [], []
    want = commands("cpu")
    Counted.steps.clear()
    with card() as Counted.waits:
        assert commands("cuda") == want
    one, two, three = Counted.steps
    assert two - one <= 1 and three - two <= 1
    assert_near(tmp_path / "cuda", tmp_path / "cpu")


def test_two_processes_on_the_card_train_as_one_on_the_cpu(flags, tmp_path):
    """On the pretended card: few machines have two, and no process with a real one can be forked."""
    begins = f"{TRAIN} --adapter {{tmp}}/begun"
    train.main(flags(f"{begins} --out {{tmp}}/cpu --device cpu"))
    with pretended():
        assert torchrun(flags(f"{begins} --out {{tmp}}/cuda --device cuda")) == [0, 0]
    assert_near(tmp_path / "cuda", tmp_path / "cpu")


@pytest.mark.parametrize("owner, name, part", [
    (bitune_py, "may_attend", None), (KVCache, "join", 0), (KVCache, "join", 1), (Bitune, "answer_pass", 2)])
def test_a_tensor_left_on_the_cpu_is_an_error(owner, name, part, monkeypatch):
    """A mask made there, a cache's buffer of keys or of values, a list of indices."""
    make, behind = getattr(owner, name), partial(each, lambda t: t.inner)

    def slip(*args):
        made = make(*args)
        return behind(made) if part is None else [behind(t) if n == part else t for n, t in enumerate(made)]

    monkeypatch.setattr(owner, name, slip)
    with pretended(), pytest.raises(RuntimeError, match="of the CPU, .* meets one of the card"):
        tiny_bitune(config=SMALL).to("cuda").generate(RAGGED, 4)
