"""A card that is not there: tensors that say they are on `cuda:0`, keep their numbers on the CPU, and
compute there.

It can show that a tensor was left on the CPU: an operation that mixes one of more than no dimensions with a
card's, or indexes one by the other, is an error, as on a card. It counts the places that wait for the card:
a number that Python asks for. The arithmetic is the CPU's, so all numbers are. It cannot show how fast a
card is, what its kernels do in another order, or what a driver does.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch._dynamo         # which AdamW would import in the midst of it
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("cuda:0")
aten = torch.ops.aten
waits = []                  # what Python has asked the card for


class Pretended(torch.Tensor):
    """A tensor of the card; `inner` has its numbers. PyTorch itself takes it for one without memory."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="cpu",
            requires_grad=requires_grad)

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def cpu(self):
        return self.inner

    def tolist(self):
        waits.append("tolist")
        return self.inner.tolist()

    def __repr__(self):
        return f"Pretended({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args, kwargs):
    """The operation on the numbers inside; its results are the card's, if not asked for elsewhere."""
    flat = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    card, cpu = [[t for t in flat if isinstance(t, Pretended) == on] for on in (True, False)]
    asked = kwargs.get("device")
    moves = func in (aten._to_copy.default, aten.copy_.default)
    backward = torch._C._current_graph_task_id() >= 0      # autograd makes zeros of its own there
    if card and not moves and not backward and any(t.dim() and t.numel() for t in cpu):
        raise RuntimeError(f"{func}: a tensor of the CPU, {tuple(cpu[0].shape)}, meets one of the card")
    on_card = torch.device(asked).type == "cuda" if asked is not None else bool(card)
    if func is aten._local_scalar_dense.default and card:
        waits.append(str(func))
    kwargs = kwargs | ({"device": torch.device("cpu")} if asked is not None else {})
    inside = lambda t: t.inner if isinstance(t, Pretended) else t
    out = func(*tree_map(inside, args), **tree_map(inside, kwargs))
    held = {id(t.inner): t for t in card}               # what was changed in place is what it was
    wrap = lambda t: held.get(id(t)) if id(t) in held else Pretended(t) if isinstance(t, torch.Tensor) else t
    return tree_map(wrap, out) if on_card else out


class Makers(TorchFunctionMode):
    """What is made on the card, or moved there from the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if is_card(kwargs.get("device")) and not any(isinstance(t, Pretended) for t in args):
            return Pretended(func(*args, **kwargs | {"device": "cpu"}))
        if func in (torch.Tensor.cpu, torch.Tensor.tolist) and isinstance(args[0], Pretended):
            return getattr(args[0], func.__name__)()
        if func is torch.Tensor.to and isinstance(args[1], Pretended):
            args = args[0], CARD, args[1].dtype
        if func is torch.Tensor.to and isinstance(args[1], (str, torch.device)):
            tensor, device, *dtype = args
            if isinstance(tensor, Pretended):
                tensor = tensor if is_card(device) else tensor.cpu()
                return tensor.to(*dtype) if dtype else tensor
            tensor = tensor.to("cpu", *dtype)
            return Pretended(tensor) if is_card(device) else tensor
        return func(*args, **kwargs)


def is_card(device):
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


@contextmanager
def pretended():
    """In here there is a card."""
    generator = torch.Generator
    answers = {"is_available": lambda: True, "set_device": lambda n: None, "device_count": lambda: 1,
               "mem_get_info": lambda d=None: (2**36,) * 2, "synchronize": lambda d=None: None,
               "get_rng_state": lambda d=None: torch.zeros(16, dtype=torch.uint8),
               "set_rng_state": lambda *a: None, "current_device": lambda: 0}
    waits.clear()
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch, "Generator", lambda device=None: generator()))
        stack.enter_context(patch.object(torch.random, "fork_rng", lambda devices=(), **more: forked()))
        stack.enter_context(Makers())
        yield waits


@contextmanager
def forked():
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def to_card(module):
    """A module whose parameters and buffers are the card's."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(Pretended(p.detach().clone()), p.requires_grad)
        for name, b in m._buffers.items():
            m._buffers[name] = Pretended(b.clone())
    return module
