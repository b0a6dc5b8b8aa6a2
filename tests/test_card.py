"""On a card, what is computed on the CPU: the same numbers, no tensor left behind, and one wait for the card
for a step, a micro-batch of a validation, a written token. Each check is made on a card that is not there
(pretended.py) and, where there is one, on a real card, whose waits are not counted. And several processes at
one run, and at one grid, make what one makes."""

import json
import os
import socket
import time
from contextlib import nullcontext
from functools import partial

from multiprocessing import get_context

import pytest
import torch

import bitune as bitune_py
import sample
import train
from bitune import METHODS, Bitune
from cli.cards import apart
from cli.chat import conversation
from experiments import ablate, evaluate
from files.disk import locked, write_files
from files.run import load_bitune, load_state, state_bytes
from lora import KINDS
from model import KVCache
from pretended import each, pretended, waits
from test_commands import at_step, log, tensors
from text.examples import Example, batches
from tiny import ANSWERS, RAGGED, call, some_of, tiny_bitune, tiny_model, write_rows, write_run

EXAMPLES = [Example(p, a) for p, a in zip(RAGGED, ANSWERS)]
SMALL = {"num_hidden_layers": 2}
same = partial(pytest.approx, rel=2e-4, abs=2e-5)
make_optimizer = partial(train.make_optimizer, lr=1e-3, eps=1e-6, weight_decay=0.0)


@pytest.fixture(params=[pretended, nullcontext])
def card(request):
    if request.param is nullcontext and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def on_both(card, make, call):
    """What call(bitune) gives on the CPU and on the card, and how often the card was waited for."""
    want = call(make())
    with card():
        bitune = make().to("cuda")
        waits.clear()
        return want, call(bitune), len(waits)


def one_step(bitune, optimizer=None):
    step = bitune, optimizer or make_optimizer(bitune), EXAMPLES, partial(batches, size=2)
    return train.train_step(*step, 1.0, 1.0)


@pytest.mark.parametrize("method, kind, family", [
    *((method, "lora", "llama") for method in METHODS),
    *(("bitune", *pair) for pair in zip([k for k in KINDS if k != "lora"], ["phi", "gemma", "qwen3"]))])
def test_a_step_a_validation_and_answers(method, kind, family, card):
    def call(bitune):
        valid = train.validate(bitune, EXAMPLES, batches)
        said = bitune.generate(RAGGED, 4) + bitune.generate(RAGGED, 4, temperature=1e-3, top_k=50, top_p=0.9)
        return [*one_step(bitune), *valid.values(), *sum(said, [])]

    make = partial(tiny_bitune, method, kind, SMALL | {"model_type": family, "head_dim": 8})
    want, got, waits = on_both(card, make, call)
    assert got == same(want)
    assert waits <= 1 + len(batches(EXAMPLES)) + 4 + 4


def test_a_conversation_that_goes_on(card):
    def call(bitune):
        chat = conversation(bitune, "chat-chatml", "alternating")
        said = chat.generate(RAGGED[:1], 4)[0]
        return said + chat.generate([RAGGED[0] + said + RAGGED[3]], 4)[0]

    want, got, _ = on_both(card, partial(tiny_bitune, config=SMALL), call)
    assert got == want


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
            write_files(write_run(tmp_path, bitune), {"state.safetensors": state})
        return one_step(bitune, optimizer)

    want = same(second_step("cpu", resumes=False))
    with card():
        assert second_step("cuda", resumes=True) == want
        assert second_step("cuda", resumes=False) == want == second_step("cuda", resumes=True)
    assert second_step("cpu", resumes=True) == want


# ---- whole commands --------------------------------------------------------------------------------------

TRAIN = "--lr 0.001 --steps 3 --dtype float32"
BEGUN = f"{TRAIN} --adapter {{tmp}}/begun"

def assert_near(folder, other):
    """Two folders hold the same logs, scores and saves, but for times."""
    def lines(side, number):
        texts = [line for file in sorted(side.glob("*.jsonl")) for line in file.read_text().splitlines()]
        return [json.loads(line, parse_float=number) | {"seconds": 0, "tokens_per_s": 0} for line in texts]

    assert lines(folder, float) == lines(other, lambda text: same(float(text)))
    got, want = ({name: t for name, t in tensors(side).items() if "rng" not in name}
                 for side in (folder, other))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("line", [f"{BEGUN} --base-bits 8", f"{TRAIN} --peft full --checkpointing"])
def test_the_commands(line, card, flags, tmp_path, monkeypatch, says):
    """train.py, which waits once a step; scores of the CPU's run, and its answer."""
    steps, row = [], {"question": "Which?", "choices": ["one", "2"], "answer": 0}
    choices = write_rows(tmp_path / "choices.jsonl", [row] * 3)
    write_run(tmp_path / "begun", tiny_bitune(), flags()[1])

    def commands(device):
        out = ["--device", device, "--out", tmp_path / device]
        train.main(flags(*line.format(tmp=tmp_path).split(), *out, "--keep", "best"))
        ask = f"--adapter {tmp_path}/cpu --max-new-tokens 4 --device {device} --dtype float32".split()
        for data in (choices, tmp_path / "data.jsonl"):
            call(evaluate, *ask, *out, "--task", "rows", "--limit", 2, "--data", data)
        said = "".join(says(sample, *ask, "--show-mixing", "--prompt", "Why?"))
        return [line for line in said.splitlines() if "tokens/s" not in line]

    monkeypatch.setattr(train.Progress, "step", lambda *args: steps.append(len(waits)))
    want = commands("cpu")
    with card():
        assert commands("cuda") == want
    one, two, three = steps[3:]
    assert two - one <= 1 and three - two <= 1
    assert_near(tmp_path / "cuda", tmp_path / "cpu")


def test_two_processes_on_the_card_train_as_one_on_the_cpu(flags, tmp_path):
    """On the pretended card: few machines have two, and no process with a real one can be forked."""
    write_run(tmp_path / "begun", tiny_bitune(), flags()[1])
    argv = flags(*BEGUN.format(tmp=tmp_path).split(), "--device")
    call(train, *argv, "cpu", "--out", tmp_path / "cpu")
    with pretended():
        assert torchrun([*argv, "cuda", "--out", f"{tmp_path}/cuda"]) == [0, 0]
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


# ---- several processes -----------------------------------------------------------------------------------

def at_once(*functions):
    """Call each, in a process of its own; returns their exit statuses."""
    processes = [get_context("fork").Process(target=function, daemon=True) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


def torchrun(argv, *at):
    """train.py in two processes, as torchrun starts them, with at_step(*at) in the second one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank):
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with at_step(*at) if rank and at else nullcontext():
            train.main(argv)
    return at_once(lambda: process(0), lambda: process(1))


@pytest.mark.parametrize("batch_size", [1, 3])          # a process without any example, and uneven shares
def test_two_processes_train_as_one_does_and_one_goes_on(batch_size, flags, tmp_path, capfd):
    """Stopped in step 3 by a signal to one of them."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    more = "--batch-size", batch_size, "--micro-batch-tokens", 90, "--weight-decay", 0.1, "--lr", 0.001
    train.main(flags(*more, "--out", alone))
    capfd.readouterr()
    assert torchrun(flags(*more), 3) == [1, 0]
    said = capfd.readouterr()
    assert said.out.count("settings: ") == 1 and said.out.count("base model: validation loss") == 1
    assert said.err == ("error: step 3: stopped by a signal to another of the processes. The save of step 3 "
                        f"is whole: python train.py --resume {run}\n")
    call(train, "--resume", run)
    for key in ("step", "loss", "grad_norm", "val_loss", "val_perplexity", "val_accuracy"):
        assert log(run, key) == pytest.approx(log(alone, key), rel=1e-4, abs=1e-4)
    torch.testing.assert_close(tensors(run), tensors(alone), atol=1e-4, rtol=1e-4)


def test_each_process_draws_a_dropout_of_its_own(monkeypatch):
    """Though all have drawn their adapters by one seed."""
    drawn = []
    for rank in range(3):
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "3"), patch.setenv("RANK", str(rank))
            patch.setattr("torch.distributed.get_rank", lambda: rank)
            torch.manual_seed(42)
            apart()
            drawn.append(torch.rand(()).item())
    assert len({*drawn}) == 3


def no_numbers(bitune, *args):
    bitune.losses = lambda prompts, answers: some_of(bitune).sum() * torch.tensor([torch.nan])


@pytest.mark.parametrize("what, said", [(lambda *args: os._exit(1), "another of the processes is gone: "),
                                        (no_numbers, "the loss is nan")])
def test_what_one_process_meets_ends_both_in_one_line(what, said, flags, tmp_path, capfd):
    assert torchrun(flags("--save-every", 2), 5, what)[0] == 1
    assert torchrun(flags("--data", "nowhere"))[0] == 2
    line, of_input = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: step 5: {said}")
    assert line.endswith(f". The save of step 4 is whole: python train.py --resume {tmp_path / 'run'}")
    assert of_input == "error: 'nowhere' is not there: expected a data file"


def test_two_processes_make_each_run_of_a_grid_once(flags, tmp_path, capfd):
    """All but one, which a third is at until one of them waits for nothing else; then it is made too."""
    grid, kept, waited, listed = tmp_path / "run", "bitune-lr0.01-seed42", tmp_path / "waited", ablate.listed
    argv = [a.replace("--lr", "--lrs") for a in flags("--steps", 2, "--seeds", 42, 43)]

    def wait_for(file):
        while not file.exists():
            time.sleep(0.01)

    def third():
        with locked(grid / kept):
            wait_for(waited)

    def left(runs):
        if runs == [kept]:
            waited.touch()
        return listed(runs)

    def other():
        wait_for(grid / kept / ".lock")
        ablate.listed = left
        ablate.main(argv)
    assert at_once(third, other, other) == [0, 0, 0]
    said = capfd.readouterr().out
    assert f"waiting for what other processes are at: {kept}\n" in said
    assert said.count((grid / "tables.md").read_text()) == 2
    runs = [f.parent for f in grid.glob("*/bitune.json")]
    assert len(runs) == 6 and all(len(log(run)) == 2 for run in runs)
