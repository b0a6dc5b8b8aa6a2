"""Numbers computed elsewhere: base models by transformers, every variant of Bitune by its authors' code."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bitune import Bitune, adapter_sets
from edits import subclass
from files.checkpoint import load_model
from lora import KINDS, add_adapter
from model import may_attend
from text.examples import Example, batches, encode_prompt
from text.tokenizer import Tokenizer
from train import make_optimizer, schedule, train_step

pytestmark = pytest.mark.reference


# ---- base models -----------------------------------------------------------------------------------------

def test_base_logits_and_greedy_tokens(base):
    model, reference = load_model(base), load_file(base / "reference_logits.safetensors")
    ids = reference["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.inference_mode():
        logits, _ = model(ids, positions, may_attend(positions, positions))
    torch.testing.assert_close(logits, reference["logits"], atol=1e-4, rtol=0)
    if "greedy_from_12" in reference:
        answers = Bitune(model, "causal").generate(ids[:, :12].tolist(), 16)
        assert answers == reference["greedy_from_12"].tolist()


def test_greedy_text(greedy):
    """Text in, text out: tokenizer, cached decoding and decoding to text, on a trained model."""
    tokenizer, bitune = Tokenizer.from_pretrained(greedy.parent), Bitune(load_model(greedy.parent), "causal")
    cases = json.loads(greedy.read_text())
    prompts = [encode_prompt(tokenizer, "plain", [("user", c["prompt"])]) for c in cases]
    assert prompts == [c["prompt_ids"] for c in cases]
    answers = bitune.generate(prompts, len(cases[0]["continuation_ids"]))
    assert answers == [c["continuation_ids"] for c in cases]
    texts = [tokenizer.decode(p + a).removeprefix("<s>").strip() for p, a in zip(prompts, answers)]
    assert texts == [c["text"] for c in cases]


# ---- the authors' Bitune ---------------------------------------------------------------------------------

def load_variant(folder, name):
    """A variant's model with the recorded parameters, its examples, its file and its part of cases.json."""
    cases = json.loads((folder / "cases.json").read_text())
    case = cases["variants"][name]
    method = "causal" if name == case["peft"] else name.removesuffix(f"_{case['peft']}")
    method, _, c = method.partition("_s_init_")
    maker = subclass("relu", Bitune) if name == "bitune_relu" else Bitune
    method = method.removesuffix("_relu").removeprefix("bitune_").replace("_", "-")
    model = load_model(folder)
    for adapter in adapter_sets(method):
        size = {"rank": cases["rank"], "lora_alpha": cases["alpha"]}
        own = {option: size[option] for option in size.keys() & KINDS[case["peft"]].options}
        add_adapter(model, adapter, case["peft"], **own)
    bitune = maker(model, method, **{"c": float(c)} if c else {})
    reference = load_file(folder / f"{name}.safetensors")
    with torch.no_grad():
        for key, value in reference.items():
            if key.startswith("param."):
                parameter(bitune, key).copy_(value)
    inputs = load_file(folder / "inputs.safetensors")
    lengths = cases["prompt_and_answer_lengths"]
    tokens = [inputs[f"tokens.{i}"].tolist() for i in range(len(lengths))]
    examples = [Example(t[:P], t[P:P + A]) for t, (P, A) in zip(tokens, lengths)]
    return bitune, examples, reference, case, cases["train"]


def parameter(bitune, key):
    """The parameter of a name such as grad.causal.model.layers.0.mlp.up_proj.lora_A or param.mixing.key."""
    _, adapter, path = key.split(".", 2)
    if adapter == "mixing":
        return getattr(bitune, f"theta_{path}")
    path, part = path.rsplit(".", 1)
    part = {"magnitude": "lora_magnitude_vector", "scale": "ia3_l"}.get(part, part)
    name = {"causal": "answer", "bidirectional": "prompt"}[adapter]
    return getattr(bitune.model.get_submodule(path).sets[name], part)


def test_greedy_answers_logits_losses_alpha_and_gradients(variant):
    """All sequences as one ragged batch; the reference ran them one by one."""
    bitune, examples, reference, case, _ = load_variant(*variant)
    prompts, answers = zip(*examples)
    n = len(case["greedy"][0])
    assert bitune.generate(prompts, n) == [bitune.generate([p], n)[0] for p in prompts] == case["greedy"]

    logits, labels = bitune(prompts, [a + [0] for a in answers])    # also the row after the answer
    for i in range(len(examples)):
        torch.testing.assert_close(logits[i, labels[i] >= 0], reference[f"logits.{i}"], atol=1e-4, rtol=0)

    losses = bitune.losses(prompts, answers)
    torch.testing.assert_close(losses, torch.tensor(case["losses"]), atol=1e-5, rtol=0)
    if bitune.mixes:
        for name, alpha in bitune.alpha(None, None).items():
            torch.testing.assert_close(alpha, reference[f"alpha.{name}"])

    losses.mean().backward()
    gradients = {k: v for k, v in reference.items() if k.startswith("grad.")}
    for key, want in gradients.items():
        got = parameter(bitune, key).grad
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-9, key
    reached = sum(p.grad is not None and bool(p.grad.any()) for p in bitune.parameters())
    assert reached <= len(gradients)  # and none that the authors' code has not


def test_training_run_step_by_step(variant):
    bitune, examples, reference, case, t = load_variant(*variant)
    optimizer = make_optimizer(bitune, t["lr"], t["eps"], t["weight_decay"])
    for step in range(t["steps"]):
        at = range(step * t["accumulation"], (step + 1) * t["accumulation"])
        rate = schedule(step, t["steps"], t["warmup_steps"])
        batch = [examples[i % len(examples)] for i in at]
        loss, norm = train_step(bitune, optimizer, batch, batches, rate, t["clip"])
        assert t["lr"] * rate == pytest.approx(case["train_lrs"][step], rel=1e-9)
        assert loss == pytest.approx(sum(case["train_losses"][i] for i in at) / len(at), abs=2e-5)
        assert norm == pytest.approx(case["train_grad_norms"][step], rel=1e-4)
    one_set = bitune.mixes and len({adapter for _, adapter in bitune.passes}) == 1
    for key, want in reference.items():
        if key.startswith("trained."):
            got = parameter(bitune, key).data
            if one_set and "mixing" in key:
                # Both passes give layer 0 the same keys and values, so its θ has no gradient. The recorded
                # run had one of 1e-6, rounding, which AdamW turned into steps.
                assert got[0] == reference[key.replace("trained", "param")][0]
                got, want = got[1:], want[1:]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=key)


# ---- encodings -------------------------------------------------------------------------------------------

def test_golden_encodings(golden):
    file, tokenizer_file = golden
    if tokenizer_file.read_bytes().startswith(b"\n"):
        pytest.skip("a SentencePiece protobuf, which is not read")
    tokenizer, rows = Tokenizer.from_pretrained(tokenizer_file), json.loads(file.read_text())
    assert [r["text"] for r in rows if tokenizer.encode(r["text"]) != r["ids"]] == []
    assert [r["text"] for r in rows if tokenizer.decode(r["ids"]) != r.get("decoded", r["text"])] == []
