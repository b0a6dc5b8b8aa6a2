"""What finetuning the paper's base models takes, computed without weights and without a GPU:

    python -m experiments.cost [--models llama-2-7b] [--peft lora] [--prompt 256] [--answer 256]

One example at a time, in bfloat16 (full finetuning: float32). The weights' bytes; 16 for each parameter that
trains; what autograd keeps, with a fused attention kernel, and the logits that are there at once; the
operations of forward and backward, and the hours of 3,000 steps of 10 examples at --tflops. What a kernel
needs for a moment comes on top.

--card TOKENS ...: instead, what a step, the first token of an answer and its last token take at least on a
card of such rates, half of the tokens prompt: the longest of its operations, reads and launches.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bitune import Bitune, adapter_sets, sample_token
from cli.memory import step_bytes
from cli.process import command
from cli.settings import SETTINGS, Setting, check_bits, check_idle, new_parser, number, words
from files.checkpoint import parse_config
from files.int8 import eight_bits
from lora import KINDS, add_adapter
from model import KVCache, Llama, extended
from text.examples import Example


def shape(kind, vocabulary, width, inner, layers, heads, groups, **more):
    return dict(model_type=kind, vocab_size=vocabulary, hidden_size=width, intermediate_size=inner,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
                max_position_embeddings=4096, **more)


SHAPES = {
    "gemma-2b": shape("gemma", 256000, 2048, 16384, 18, 8, 1, head_dim=256),
    "gemma-7b": shape("gemma", 256000, 3072, 24576, 28, 16, 16, head_dim=256),
    "llama-2-7b": shape("llama", 32000, 4096, 11008, 32, 32, 32),
    "llama-3.2-1b": shape("llama", 128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
    "llama-3.2-3b": shape("llama", 128256, 3072, 8192, 28, 24, 8, tie_word_embeddings=True),
    "llama-3-8b": shape("llama", 128256, 4096, 14336, 32, 32, 8),
    "phi-2": shape("phi", 51200, 2560, 10240, 32, 32, 32, partial_rotary_factor=0.4),
}
LENGTH = number(int, 1, 10**6)
CARD = {                # an A100's data sheet; a launch is a guess
    "tflops": Setting("10^12 operations a second", number(float, 1), 312),
    "gbytes": Setting("10^9 bytes a second from its memory", number(float, 1), 2039),
    "launch": Setting("microseconds from one launch to the next", number(float, 0.1), 3),
}


class FusedAttention(torch.autograd.Function):
    """Computes nothing, and keeps what a fused kernel of attention keeps for its backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = q.new_empty(*q.shape[:3], v.shape[3])
        mask = None if mask is None else mask.to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return *map(torch.empty_like, ctx.saved_tensors[:3]), None


class Fused(TorchFunctionMode):
    """In here, attention is such a kernel's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs or {})
        q, k, v, mask = args
        if mask is not None:                # then none takes grouped heads
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return FusedAttention.apply(q, k, v, mask)


class Counted(TorchDispatchMode):
    """Counts the operators in here that a card would launch, and the bytes that they read of weights."""

    def __init__(self, module):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, tensors = func(*args, **kwargs or {}), [t for t in args if torch.is_tensor(t)]
        on_cpu = tensors and not any(t.is_meta for t in tensors)
        if not (on_cpu or func.is_view or "empty" in func.name() or "_unsafe_view" in func.name()):
            self.launches += 1
            if func is not torch.ops.aten.embedding.default:            # which reads a few rows
                self.bytes += sum(t.numel() * t.element_size() for t in tensors
                                  if t.untyped_storage()._cdata in self.weights)
        return out


def operations(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def work_of(bitune, call):
    """The operations of call(), the bytes that it reads of weights, and its launches."""
    with Counted(bitune) as counted, Fused():
        call()
    return operations(call), counted.bytes, counted.launches


def step_work(bitune, examples):
    """The same of a step on these examples, which also reads and writes what autograd keeps, and 40 bytes
    for each parameter that trains, in clipping and AdamW."""
    flops, read, launches = work_of(bitune, lambda: bitune.losses(*zip(*examples)).sum().backward())
    with Fused():
        read += 2 * step_bytes(bitune, examples)
    return flops, read + sum(40 * p.numel() for p in bitune.parameters() if p.requires_grad), launches


@torch.inference_mode()
def answer_work(bitune, P, A):
    """The same of the first token of an answer to P tokens, and of the last one of A tokens."""
    def first():
        x, _, at, read = bitune.answer_pass([[0] * P], [[0]])
        extended(*read)                 # as Bitune.answer does
        sample_token(bitune.model.head(x[at]), 0.0, 0, 1.0, None)

    def last():
        logits, _ = bitune.model(place, place, None, cache, bitune.answer_set)
        sample_token(logits[:, -1], 0.0, 0, 1.0, None)

    past = extended(*bitune.answer_pass([[0] * P], [[0] * A])[-1])
    cache, place = KVCache(past, 1), past.positions[:, -1:]
    return work_of(bitune, first), work_of(bitune, last)


def seconds_on(done, card):
    """The seconds that this work takes at least on a card of these rates."""
    flops, read, launches = done
    return max(flops / card.tflops / 1e12, read / card.gbytes / 1e9, launches * card.launch / 1e6)


def without_memory(shape, method, kind="lora", options={}, bits=None, weights=None):
    """A Bitune of this shape on the device meta, or with a base's `weights`, which are not copied; method
    None: the bare base."""
    with torch.device("meta"):
        model = Llama(parse_config(shape)).to(torch.float32 if KINDS[kind].trains_base else torch.bfloat16)
    if weights:
        model.load_state_dict(weights, assign=True)
    if bits:
        eight_bits(model)
    for name in adapter_sets(method) if method else ():
        add_adapter(model, name, kind, **options)
    return Bitune(model, method or "causal")


def cost(shape, method, kind, options, P, A, checkpointing=False, bits=None):
    """Parameters in all, those that train, bytes of the frozen ones, bytes kept, operations of a step."""
    parameters = sum(p.numel() for p in without_memory(shape, None).parameters())
    bitune, examples = without_memory(shape, method, kind, options, bits), [Example([0] * P, [0] * A)]
    bitune.model.checkpointing = checkpointing
    trained = sum(p.numel() for p in bitune.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in bitune.parameters() if not p.requires_grad)
    with Fused():
        activations = step_bytes(bitune, examples)
    flops = operations(lambda: bitune.losses(*zip(*examples)).sum().backward())
    return parameters, trained, frozen, activations, flops


def print_table(rows):
    """Rows, column -> cell, as a table, line by line as they come."""
    for n, row in enumerate(rows):
        cells = [v if isinstance(v, (str, int)) else f"{v:,.2f}" if v < 10 else f"{v:,.0f}" if v >= 1000
                 else f"{v:.1f}" for v in row.values()]
        for line in ([] if n else [row, ["---"] * len(row)]) + [cells]:
            print(f"| {' | '.join(map(str, line))} |".replace("_", " "), flush=True)


def in_training(args):
    rank = KINDS[args.peft].options.get("rank")         # with one, also plain finetuning of twice the rank
    models = [("causal", {}), *([("causal", {"rank": 2 * rank.default})] if rank else []), ("bitune", {})]
    columns = "frozen weights", "trained, 16 bytes each", "activations", "together"
    for name, (method, own) in product(args.models, models):
        n, trained, frozen, activations, flops = cost(SHAPES[name], method, args.peft, own, args.prompt,
                                                      args.answer, args.checkpointing, args.base_bits)
        sizes = frozen, 16 * trained, activations, frozen + 16 * trained + activations
        yield {"base model": name, "parameters": f"{n:,}",
               "method": f"{method}, rank {own.get('rank', rank.default)}" if rank else method,
               "that train": f"{trained:,}",
               **{column: f"{size / 1e9:.1f} GB" for column, size in zip(columns, sizes)},
               "TFLOP an example": f"{flops / 1e12:.1f}",
               "3,000 steps": f"{30_000 * flops / (args.tflops * 1e12) / 3600:.1f} h"}


def on_card(args):
    for name, tokens, method in product(args.models, args.card, ("causal", "bitune")):
        bitune, half = without_memory(SHAPES[name], method, args.peft, {}, args.base_bits), tokens // 2
        works = step_work(bitune, [Example([0] * half, [0] * half)]), *answer_work(bitune, half, half)
        yield {"ms at least (TFLOP, GB, launches)": f"{name}, {method}", "tokens": f"{tokens:,}",
               **{what: f"{1e3 * seconds_on((flops, read, launches), args):.3g} "
                        f"({flops / 1e12:.3g}, {read / 1e9:.3g}, {launches:,})"
                  for what, (flops, read, launches) in zip(("step", "first token", "last token"), works)}}


@command
def main(argv=None):
    flags = {
        "models": Setting("shapes", words(*SHAPES) | {"nargs": "+"}, list(SHAPES)),
        "prompt": Setting("tokens of the prompt", LENGTH, 256),
        "answer": Setting("tokens of the answer", LENGTH, 256),
        "card": Setting("what a card needs at least, of so many tokens",
                        number(int, 2, 10**6) | {"nargs": "+"}),
        **CARD, **{name: SETTINGS[name] for name in ("peft", "checkpointing", "base_bits")},
    }
    args = new_parser(__doc__, flags).parse_args(argv)
    idle = ("prompt", "answer", "checkpointing") if args.card else ("gbytes", "launch")
    check_idle(vars(args), idle, f"with{'' if args.card else 'out'} --card", flags)
    check_bits(args)
    print_table(on_card(args) if args.card else in_training(args))


if __name__ == "__main__":
    main()
