"""A card that is not there: tensors that say they are on `cuda:0`, keep their numbers on the CPU, and
compute there.

It can show that a tensor was left on the CPU: an operation that mixes one of more than no dimensions with a
card's, or indexes one by the other, is an error, as on a card. It counts the places that wait for the card:
numbers that Python asks for, copies from or to ordinary memory (but for those that are told not to block),
and operators that look at numbers before they go on. The arithmetic is the CPU's, so all numbers are. It
cannot show how fast a card is, how much its memory holds, what its kernels do in another order, what a
driver does, nor what happens between real cards: two processes of one add up by the CPU's gloo.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch._dynamo         # which AdamW would import in the midst of it
from torch.overrides import TorchFunctionMode

CARD = torch.device("cuda:0")
aten = torch.ops.aten
MOVE = aten._to_copy.default, aten.copy_.default
WAIT = aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, \
    aten.multinomial.default, aten.repeat_interleave.Tensor
waits = []                  # what has waited for the card


class Pretended(torch.Tensor):
    """A tensor of the card; `inner` has its numbers. PyTorch itself takes it for one without memory."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="cpu",
            requires_grad=requires_grad)

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    def set_data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.inner = other.inner

    data = property(torch.Tensor.data.__get__, set_data)
    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def cpu(self):
        waits.append("cpu")
        return self.inner

    def tolist(self):
        waits.append("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def each(change, value):
    """A value with all its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: each(change, v) for key, v in value.items()}
    return type(value)([each(change, v) for v in value]) if isinstance(value, (list, tuple)) else value


def compute(func, args, kwargs):
    """The operation on the numbers inside, whose results are the card's. (What goes back, `Makers` sees.)"""
    held, cpu = {}, []                      # the tensors of the card, by what is in them; those of the CPU

    def inside(t):
        if not isinstance(t, Pretended):
            cpu.append(t)
            return t
        held[id(t.inner)] = t
        return t.inner

    numbers, asked = each(inside, (args, kwargs)), kwargs.get("device")
    backward = torch._C._current_graph_task_id() >= 0      # autograd makes zeros of its own there
    if left := held and func not in MOVE and not backward and [t for t in cpu if t.dim() and t.numel()]:
        raise RuntimeError(f"{func}: a tensor of the CPU, {tuple(left[0].shape)}, meets one of the card")
    picks = func is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1])
    if held and (func in WAIT and not kwargs.get("output_size") or picks or func in MOVE and cpu):
        waits.append(str(func))
    out = func(*numbers[0], **numbers[1] | ({"device": torch.device("cpu")} if asked is not None else {}))
    same = lambda t: held[id(t)] if id(t) in held else Pretended(t)         # what was changed in place
    return each(same, out) if held or is_card(asked) else out


class Makers(TorchFunctionMode):
    """What is made on the card, or moved there from the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_card(kwargs.get("device")) and not any(isinstance(t, Pretended) for t in args):
            waits.extend([func.__name__] * (func in (torch.tensor, torch.as_tensor)))
            return Pretended(func(*args, **kwargs | {"device": "cpu"}))
        if func in (torch.Tensor.cpu, torch.Tensor.tolist) and isinstance(args[0], Pretended):
            return getattr(args[0], func.__name__)()
        if func is torch.Tensor.to and isinstance(args[1], Pretended):
            args = args[0], CARD, args[1].dtype
        if func is torch.Tensor.to and isinstance(args[1], (str, torch.device)):
            tensor, device, *dtype = args
            if isinstance(tensor, Pretended):
                tensor = tensor if is_card(device) else tensor.cpu()
                return tensor.to(*dtype) if any(dtype) else tensor
            if is_card(device):
                waits.extend(["to"] * (not kwargs.get("non_blocking")))
                return Pretended(tensor.to("cpu", *dtype))
        return func(*args, **kwargs)


def is_card(device):
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


@contextmanager
def pretended():
    """In here there is a card."""
    generator, group = torch.Generator, torch._C._group_tensors_by_device_and_dtype
    grouped = lambda lists, *more: {(CARD if isinstance(own[0][0], Pretended) else d, dtype): (own, at)
                                    for (d, dtype), (own, at) in group(lists, *more).items()}
    answers = {"is_available": lambda: True, "set_device": lambda n: None, "device_count": lambda: 1,
               "mem_get_info": lambda d=None: (2**36,) * 2,
               "get_rng_state": lambda d=None: torch.zeros(16, dtype=torch.uint8),
               "set_rng_state": lambda *a: None, "current_device": lambda: 0}
    waits.clear()
    swap = torch.__future__.set_swap_module_params_on_conversion        # as Module.to finds another kind
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch._C, group.__name__, grouped))
        stack.enter_context(patch.object(torch, "Generator", lambda device=None: generator()))
        stack.enter_context(Makers())
        stack.callback(swap, False)
        swap(True)
        yield waits
