"""What finetuning the paper's base models takes, computed without weights and without a GPU:

    python -m experiments.cost [--models llama-2-7b] [--peft lora] [--prompt 256] [--answer 256]

One example at a time, in bfloat16 (full finetuning: float32). The weights' bytes; 16 for each parameter that
trains; the tensors that autograd keeps from the forward pass, as a fused attention kernel would leave
them, and the logits that are there at once; the operations of forward and backward, counted by PyTorch,
and the hours that 3,000 steps of 10 examples take at --tflops. What a kernel needs for a moment comes on
top.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from bitune import Bitune, adapter_sets
from cli.memory import step_bytes
from cli.process import command
from cli.settings import SETTINGS, Setting, new_parser, number, words
from files.checkpoint import parse_config
from files.int8 import eight_bits
from lora import KINDS, add_adapter
from model import Llama
from text.examples import Example

SHAPES = {
    "gemma-2b": dict(model_type="gemma", vocab_size=256000, hidden_size=2048, intermediate_size=16384,
                     num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256),
    "gemma-7b": dict(model_type="gemma", vocab_size=256000, hidden_size=3072, intermediate_size=24576,
                     num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=16, head_dim=256),
    "llama-2-7b": dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                       num_hidden_layers=32, num_attention_heads=32),
    "llama-3.2-1b": dict(model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                         num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                         tie_word_embeddings=True),
    "llama-3.2-3b": dict(model_type="llama", vocab_size=128256, hidden_size=3072, intermediate_size=8192,
                         num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
                         tie_word_embeddings=True),
    "llama-3-8b": dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                       num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    "phi-2": dict(model_type="phi", vocab_size=51200, hidden_size=2560, intermediate_size=10240,
                  num_hidden_layers=32, num_attention_heads=32, partial_rotary_factor=0.4),
}


class FusedAttention(torch.autograd.Function):
    """Of scaled_dot_product_attention, what a fused kernel keeps for its backward pass: q, k, v, the mask in
    their dtype, the output, and a number a row. It computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = q.new_empty(*q.shape[:3], v.shape[3])
        mask = None if mask is None else mask.to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


class Fused(TorchFunctionMode):
    """In here, attention is such a kernel's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs or {})
        q, k, v, mask = args
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return FusedAttention.apply(q, k, v, mask)


def cost(shape, method, kind, options, P, A, checkpointing=False, bits=None):
    """Parameters in all, those that train, bytes of the frozen ones, bytes kept, operations of a step."""
    with torch.device("meta"):
        model = Llama(parse_config(shape)).to(torch.float32 if KINDS[kind].trains_base else torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    if bits:
        eight_bits(model)
    model.checkpointing = checkpointing
    for name in adapter_sets(method):
        add_adapter(model, name, kind, **options)
    bitune, example = Bitune(model, method), Example([0] * P, [0] * A)
    with FlopCounterMode(display=False) as counter:
        bitune.losses([example.prompt], [example.answer]).sum().backward()
    with Fused():
        activations = step_bytes(bitune, [example])
    trained = sum(p.numel() for p in bitune.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in bitune.parameters() if not p.requires_grad)
    return parameters, trained, frozen, activations, counter.get_total_flops()


@command
def main(argv=None):
    flags = {
        "models": Setting("shapes", words(*SHAPES) | {"nargs": "+"}, list(SHAPES)),
        "prompt": Setting("tokens of the prompt", number(int, 1), 256),
        "answer": Setting("tokens of the answer", number(int, 1), 256),
        "tflops": Setting("10^12 operations a second", number(float, 1), 150),
        **{name: SETTINGS[name] for name in ("peft", "checkpointing", "base_bits")},
    }
    args = new_parser(__doc__, flags).parse_args(argv)
    rank = KINDS[args.peft].options.get("rank")         # with one, also plain finetuning of twice the rank
    variants = [("causal", {}), *([("causal", {"rank": 2 * rank.default})] if rank else []), ("bitune", {})]
    print("| base model | parameters | method | that train | frozen weights | trained, 16 bytes each "
          "| activations | together | TFLOP an example | 3,000 steps |")
    print("|---" * 10 + "|")
    for name in args.models:
        for method, own in variants:
            n, trained, *sizes, flops = cost(SHAPES[name], method, args.peft, own, args.prompt, args.answer,
                                              args.checkpointing, args.base_bits)
            sizes.insert(1, 16 * trained)
            label = f"{method}, rank {own.get('rank', rank.default)}" if rank else method
            cells = [name, f"{n:,}", label, f"{trained:,}",
                     *(f"{size / 1e9:.1f} GB" for size in (*sizes, sum(sizes))), f"{flops / 1e12:.1f}",
                     f"{30_000 * flops / (args.tflops * 1e12) / 3600:.1f} h"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
