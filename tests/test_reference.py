"""Numbers computed elsewhere: base models by transformers, every variant of Bitune by its authors' code; and
what holds of the paper's formula: its limit cases, where θ starts, what gets no gradient, and its dtype."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bitune import Bitune, adapter_sets
from edits import subclass
from files.checkpoint import load_model
from identities import F64, answer_logits, assert_same

from model import may_attend
from text.examples import Example, batches, encode_prompt
from text.tokenizer import Tokenizer
from tiny import ANSWERS, RAGGED, add_sized, causal_logits, fresh_bitune, scatter, tiny_bitune
from train import make_optimizer, schedule, train_step

pytestmark = pytest.mark.reference


# ---- base models -----------------------------------------------------------------------------------------

def test_base_logits_and_greedy_tokens(base):
    model, reference = load_model(base), load_file(base / "reference_logits.safetensors")
    ids = reference["input_ids"]
    torch.testing.assert_close(causal_logits(model, ids), reference["logits"], atol=1e-4, rtol=0)
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
        add_sized(model, adapter, case["peft"], cases["rank"], cases["alpha"])
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


# ---- the paper's formula ---------------------------------------------------------------------------------

def with_theta(value, method="bitune"):
    bitune = tiny_bitune(method, dtype=F64)
    for theta in (bitune.theta_key, bitune.theta_value):
        theta.data.fill_(value)
    return bitune


@pytest.mark.parametrize("theta, method", [(0.0, "causal"), (1e30, "no-mixing")])   # α = 0, 1 to the bit
def test_alpha_0_is_the_plain_causal_model_and_alpha_1_is_no_mixing(theta, method):
    bitune, half = with_theta(theta), with_theta(0.01)
    plain = answer_logits(Bitune(bitune.model, method))
    assert_same(answer_logits(bitune), plain)
    assert (answer_logits(half)[0] - plain[0]).abs().max() > 0.1


def test_alpha_1_with_equal_adapters_is_one_forward_under_a_prefix_mask():
    bitune = with_theta(1e30, "shared-weights")
    for prompt, answer, logits in zip(RAGGED, ANSWERS, answer_logits(bitune)):
        ids, P = torch.tensor([prompt + answer]), len(prompt)
        positions = torch.arange(ids.shape[1])[None]
        prefix = positions < P - 1                      # the context sees all of itself
        mask = may_attend(positions, positions) | (prefix[:, None, :, None] & prefix[:, None, None, :])
        one, _ = bitune.model(ids, positions, mask, adapter="answer")
        assert_same([logits], [one[0, P - 1:-1]])


def test_at_the_start_theta_of_layer_0_has_no_gradient():
    bitune = tiny_bitune(dtype=F64)
    for name, p in bitune.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    bitune.losses(RAGGED, ANSWERS).sum().backward()
    for theta in (bitune.theta_key, bitune.theta_value):
        assert theta.grad[0] == 0 and theta.grad[1:].all()


def test_mixing_is_float32_on_a_bfloat16_base():
    bitune = scatter(fresh_bitune(config={"dtype": torch.bfloat16}))
    assert {p.dtype for p in bitune.parameters() if p.requires_grad} == {torch.float32}
    assert bitune.losses(RAGGED, ANSWERS).dtype == torch.float32
    read = torch.randn(2, 3, 2, 2, 2, 5, 8).bfloat16()          # causally and not, 3 layers, keys and values
    exact = bitune.mix([*read.float()], None)
    for mixed, wanted in zip(bitune.mix([*read], None), exact, strict=True):
        assert mixed[0].dtype == torch.bfloat16
        assert all(torch.equal(got, want.bfloat16()) for got, want in zip(mixed, wanted))


@pytest.mark.parametrize("c", [0.1, 0.01, 0.001])
def test_alpha_starts_at_a_half_whatever_c_is(c):
    assert all((a == 0.5).all() for a in fresh_bitune(c=c).alpha(None, None).values())
