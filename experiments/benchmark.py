"""Speed and memory on random weights, as ratios within one process: what Bitune costs beside what it must.

    python -m experiments.benchmark [--preset 56M] [--against hf] [--device cuda]

Training: a Bitune step over a LoRA step of the same code, beside the ratio of the tokens the two must
process, (2(P-1) + A) / (P + A - 1). Answering at batch 1, as sample.py does: the time to the first token,
then tokens a second, beside the bound of reading every weight once a token: as fast as memory gives them
(`of memory`), or as a matrix-vector product far larger than a model's takes them (`of product`).
With --against hf also transformers' `generate`, and a step of peft's LoRA, where they are installed. What is
timed is called in turn, so that a busy machine slows all alike; figures are medians. All of it is printed
and, with the environment, written to a JSON file.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.profiler import profile

from bitune import Bitune, adapter_sets
from cli.memory import ready_to_answer, step_bytes
from cli.process import command
from cli.settings import SETTINGS, Setting, new_parser, number, text, words
from files.checkpoint import DTYPES, check_device, default_device, default_dtype, load_model, parse_config
from lora import add_adapter
from model import Llama
from text.examples import Example, batches
from train import make_optimizer, train_step


def preset(width, inner, layers, heads, groups, vocabulary, tied=False):
    return {"model_type": "llama", "max_position_embeddings": 4096, "hidden_size": width,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": groups, "vocab_size": vocabulary, "tie_word_embeddings": tied}


PRESETS = {
    "tiny": preset(64, 176, 4, 4, 4, 512),
    "56M": preset(512, 1408, 8, 8, 8, 32000),
    "135M": preset(576, 1536, 30, 9, 3, 49152, tied=True),
    "1B": preset(2048, 8192, 16, 32, 8, 128256, tied=True),
    "8B": preset(4096, 14336, 32, 32, 8, 128256),
}


def random_model(name, device, dtype):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Llama(parse_config(PRESETS[name])).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1)
    return model


def finetunable(model, method):
    """`method` on fresh adapters beside the model's weights, which all methods share."""
    with torch.device("meta"):
        own = Llama(model.config)
    own.load_state_dict(model.state_dict(), assign=True)
    for name in adapter_sets(method):
        add_adapter(own, name)
    return Bitune(own, method)


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def medians(device, repeats, functions):
    """Median seconds of each function, by name, called in turn; the first calls warm up."""
    times = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, f in functions.items():
            synchronize(device)
            start = time.perf_counter()
            f()
            synchronize(device)
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def reading(device):
    """Bytes, far more than any cache holds, and two calls that read them from memory: for their sum, and for
    a matrix-vector product, which a CPU's BLAS makes at two thirds of that speed."""
    w, x = torch.ones(2 ** 14, 2 ** 13, device=device), torch.ones(2 ** 13, device=device)
    return w.numel() * w.element_size(), {"memory": w.sum, "product": lambda: w @ x}


# ----------------------------------------------------------------------------------------------------------
# What is measured: each function yields rows, of names and numbers, as they come

def training(model, args, device):
    tasks = {"lora": finetunable(model, "causal"), "bitune": finetunable(model, "bitune")}
    for bitune in tasks.values():
        bitune.model.checkpointing = args.checkpointing
    optimizers = {name: make_optimizer(b, 1e-4, eps=1e-6, weight_decay=0.0) for name, b in tasks.items()}
    theirs = peft_step(model) if args.against and not args.checkpointing else None
    A = args.answer
    for B in args.batches:
        for P in args.prompts:
            ids = torch.randint(model.config.vocab_size, (B, P + A))
            examples = [Example(t[:P], t[P:]) for t in ids.tolist()]
            cut = partial(batches, size=B)
            step = lambda m: train_step(tasks[m], optimizers[m], examples, cut, 1.0, 1.0)
            steps = {name: partial(step, name) for name in tasks}
            if theirs:
                steps["peft"] = lambda: theirs(ids.to(device), P)
            seconds = medians(device, args.repeats, steps)
            row = {"P": P, "A": A, "batch": B, "bound": (2 * (P - 1) + A) / (P + A - 1)}
            row |= {f"{name}_ms": 1e3 * t for name, t in seconds.items()}
            row["bitune_over_lora"] = seconds["bitune"] / seconds["lora"]
            if theirs:
                row["bitune_over_peft_lora"] = seconds["bitune"] / seconds["peft"]
            for name, bitune in tasks.items():
                row[f"{name}_peak_MB"] = peak(steps[name], device, bitune) / 1e6
                row[f"{name}_computed_MB"] = (parts(bitune) + step_bytes(bitune, examples)) / 1e6
            yield row


def parts(bitune):
    """Bytes of weights, of the adapters with their gradients, and of AdamW's moments."""
    return sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in bitune.parameters())


def peak(step, device, bitune):
    """Most bytes of tensors at once in a step: what it takes, on a GPU by its allocator's account, on a CPU
    by the profiler's, beside the weights, adapters and moments that are there."""
    bitune.zero_grad()
    gradients = sum(p.numel() * p.element_size() for p in bitune.parameters() if p.requires_grad)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before + parts(bitune) - gradients
    os.environ["KINETO_LOG_LEVEL"] = "99"
    with profile(profile_memory=True) as measured:
        step()
    now = most = 0
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most + parts(bitune) - gradients


def answering(model, args, device):
    theirs = hugging_face(model) if args.against else None
    tasks = {"unmerged": finetunable(model, "bitune"), 
             "bitune": ready_to_answer(finetunable(model, "bitune")),
             "lora": ready_to_answer(finetunable(model, "causal")),
             "base": ready_to_answer(Bitune(model, "causal"))}
    read = [p for name, p in model.named_parameters()
            if model.config.tie_word_embeddings or "embed_tokens" not in name]
    weights, new = sum(p.numel() * p.element_size() for p in read), args.answer
    size, reads = reading(device)
    for P in args.prompts:
        prompt = torch.randint(model.config.vocab_size, (P,)).tolist()
        ask = {name: lambda n, b=b: b.generate([prompt], n) for name, b in tasks.items()}
        if theirs:
            ids = torch.tensor([prompt], device=device)
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
            ask["transformers"] = lambda n: theirs.generate(ids, max_new_tokens=n, min_new_tokens=n,
                                                            **options)
        # One long and one short answer: their difference is decoding alone, without the prompt.
        calls = {(name, n): lambda f=f, n=n: f(n) for name, f in ask.items() for n in (1, new)}
        seconds = medians(device, args.repeats, calls | reads)
        for name in ask:
            first, rate = seconds[name, 1], (new - 1) / (seconds[name, new] - seconds[name, 1])
            row = {"P": P, "what": name, "first_token_ms": 1e3 * first, "prompt_tokens_per_s": P / first,
                   "tokens_per_s": rate, "memory_GB_per_s": size / seconds["memory"] / 1e9,
                   **{f"of_{how}": rate * weights * seconds[how] / size for how in reads}}
            if theirs:
                other = seconds["transformers", new] - seconds["transformers", 1]
                row["over_generate"] = rate * other / (new - 1)
            yield row


def loading(model, name, device, dtype):
    """Seconds to load a checkpoint of the same weights, which the system has just written."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(PRESETS[name]))
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, f"{folder}/model.safetensors")
        return medians(device, 3, {"load": lambda: load_model(folder, dtype, device)})["load"]


# ----------------------------------------------------------------------------------------------------------
# The same weights in transformers, and peft's LoRA on them

def hugging_face(model):
    import transformers
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
              "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")
    shape = {f: getattr(model.config, f) for f in fields}
    config = transformers.LlamaConfig(**shape, rms_norm_eps=model.config.norm_eps, eos_token_id=None)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    own = {name: t.clone() for name, t in model.state_dict().items()}
    theirs.load_state_dict(own, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)         # its buffers were on meta
    return theirs.to(model.model.embed_tokens.weight.device).eval()


def peft_step(model):
    """A step of peft's LoRA as train_step takes one: rank 8 on the same linears, AdamW, clipping."""
    import peft
    from model import Linear
    names = sorted({path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, Linear)})
    config = peft.LoraConfig(r=8, lora_alpha=1, target_modules=names)
    theirs = peft.get_peft_model(hugging_face(model), config)
    trained = [p for p in theirs.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, eps=1e-6, fused=True)

    def step(ids, P):
        optimizer.zero_grad()
        labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < P, -100)
        loss = theirs(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        torch.stack([loss.detach(), norm]).tolist()
        optimizer.step()
    return step


# ----------------------------------------------------------------------------------------------------------
# The command

def show(row, first):
    """A line of a Markdown table, and above the first one its head."""
    if first:
        print(f"\n| {' | '.join(name.replace('_', ' ') for name in row)} |\n" + "|---" * len(row) + "|")
    cells = [v if isinstance(v, (str, int)) else f"{v:,.2f}" if v < 10 else f"{v:,.0f}" if v >= 1000 else
             f"{v:.1f}" for v in row.values()]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def environment(device, dtype, against):
    known = {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
             "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
             "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch.")}
    if against:
        import peft
        import transformers
        known |= {"transformers": transformers.__version__, "peft": peft.__version__}
    return known


FLAGS = {
    "preset": Setting("shape of the random model", words(*PRESETS), "56M"),
    "prompts": Setting("lengths of prompts", number(int, 1, 2048) | {"nargs": "+"}, [32, 128, 512]),
    "answer": Setting("length of the answers", number(int, 2, 2048), 64),
    "batches": Setting("examples of a training step", number(int, 1) | {"nargs": "+"}, [1, 8]),
    "repeats": Setting("timed calls of each", number(int, 1), 5),
    "parts": Setting("what is measured", words("training", "answering") | {"nargs": "+"},
                     ["training", "answering"]),
    "against": Setting("also time transformers and peft, which must be installed", words("hf")),
    "out": Setting("where the figures go", text("FILE"), "benchmark.json"),
    **{name: SETTINGS[name] for name in ("checkpointing", "dtype", "device")},
}


@command
def main(argv=None):
    args = new_parser(__doc__, FLAGS).parse_args(argv)
    device = args.device or default_device()
    check_device(device)
    if not Path(args.out).parent.is_dir():
        raise ValueError(f"--out {args.out}: its folder is not there")
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(device)
    model = random_model(args.preset, device, dtype)
    figures = {"settings": vars(args), "environment": environment(device, dtype, args.against),
               "parameters": sum(p.numel() for p in model.parameters())}
    for name in ("environment", "settings"):
        print(f"{name}: {', '.join(f'{k} {v}' for k, v in figures[name].items() if v is not None)}")
    figures["load_s"] = loading(model, args.preset, device, dtype)
    print(f"parameters {figures['parameters']:,}, loaded in {figures['load_s']:.2f} s")
    for name in args.parts:
        figures[name] = []
        for row in {"training": training, "answering": answering}[name](model, args, device):
            show(row, first=not figures[name])
            figures[name].append(row)
            Path(args.out).write_text(json.dumps(figures, indent=2) + "\n")    # stays if killed
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
