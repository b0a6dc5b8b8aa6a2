"""Speed on random weights, as ratios within one run: what Bitune costs beside what it must cost.

    python -m experiments.benchmark [--size small|1b] [--device cuda] [--against transformers]

Training: a Bitune step over a LoRA step of the same code, beside the ratio of the tokens the two must
process, (2(P-1) + A) / (P + A - 1). Decoding: tokens per second at batch 1, as sample.py asks and with the
set "answer" apart (unmerged), beside the bound of reading every weight once per token at the measured memory
bandwidth, and beside transformers' `generate` on the same weights if asked for.
"""

from cli.early import answer_flags

answer_flags(__name__)          # before torch is imported, which takes two seconds

import statistics
import time

import torch

from bitune import Bitune, adapter_sets
from cli.process import before_work, run_main
from cli.settings import flag_adder, new_parser, number
from fast.decoding import quick
from files.checkpoint import DTYPES, check_device, default_device, default_dtype, parse_config
from lora import add_adapter
from model import Llama
from text.examples import Example
from train import make_optimizer, train_step

SIZES = {
    "small": dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                  num_key_value_heads=8, vocab_size=32000),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
}


def random_model(size, device, dtype):
    torch.manual_seed(0)
    config = parse_config({"model_type": "llama", "max_position_embeddings": 2048, **SIZES[size]})
    with torch.device(device):
        model = Llama(config).to(dtype)
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


def medians(device, repeats, **functions):
    """Median seconds of each function, called in turn, so that a busy machine slows them all alike."""
    times = {name: [] for name in functions}
    for i in range(repeats + 2):
        for name, f in functions.items():
            synchronize(device)
            start = time.perf_counter()
            f()
            synchronize(device)
            if i >= 2:                          # the first two warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def bench_training(model, device, repeats, P, A):
    vocab = model.config.vocab_size
    tasks = {"lora": finetunable(model, "causal"), "bitune": finetunable(model, "bitune")}
    optimizers = {m: make_optimizer(b, eps=1e-6, weight_decay=0.0) for m, b in tasks.items()}
    bound = (2 * (P - 1) + A) / (P + A - 1)
    for B in (1, 8):
        ids = torch.randint(vocab, (B, P + A)).tolist()
        examples = [Example(tokens[:P], tokens[P:]) for tokens in ids]
        step = lambda m: lambda: train_step(tasks[m], optimizers[m], examples, B, 1e-4, 1.0)
        t = medians(device, repeats, lora=step("lora"), bitune=step("bitune"))
        peak = {}
        if device.startswith("cuda"):
            for m in tasks:
                torch.cuda.reset_peak_memory_stats()
                step(m)()
                peak[m] = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        ratio = t["bitune"] / t["lora"]
        print(f"training step, P {P}, A {A}, batch {B}:  bitune / lora {ratio:.2f}  bound {bound:.2f}  "
              f"ratio over bound {ratio / bound:.2f}")
        for m in t:
            print(f"    {m:<7} {t[m] * 1e3:8.1f} ms  {B * (P + A) / t[m]:8,.0f} tokens/s{peak.get(m, '')}")


def bench_decoding(model, device, repeats, P, new, against):
    prompt = [torch.randint(model.config.vocab_size, (P,)).tolist()]
    tasks = {"unmerged": finetunable(model, "bitune"), "bitune": quick(finetunable(model, "bitune")),
             "lora": quick(finetunable(model, "causal")), "base": quick(Bitune(model, "causal"))}
    # One long and one short answer: their difference is decoding alone, without the prompt.
    calls = {f"{m} {n}": lambda b=b, n=n: b.generate(prompt, n) for m, b in tasks.items() for n in (1, new)}
    if against:
        theirs, ids = hugging_face(model), torch.tensor(prompt, device=device)
        options = dict(attention_mask=torch.ones_like(ids), do_sample=False)
        calls |= {f"transformers {n}": lambda n=n: theirs.generate(
            ids, max_new_tokens=n, min_new_tokens=n, **options) for n in (1, new)}
    t = medians(device, repeats, **calls)
    read = [p for name, p in model.named_parameters()
            if model.config.tie_word_embeddings or "embed_tokens" not in name]
    weights = sum(p.numel() * p.element_size() for p in read)
    bound = bandwidth(device) / weights
    print(f"decoding, P {P}, batch 1: bound {bound:,.0f} tokens/s, {weights / 1e6:,.0f} MB a token")
    models = [*tasks, "transformers"] if against else [*tasks]
    rates = {m: (new - 1) / (t[f"{m} {new}"] - t[f"{m} 1"]) for m in models}
    for m, rate in rates.items():
        beside = f"  over transformers {rate / rates['transformers']:.2f}" if against else ""
        print(f"    {m:<12} {rate:8,.1f} tokens/s  of the bound {rate / bound:.2f}"
              f"  prompt {t[f'{m} 1'] * 1e3:.1f} ms{beside}")


def bandwidth(device):
    """Bytes per second of reading memory: a matrix-vector product far larger than any cache."""
    w = torch.ones(2 ** 14, 2 ** 13, device=device)
    x = torch.ones(2 ** 13, device=device)
    return w.numel() * w.element_size() / medians(device, 8, read=lambda: w @ x)["read"]


def hugging_face(model):
    """The same weights in transformers' model."""
    import transformers
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
              "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")
    shape = {f: getattr(model.config, f) for f in fields}
    config = transformers.LlamaConfig(**shape, rms_norm_eps=model.config.norm_eps, eos_token_id=None)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    device = theirs.model.embed_tokens.weight.device
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(device)  # its buffers were on meta
    return theirs.eval()


def main(argv=None):
    parser = new_parser(__doc__)
    arg = flag_adder(parser)
    arg("--size", choices=SIZES, default="small", help="shape of the random model")
    arg("--device", help="cpu, cuda or mps (default: cuda if there is one, else cpu)")
    arg("--dtype", choices=DTYPES, help="(default: bfloat16 on a GPU, float32 on a CPU)")
    arg("--prompt-length", type=number(int, 1, 1024), default=128, help="P")
    arg("--answer-length", type=number(int, 2, 1024), default=64, help="A")
    arg("--repeats", type=number(int, 1), default=10, help="timed calls of each")
    arg("--against", choices=["transformers"], help="also time this library, which must be installed")
    args = parser.parse_args(argv)
    device = args.device or default_device()
    with before_work():
        check_device(device)
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(device)
    model = random_model(args.size, device, dtype)
    on_gpu = device.startswith("cuda")
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    n = sum(p.numel() for p in model.parameters())
    print(f"{args.size}: {n / 1e6:,.0f}M parameters, {dtype}, {where}, torch {torch.__version__}, "
          f"median of {args.repeats}")
    bench_training(model, device, args.repeats, args.prompt_length, args.answer_length)
    bench_decoding(model, device, args.repeats, args.prompt_length, args.answer_length, args.against)


if __name__ == "__main__":
    run_main(main)
