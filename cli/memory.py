"""How much memory a step takes, and how many tokens at a time there is room for."""

from pathlib import Path

import torch

from bitune import LOGITS
from cli.process import out_of_memory
from lora import fold
from text.examples import Example, length


def free_bytes(device):
    """What a device's memory has room for, as far as that is known; of a CPU's, Linux tells it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 2**63)


def bytes_kept(bitune, loss):
    """How many bytes autograd keeps of the forward pass that loss() makes, without parameters."""
    storages = {}                                       # held here, so that none is counted twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    for p in bitune.parameters():
        storages.pop(p.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def step_bytes(bitune, examples):
    """The bytes that a step on these examples at once takes beside the weights: what autograd keeps of the
    forward pass (with checkpointing: each block's input, and all that one block keeps), and the logits that
    are there at a time, with their probabilities."""
    model, c = bitune.model, bitune.model.config
    checkpointing, model.checkpointing = model.checkpointing, False
    activations = bytes_kept(bitune, lambda: bitune.losses(*zip(*examples)).sum())
    model.checkpointing = checkpointing
    if checkpointing:
        tokens = sum(max(1, len(bitune.passes)) * len(e.prompt) + len(e.answer) for e in examples)
        width, L = c.hidden_size * model.model.embed_tokens.weight.element_size(), c.num_hidden_layers
        activations = activations // L + L * tokens * width
    return activations + 2 * 4 * min(LOGITS, sum(len(e.answer) for e in examples) * c.vocab_size)


def tokens_that_fit(bitune, examples, s):
    """How many tokens, with padding, a micro-batch may have: n times those of the longest example. n is at
    most the batch size, and what --micro-batch-tokens has room for; without that flag it is halved until n
    times what one example takes, as measured, fits into the memory that gradients and moments leave. Then
    such a micro-batch runs forward and backward, for nothing: if memory is short all the same, it shows now
    and not some night. What several passes read takes most, so there all but one token is prompt."""
    longest, buffers = max(examples, key=length), [b.clone() for b in bitune.buffers()]
    if bitune.mixes:
        ids = longest.prompt + longest.answer
        longest = Example(ids[:-1], ids[-1:])
    with torch.random.fork_rng([bitune.device] if bitune.device.type == "cuda" else []):
        n = s.batch_size
        if s.micro_batch_tokens:
            n = min(n, max(1, s.micro_batch_tokens // length(longest)))
        else:
            trained = sum(p.numel() * p.element_size() for p in bitune.parameters() if p.requires_grad)
            room = 0.8 * free_bytes(bitune.device) - 3 * trained
            one = step_bytes(bitune, [longest])
            while n > 1 and n * one > room:
                n = -(-n // 2)
        while True:
            try:
                bitune.losses(*zip(*[longest] * n)).sum().backward()
                break
            except RuntimeError as problem:
                if n == 1 or not out_of_memory(problem):
                    raise
            bitune.zero_grad()
            n = -(-n // 2)
    for buffer, before in zip(bitune.buffers(), buffers):
        buffer.copy_(before)
    return n * length(longest)


@torch.no_grad()
def ready_to_answer(bitune):
    """Fold the set "answer", so that each layer writes a token by one product: where there is room for the
    copies, and only in float32, as a bfloat16 weight is too coarse for most of what was learned. On a CPU
    let weights lie column by column: each thread then reads its own part of a product with one token."""
    weight = bitune.model.model.embed_tokens.weight
    size = sum(p.numel() * p.element_size() for p in bitune.model.parameters())
    if weight.dtype == torch.float32 and 2 * size < free_bytes(bitune.device):
        if bitune.answer_set:
            fold(bitune.model, bitune.answer_set)
        for p in bitune.model.parameters() if weight.device.type == "cpu" else ():
            p.data = p.data.t().contiguous().t() if p.dim() == 2 and p.dtype == torch.float32 else p.data
    return bitune
