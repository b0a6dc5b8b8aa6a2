"""Several processes at one run, and at one grid: they make what one makes."""

import os
import signal
import socket
import time
from itertools import count
from multiprocessing import get_context

import pytest
import torch

import train
from cli.cards import apart
from experiments import ablate
from files.disk import locked
from test_commands import call, files, log
from tiny import some_of

def at_once(*functions):
    """Call each, in a process of its own; returns their exit statuses."""
    processes = [get_context("fork").Process(target=function, daemon=True) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


def torchrun(argv, before=None):
    """train.py in two processes, as torchrun starts them; the second calls before(number, its Bitune) before
    each step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank):
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if rank and before:
            step, number = train.train_step, count(1)
            train.train_step = lambda *args: (before(next(number), args[0]), step(*args))[1]
        train.main(argv)
    return at_once(lambda: process(0), lambda: process(1))


@pytest.mark.parametrize("batch_size", [1, 3])          # a process without any example, and uneven shares
def test_two_processes_train_as_one_does_and_one_goes_on(batch_size, flags, tmp_path, capfd):
    """Stopped in step 3 by a signal to one of them."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    more = "--batch-size", batch_size, "--micro-batch-tokens", 90, "--weight-decay", 0.1, "--lr", 0.001
    train.main(flags(*more, "--out", alone))
    capfd.readouterr()
    stop = lambda step, bitune: step == 3 and os.kill(os.getpid(), signal.SIGTERM)
    assert torchrun(flags(*more), stop) == [1, 0]
    said = capfd.readouterr()
    assert said.out.count("settings: ") == 1 and said.out.count("base model: validation loss") == 1
    assert said.err == ("error: step 3: stopped by a signal to another of the processes. The save of step 3 "
                        f"is whole: python train.py --resume {run}\n")
    call(train, "--resume", run)
    for key in ("step", "loss", "grad_norm", "val_loss", "val_perplexity", "val_accuracy"):
        assert log(run, key) == pytest.approx(log(alone, key), rel=1e-4, abs=1e-4)
    one, two = files(alone), files(run)
    assert one.keys() == two.keys()
    for name, t in one.items():
        if torch.is_tensor(t):
            torch.testing.assert_close(two[name], t, atol=1e-4, rtol=1e-4, msg=name)


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


def no_numbers(bitune):
    bitune.losses = lambda prompts, answers: some_of(bitune).sum() * torch.tensor([torch.nan])


@pytest.mark.parametrize("what, said", [(lambda bitune: os._exit(1), "another of the processes is gone: "),
                                        (no_numbers, "the loss is nan")])
def test_what_one_process_meets_ends_both_in_one_line(what, said, flags, tmp_path, capfd):
    assert torchrun(flags("--save-every", 2), lambda step, bitune: step == 5 and what(bitune))[0] == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: step 5: {said}")
    assert line.endswith(f". The save of step 4 is whole: python train.py --resume {tmp_path / 'run'}")


def test_the_first_process_says_what_is_wrong_with_the_input(flags, capfd):
    assert torchrun(flags("--data", "nowhere"))[0] == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "error: 'nowhere' is not there: expected a data file"


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
