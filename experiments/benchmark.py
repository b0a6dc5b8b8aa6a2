"""Speed and memory on random weights, as ratios within one process: what Bitune costs beside what it must.

    python -m experiments.benchmark [--preset 56M] [--against hf] [--device cuda]

Training: a Bitune step over a LoRA step, beside the ratio of the tokens that they must process, the bound.
Answering at batch 1: the time to the first token, then tokens a second, beside the bound of reading every
weight once a token, at the rate of a sum (`of memory`) or of a large matrix-vector product (`of product`).
On a GPU, `of card`: the part of the time that a card of these rates needs, by experiments.cost. What is
timed is called in turn, so that a busy machine slows all alike; figures are medians.
"""

import os
import statistics
import time
from functools import partial
from itertools import accumulate, product

import torch
from torch.profiler import profile

from cli.memory import ready_to_answer, step_bytes
from cli.process import command
from cli.settings import SETTINGS, Setting, check_idle, new_parser, number, words
from experiments import cost
from files.checkpoint import placed
from lora import linears
from text.examples import Example, batches
from train import make_optimizer, train_step

SHAPES = cost.SHAPES | {
    "tiny": cost.shape("llama", 512, 64, 176, 4, 4, 4),
    "56M": cost.shape("llama", 32000, 512, 1408, 8, 8, 8),
    "135M": cost.shape("llama", 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
}
METHODS = {"lora": "causal", "bitune": "bitune", "unmerged": "bitune", "base": None}
READ = 2 ** 14, 2 ** 13         # floats, far more than any cache holds


def random_model(preset, device, dtype):
    torch.manual_seed(0)
    model = cost.without_memory(SHAPES[preset], None).model.to(dtype).to_empty(device=device)
    for p in model.parameters():
        p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.fill_(1)
    return model


def made(args, name, weights=None):
    """One of METHODS on the base's weights, which all share; or of the same shape on the device meta."""
    return cost.without_memory(SHAPES[args.preset], METHODS[name], weights=weights)


def medians(device, repeats, functions):
    """Median seconds of each function, by name, called in turn; the first calls warm up."""
    times = {name: [] for name in functions}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(repeats + 1):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(later) for name, (_, *later) in times.items()}


def training(model, args, device):
    tasks = {name: made(args, name, model.state_dict()) for name in ("lora", "bitune")}
    for bitune in tasks.values():
        bitune.model.checkpointing = args.checkpointing
    ours, A = dict(tasks), args.answer
    if args.against and not args.checkpointing:
        tasks["peft"] = Peft(args.preset, model)
    optimizers = {name: make_optimizer(b, 1e-4, eps=1e-6, weight_decay=0.0) for name, b in tasks.items()}
    for B, P in product(args.batches, args.prompts):
        ids = torch.randint(model.config.vocab_size, (B, P + A)).tolist()
        examples = [Example(t[:P], t[P:]) for t in ids]              # of one length: one batch
        steps = {name: partial(train_step, b, optimizers[name], examples, batches, 1.0, 1.0)
                 for name, b in tasks.items()}
        seconds = medians(device, args.repeats, steps)
        row = {"P": P, "batch": B, **{f"{name}_ms": 1e3 * t for name, t in seconds.items()},
               **{f"bitune_over_{name}": seconds["bitune"] / t for name, t in seconds.items()
                  if name != "bitune"},
               "bound": (2 * (P - 1) + A) / (P + A - 1)}
        for name, bitune in ours.items():
            row[f"{name}_peak_MB"] = peak(steps[name], device, bitune) / 1e6
            row[f"{name}_computed_MB"] = (held(bitune, 4) + step_bytes(bitune, examples)) / 1e6
            if device.type == "cuda" and not args.checkpointing:        # which is not counted
                least = cost.seconds_on(cost.step_work(made(args, name), examples), args)
                row[f"{name}_of_card"] = least / seconds[name]
        yield row


def held(bitune, times):
    """Bytes of the frozen weights, and so many times those of what trains."""
    return sum(p.numel() * p.element_size() * (times if p.requires_grad else 1) for p in bitune.parameters())


def peak(step, device, bitune):
    """Most bytes of tensors at once in a step: what it takes, on a GPU by its allocator's account, on a CPU
    by the profiler's, beside the weights, adapters and moments that are there."""
    bitune.zero_grad()
    there = held(bitune, 3)             # with AdamW's moments
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before + there
    os.environ["KINETO_LOG_LEVEL"] = "99"
    with profile(profile_memory=True) as measured:
        step()
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(sizes, initial=0)) + there


def answering(model, args, device):
    weights, new = sum(p.numel() * p.element_size() for name, p in model.named_parameters()
                       if model.config.tie_word_embeddings or "embed_tokens" not in name), args.answer
    tasks = {name: made(args, name, model.state_dict()) for name in METHODS}
    tasks |= {name: ready_to_answer(b) for name, b in tasks.items() if name != "unmerged"}
    theirs = hugging_face(args.preset, model) if args.against else None
    w, x = torch.ones(*READ, device=device), torch.ones(READ[1], device=device)
    reads, size = {"memory": w.sum, "product": lambda: w @ x}, w.numel() * w.element_size()
    for P in args.prompts:
        prompt = torch.randint(model.config.vocab_size, (1, P))
        ask = {name: partial(b.generate, prompt.tolist()) for name, b in tasks.items()}
        if theirs:
            ids = prompt.to(device)
            ask["transformers"] = lambda n: theirs.generate(ids, max_new_tokens=n, do_sample=False)
        # One long and one short answer: their difference is decoding alone, without the prompt.
        calls = {(name, n): partial(f, n) for name, f in ask.items() for n in (1, new)}
        seconds = medians(device, args.repeats, calls | reads)
        token = {name: (seconds[name, new] - seconds[name, 1]) / (new - 1) for name in ask}
        for name in ask:
            row = {"P": P, "what": name, "first_token_ms": 1e3 * seconds[name, 1],
                   "tokens_per_s": 1 / token[name],
                   **{f"of_{how}": weights * seconds[how] / size / token[name] for how in reads}}
            if theirs:
                row["over_generate"] = token["transformers"] / token[name]
            if device.type == "cuda" and name in METHODS:
                works = cost.answer_work(made(args, name), P, new)
                first, last = (cost.seconds_on(done, args) for done in works)
                row |= {"first_of_card": first / seconds[name, 1], "token_of_card": last / token[name]}
            yield row


# ----------------------------------------------------------------------------------------------------------
# The same shape in transformers, and peft's LoRA on it

def hugging_face(preset, model):
    import transformers
    weight = model.model.embed_tokens.weight
    config = transformers.LlamaConfig(**SHAPES[preset], eos_token_id=None)
    with weight.device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=weight.dtype).eval()


class Peft(torch.nn.Module):
    """peft's LoRA, rank 8 on the same linears, as train_step takes a Bitune, for prompts of one length."""

    def __init__(self, preset, model):
        super().__init__()
        import peft
        names = sorted({path.split(".")[-1] for path in linears(model)})
        config = peft.LoraConfig(r=8, lora_alpha=1, target_modules=names)
        self.model = peft.get_peft_model(hugging_face(preset, model), config).train()
        self.device = self.model.device

    def losses(self, prompts, answers):
        ids = torch.tensor([p + a for p, a in zip(prompts, answers)], device=self.device)
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < len(prompts[0]), -100)
        return self.model(input_ids=ids, labels=labels, use_cache=False).loss.expand(len(ids))


# ----------------------------------------------------------------------------------------------------------
# The command

PARTS = {"training": training, "answering": answering}
FLAGS = {
    "preset": Setting("shape of the random model", words(*SHAPES), "56M"),
    "prompts": Setting("lengths of prompts", number(int, 1, 2048) | {"nargs": "+"}, [32, 128, 512]),
    "answer": Setting("length of the answers", number(int, 2, 2048), 64),
    "batches": Setting("examples of a training step", number(int, 1) | {"nargs": "+"}, [1, 8]),
    "repeats": Setting("timed calls of each", number(int, 1), 5),
    "parts": Setting("what is measured", words(*PARTS) | {"nargs": "+"}, list(PARTS)),
    "against": Setting("also time transformers and peft, which must be installed", words("hf")),
    **cost.CARD, **{name: SETTINGS[name] for name in ("checkpointing", "dtype", "device")},
}


@command
def main(argv=None):
    args = new_parser(__doc__, FLAGS).parse_args(argv)
    device, dtype = placed(args.device, args.dtype)
    if "training" not in args.parts:
        check_idle(vars(args), ("batches", "checkpointing"), "without --parts training", FLAGS)
    if device.type != "cuda":
        check_idle(vars(args), cost.CARD, f"on {device.type}", FLAGS)
    print(f"{args.preset}, {str(dtype)[6:]}, torch {torch.__version__},",
          torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads")
    model = random_model(args.preset, device, dtype)
    for part in args.parts:
        print()
        cost.print_table(PARTS[part](model, args, device))


if __name__ == "__main__":
    main()
