"""Small random models and checkpoints for the tests."""

import base64
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bitune import Bitune, adapter_sets
from files.checkpoint import load_model, parse_config
from files.disk import write_files
from files.run import run_bytes
from lora import KINDS, add_adapter
from model import Llama, may_attend
from text.tokenizer import Tokenizer

CASES = Path(__file__).parent / "cases"                 # files of others, as they were met
CONFIG = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
          "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": 256, "eos_token_id": 257}
RAGGED = [[5, 9, 250, 3, 7, 7, 1, 80], [4], [11, 12], [9, 8, 7, 6, 5, 4, 3, 2, 1, 77, 66, 55, 44]]
LONG = [(13 * i * i + 5) % 256 for i in range(90)]      # longer than a window that somebody might try
ANSWERS = [[3, 2, 1], [7, 9, 200, 14, 15], [8], [1, 2]]


def tiny_model(dtype=torch.float32, seed=0, **config):
    """Weights are drawn wide (std 0.3): with small ones, a wrong mask hides in the tolerances."""
    torch.manual_seed(seed)
    model = Llama(parse_config(CONFIG | config)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    return model


@torch.inference_mode()
def causal_logits(model, ids, **adapter):
    """Of rows of ids that are read causally."""
    ids = torch.as_tensor(ids)
    at = torch.arange(ids.shape[1]).expand_as(ids)
    return model(ids, at, may_attend(at, at), **adapter)[0]


@torch.no_grad()
def scatter(module, seed=1):
    """Move every trainable parameter away from where training starts, whatever it is called: what is zero
    gets a value, and what is not a size of its own."""
    torch.manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad:
            size = torch.empty_like(p).uniform_(0.3, 2)
            p.copy_(torch.where(p == 0, torch.empty_like(p).normal_(0, 0.5), p * size))
    for name, b in module.named_buffers():
        if b.is_floating_point() and not name.startswith("model."):     # an adapter's are drawn by its seed
            b.add_(0.3)
    return module


def add_sized(model, name, kind, rank, lora_alpha=2.0, **options):
    """An adapter set of such a size, where its kind has one."""
    size = {"rank": rank, "lora_alpha": lora_alpha}
    own = {option: size[option] for option in size.keys() & KINDS[kind].options}
    add_adapter(model, name, kind, **own | options)


def fresh_bitune(method="bitune", kind="lora", config={}, adapters={}, **options):
    """A method on a tiny model, its adapters as training finds them."""
    model = tiny_model(**config)
    for rank, name in enumerate(adapter_sets(method), 4):          # each set with a rank of its own
        add_sized(model, name, kind, **{"rank": rank} | adapters)
    bitune = Bitune(model, method, **options)
    bitune.tiny_config = config             # of which `write_checkpoint` makes the same base
    return bitune


def tiny_bitune(*args, dtype=torch.float32, **options):
    """The same, with everything that trains away from its start."""
    return scatter(fresh_bitune(*args, **options)).to(dtype).eval()


def some_of(bitune):
    """Some of the numbers that a method trains."""
    return bitune.model.model.layers[0].self_attn.q_proj.sets["answer"].lora_A


def write_checkpoint(folder, seed=0, **config):
    """A checkpoint folder as published ones are: config, weights, and a tokenizer of bytes, <s> and </s>."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tiny_model(seed=seed, **config).state_dict(), folder / "model.safetensors")
    lines = (base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
        "added_tokens_decoder": {"256": {"content": "<s>"}, "257": {"content": "</s>"}}}))
    return folder


def rewrite(file, edit):
    """A file of tensors, as edit(its tensors, by name) leaves them."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def tokenizer_of(spec, folder, **config):
    """The tokenizer of a tokenizer.json and a tokenizer_config.json, which are written to a folder."""
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_pretrained(folder)


def write_run(folder, bitune, base="base", **about):
    """The run of a Bitune on the base in a folder, but for what only training leaves."""
    bitune.model.digest = load_model(base).digest if (Path(base) / "config.json").exists() else ""
    write_files(folder, run_bytes(bitune, str(base), **{"template": "paper", "step": 1} | about))
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_data(path, n=40):
    sums = ((f"What is {i} and {i % 7}?", f"It is {i + i % 7}.") for i in range(n))
    return write_rows(path, [{"question": question, "answer": answer} for question, answer in sums])


def change(path, **values):
    """A JSON file with other values in some of its fields."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def call(command, *argv):
    command.main([str(a) for a in argv])
