"""One run by several processes, a card each: torchrun --standalone --nproc-per-node N train.py ...

All start from the same numbers, by one seed or from one save. Each computes the losses of its share of every
step's examples and gets the sum of all gradients, so that all take the same step. The first of them alone
writes and speaks. Without torchrun nothing in here does anything.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from text.examples import length


def several():
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def first():
    """Whether this is the process that writes and speaks."""
    return not several() or os.environ["RANK"] == "0"


def total(tensor, op=dist.ReduceOp.SUM):
    """The sum of all processes' tensors, in place. Where one has died, the first gets an OSError, and the
    others end without a word."""
    try:
        if dist.is_initialized():
            dist.all_reduce(tensor, op)
    except RuntimeError as problem:
        lost = OSError("another of the processes is gone: " + str(problem).split(". ")[0])
        raise (lost if first() else SystemExit) from None
    return tensor


def sums(*numbers):
    """Each number's sum over all processes. It is taken between CPUs, which notice that a process has died;
    cards would wait for it."""
    return total(torch.tensor(numbers, dtype=torch.float64)).tolist()


def least(number):
    """The least of all processes' numbers."""
    return int(total(torch.tensor(number), dist.ReduceOp.MIN))


@contextmanager
def processes():
    """Join the processes that torchrun has started. They wait for each other as long as it takes; that one
    has died shows by its closed connections."""
    if several():
        dist.init_process_group(timeout=timedelta(days=30))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        sums(0)         # all are connected: one that ends before would leave the others without a store
        if not first():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
    yield
    if several():
        dist.destroy_process_group()


@contextmanager
def in_turn():
    """The first process does alone what stands in here, and says what is wrong with the input. When it is
    through, the others do the same."""
    if not first():
        sums(0)
    yield
    if first():
        sums(0)


def apart():
    """Let each process draw random numbers of its own, such as for dropout."""
    if several() and not first():
        torch.manual_seed(torch.randint(2**62, ()) + dist.get_rank())


def share(examples):
    """This process's part of a list of examples, dealt by length, so that all have about as much to do."""
    ordered = sorted(examples, key=length, reverse=True)
    return ordered[dist.get_rank()::dist.get_world_size()] if dist.is_initialized() else examples


def add_up(loss, trained):
    """Sum a step's loss, and the gradients of what trains, over all processes, in place. A parameter that
    has a gradient in one of them gets one in all."""
    if dist.is_initialized():
        used = [p for p, n in zip(trained, sums(*(p.grad is not None for p in trained))) if n]
        for p in used:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        parts = [loss, *(p.grad for p in used)]
        vector_to_parameters(total(parameters_to_vector(parts)), parts)
