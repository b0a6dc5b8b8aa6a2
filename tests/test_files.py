"""Checkpoints, adapters and tokenizers, also of others, as they were met: each is read as its reference
implementation reads it (cases/expected.json has the numbers), or refused; how adapters start; and files
written whole or not at all."""

import json
import os
import shutil
from contextlib import nullcontext
from itertools import count

import pytest
import torch

import chats
import sample
from bitune import Bitune
from experiments import evaluate
from files.adapters import adapter_bytes, load_adapter
from files.checkpoint import load_base, load_model, parse_config
from files.disk import finish_saves, json_bytes, write_files
from files.run import load_run
from lora import adapters, add_adapter, fold
from model import ACTIVATIONS, rotary
from text.examples import encode_prompt, load_examples, stop_id
from text.tokenizer import Tokenizer
from tiny import (ANSWERS, CASES, CONFIG, RAGGED, causal_logits, change, rewrite, scatter, tiny_bitune,
                  tiny_model, tokenizer_of, write_checkpoint, write_rows, write_run)
from train import make_optimizer

EXPECTED = json.loads((CASES / "expected.json").read_text(encoding="utf-8"))
IDS = [[1, 260, 270, 264, 281, 262, 275, 268]]


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "m")


def refused(folder, *said):
    with pytest.raises(ValueError) as error:
        load_model(folder)
    assert all(part in str(error.value) for part in said), error.value


# ---- the config ------------------------------------------------------------------------------------------

@pytest.mark.reference
def test_rope_s_angles_are_not_rounded_before_their_cosine():
    """2104.09864's, p θ^(-2i/d), of a bfloat16 model: bfloat16 itself has 17.25 for 173 / 10."""
    at = torch.tensor([[1, 173, 1001]])
    angle = at.T * 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    for got, want in zip(rotary(parse_config(CONFIG), at, torch.bfloat16), (angle.cos(), angle.sin())):
        torch.testing.assert_close(got[0, 0].double(), want, atol=2**-8, rtol=0)


@pytest.mark.reference
def test_activations_are_the_published_ones():
    """At 1: the sigmoid of 1; the normal distribution's Φ(1), and what 1606.08415 has for it with tanh."""
    at_1 = {"silu": 0.73106, "gelu": 0.84134, "gelu_new": 0.84119, "gelu_pytorch_tanh": 0.84119}
    assert {name: round(f(torch.ones(())).item(), 5) for name, f in ACTIVATIONS.items()} == at_1


def test_a_text_longer_than_the_sliding_window_is_refused():
    model = tiny_model(model_type="mistral", sliding_window=12)
    causal_logits(model, [[1] * 12])
    with pytest.raises(ValueError, match="13 tokens are more than the model's sliding_window of 12"):
        causal_logits(model, [[1] * 13])


# ---- checkpoints -----------------------------------------------------------------------------------------

def test_every_tensor_that_does_not_fit_is_in_one_error(folder):
    def spoil(state):
        del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
        state |= {"model.layers.0.extra": torch.zeros(2), "lm_head.weight": torch.zeros(299, 32)}

    rewrite(folder / "model.safetensors", spoil)
    refused(folder, "4 tensors do not fit", "missing model.norm.weight (32,)",
            "missing model.layers.1.mlp.up_proj.weight (48, 32)", "unexpected model.layers.0.extra (2,)",
            "lm_head.weight is (299, 32), expected (300, 32)")


def test_other_files_are_refused_by_name(folder, tmp_path, request):
    for norm, message in ((torch.full((32,), torch.nan), "model.norm.weight holds NaN or infinity"),
                          (torch.ones(32, dtype=torch.int8), "model.norm.weight is I8, expected floats")):
        rewrite(folder / "model.safetensors", lambda tensors: tensors.update({"model.norm.weight": norm}))
        refused(folder, message)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "lacks model.safetensors: expected safetensors")
    (folder / "model.safetensors").write_bytes(b"half a downl")
    refused(folder, "cannot be read ", "is the download complete?")
    refused(tmp_path, "has no config.json")
    sharded = shutil.copytree(request.path.parent / "reference/base/llama3.2", tmp_path / "sharded")
    (sharded / "model-00003-of-00005.safetensors").unlink()
    refused(sharded, "lacks model-00003-of-00005.safetensors")


def test_bfloat16_weights_are_read_into_the_dtype_asked_for(folder):
    """Beside RoPE's frequencies, which old exports hold."""
    want, more = causal_logits(load_model(folder), IDS), {"model.rotary_emb.inv_freq": torch.ones(4)}
    half = lambda t: {name: w.bfloat16() for name, w in (t | more).items()}
    rewrite(folder / "model.safetensors", lambda t: t.update(half(t)))
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert (causal_logits(model, IDS) - want).norm() < 0.05 * want.norm()


@torch.no_grad()
def test_weights_that_are_written_to_leave_the_file_alone(folder):
    want = tiny_model().state_dict()
    for p in load_model(folder).parameters():           # stored in float32: not copied
        p.zero_()
    assert all(torch.equal(t, want[name]) for name, t in load_model(folder).state_dict().items())


# ---- adapters --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_new_set_starts_at_the_base_model_and_only_it_trains(kind):
    """In float32, on a base of any dtype; the output keeps that dtype."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        model = tiny_model(dtype, model_type="qwen2")
        before = Bitune(model, "causal")(RAGGED, ANSWERS)[0]
        add_adapter(model, "answer", kind)
        after = Bitune(model, "causal")(RAGGED, ANSWERS)[0]
        assert after.dtype == dtype and (after - before).norm() <= tolerance * before.norm()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert all(p.requires_grad == (".sets.answer." in name) for name, p in model.named_parameters())


def test_lora_starts_as_peft_s():
    (adapter, *_) = add_adapter(tiny_model(), "answer", targets=["down_proj"]).values()
    A, most = adapter.lora_A, 48 ** -0.5
    assert A.shape == (8, 48) and 0.9 * most < A.abs().max() <= most


@pytest.mark.reference
def test_dropout_drops_inputs():
    """x, and not what A makes of it: of an input with a single 1, all of B A x goes or all of it stays."""
    (adapter, *_) = add_adapter(tiny_model(), "answer", targets=["q_proj"], dropout=0.5).values()
    scatter(adapter)
    dropped, whole = adapter.low_rank(torch.eye(32)), adapter.eval().low_rank(torch.eye(32))
    stays = dropped.any(dim=1)
    torch.testing.assert_close(dropped, 2 * whole * stays[:, None])
    assert 0 < stays.sum() < 32


# ---- to the disk -----------------------------------------------------------------------------------------

def test_files_are_written_all_or_none_wherever_the_process_dies(tmp_path, monkeypatch):
    """Fail at each system call in turn: afterwards all is old or, once finished, all is new."""
    old, new = ({name: data for name in ("a", "sub/b", "c")} for data in (b"old", b"new"))
    read = lambda folder: {name: (folder / name).read_bytes() for name in old}
    outcomes = []
    for moment in range(8):
        folder, calls = tmp_path / str(moment), count()
        write_files(folder, old)

        def dying(call):
            def wrapped(*args):
                if next(calls) == moment:
                    raise OSError(28, "No space left on device")
                call(*args)
            return wrapped

        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr("os.fsync", dying(os.fsync))
            patch.setattr("os.replace", dying(os.replace))
            write_files(folder, new)
        finish_saves(folder)
        assert read(folder) in (old, new)
        assert sum(f.is_file() and f.name != ".lock" for f in folder.rglob("*")) == 3
        outcomes.append(read(folder) == new)
    assert outcomes == [False] * 5 + [True] * 3     # three drafts, their list and its name; then the renames


def test_bytes_are_on_the_disk_before_a_name_changes(tmp_path, monkeypatch):
    """At each fsync the system has the whole file: nothing of it waits in Python's buffer."""
    done, replace = [], os.replace
    monkeypatch.setattr("os.fsync", lambda file: done.append(os.fstat(file).st_size))
    monkeypatch.setattr("os.replace", lambda old, new: (done.append(new.name), replace(old, new)))
    write_files(tmp_path, {"a": b"12", "b": b"345"})
    assert done == [2, 3, len(json_bytes(["a", "b"])), "renaming.json", "a", "b"]


# ---- as they were met ------------------------------------------------------------------------------------

@pytest.mark.reference
@pytest.mark.parametrize("case", EXPECTED["logits"])
def test_checkpoints_and_adapters(case):
    adapted = case.startswith("adapter")
    model = load_model(CASES / case / "base" if adapted else CASES / case)
    if adapted:
        load_adapter(model, "answer", CASES / case)
    logits = causal_logits(model, IDS, adapter="answer" if adapted else None)[0, -1, :8]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits"][case]), atol=0.011, rtol=0)


@pytest.mark.reference
def test_special_tokens_beyond_the_vocabulary_do_no_harm():
    model, tokenizer = load_base(CASES / "checkpoint-pad-beyond-vocabulary", "cpu")
    prompt = encode_prompt(tokenizer, "plain", [("user", "the all")])
    assert Bitune(model, "causal").generate([prompt], 6) == [[153, 190, 4, 119, 190, 38]]
    assert "<pad>" not in tokenizer.special and "<pad>" in tokenizer.names.values()


def test_a_head_equal_to_the_embedding_stays_tied(tmp_path):
    folder, embedding = write_checkpoint(tmp_path, tie_word_embeddings=True), "model.embed_tokens.weight"
    rewrite(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    assert load_model(folder).config.tie_word_embeddings


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("kind, changes, want", [
    ("mistral", {"num_key_value_heads": None, "attention_bias": True},
     {"num_key_value_heads": 4, "qkv_bias": False}),
    ("qwen2", {"mlp_bias": True},
     {"qkv_bias": True, "o_bias": False, "mlp_bias": False, "sliding_window": None}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True},
     {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    ("gemma", {"hidden_act": "gelu"}, {"activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    ("phi", {"rope_parameters": {"partial_rotary_factor": 0.25}},
     {"rotary_dim": 2, "activation": "gelu_new"}),
    ("llama", {"rope_scaling": {"type": "default"} | LINEAR}, {"rope": {"rope_theta": 10000.0} | LINEAR}),
    ("llama", {"rope_parameters": {"rope_theta": 5e5} | LINEAR}, {"rope": {"rope_theta": 5e5} | LINEAR}),
    ("llama", {"partial_rotary_factor": 0.5}, {"rotary_dim": 8}),   # the reference does not look at it
    ("llama", {"logit_scale": None, "made_up": False, "_name_or_path": "x"}, {})])
def test_configs(kind, changes, want):
    config = parse_config(CONFIG | {"model_type": kind, "head_dim": 8} | changes)
    assert {name: getattr(config, name) for name in want} == want


BARE = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 32}


@pytest.mark.reference
@pytest.mark.parametrize("kind", EXPECTED["left_out"])
def test_what_a_config_leaves_out(kind):
    c = parse_config(BARE | {"model_type": kind})
    assert EXPECTED["left_out"][kind] == [
        c.norm_eps, c.max_position_embeddings, c.num_key_value_heads, c.head_dim, c.sliding_window,
        c.activation, c.tie_word_embeddings]
    assert c.rope == {"rope_type": "default", "rope_theta": 10000.0}
    assert c.rotary_dim == (4 if kind == "phi" else c.head_dim)


@pytest.mark.parametrize("changes, message", [
    ({"logit_scale": 0.5, "use_cache": True}, "it has logit_scale, which is not known here"),
    ({f"new_{i}": 1 for i in range(9)}, "new_0, new_1, new_2, new_3, new_4, and 4 more, which is not"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
     "low_freq_factor is not below high_freq_factor"),
    ({"rope_parameters": {"rope_type": "default", "mscale": 2.0}}, "its RoPE has mscale, which is not"),
    ({"rms_norm_eps": "1e-6"}, "the rms_norm_eps '1e-6', expected a number above 0"),
    ({"num_key_value_heads": 3}, "and 3 key/value heads do not go together"),
    ({"attention_bias": 1}, "the attention_bias 1, expected true or false or null"),
    ({"vocab_size": True}, "the vocab_size True, expected a whole number above 0"),
    ({"model_type": "mamba"}, "model_type 'mamba' is not supported: expected llama or mistral or qwen2"),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "its RoPE has the type 'yarn', expected"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "needs low_freq_factor, high_freq_factor"),
    ({"hidden_act": "relu"}, "it has the hidden_act 'relu', expected"),
    ({"hidden_size": None}, "config.json: it lacks hidden_size"),
    ({"is_causal": False}, "it has the is_causal False, expected true or null"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised, by gptq: expected weights")])
def test_what_a_config_says_and_is_not_understood_is_refused(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    refused(tmp_path, message)


# ---- adapters, data, numbers and prompts -----------------------------------------------------------------

HEAD = "base_model.model.lm_head.weight"
LORA_A = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight".format


@pytest.mark.parametrize("spoil, message", [
    ({"made_up": 1, "also": False}, "has made_up, which is not known here"),
    ({"kasa_config": {}}, "has kasa_config, which is not known here"),
    ({"init_lora_weights": "OLoRA"}, "has the init_lora_weights 'OLoRA', expected null or true"),
    ({"exclude_modules": ["q_proj"]}, r"has the exclude_modules \['q_proj'\], expected null or \[\]"),
    ({"target_modules": r".*\.1\..*"}, "name, and PEFT would drop them: model.layers.0.self_attn.q_proj"),
    ({"layers_to_transform": 0}, "has the layers_to_transform 0, expected null"),
    ({"r": 2.0}, "the r 2.0, expected a whole number from 1 to 65536"),
    ({"rank_pattern": {"[": 2}}, "names layers by no regular expression: unterminated character"),
    ({"target_modules": "q{99999999999}"}, "names layers by no regular expression: the repetition number"),
    ({"modules_to_save": [], "layers_to_transform": [], "layers_pattern": None}, None),
    ({"r": 5}, r"is \(2, 32\), expected \(5, 32\)"),
    ({"peft_type": "LOHA"}, "an adapter of kind 'LOHA': expected FULL or IA3 or LORA"),
    ({"modules_to_save": ["x"], "bias": "all"}, "has the modules_to_save .'x'., expected null or false"),
    (lambda tensors: tensors.pop(LORA_A(0)), "missing .*layers.0.self_attn.q_proj.lora_A"),
    (lambda tensors: tensors.update({LORA_A(9): torch.zeros(4, 32)}), "unexpected .*layers.9"),
    (lambda tensors: tensors.update({LORA_A(0)[:-6] + "mine.weight": tensors.pop(LORA_A(0))}),
     "missing .*layers.0.self_attn.q_proj.lora_A"),
    (lambda tensors: tensors.update({HEAD: torch.ones(300, 32)}), "brings its own lm_head.weight"),
    (dict.clear, "no tensors")])
def test_what_an_adapter_says_and_does_not_fit_is_refused(spoil, message, tmp_path):
    """Other fields of its adapter_config.json, or other tensors."""
    model = tiny_model()
    add_adapter(model, "answer", targets=["q_proj"], rank=2)
    write_files(tmp_path, adapter_bytes(model, "answer"))
    if isinstance(spoil, dict):
        change(tmp_path / "adapter_config.json", **spoil)
    else:
        rewrite(tmp_path / "adapter_model.safetensors", spoil)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        load_adapter(tiny_model(), "answer", tmp_path)


@pytest.mark.parametrize("kind, plain, known", [
    ("dora", "lora_A.weight", ["lora_A.default.weight"]), ("ia3", "ia3_l", ["ia3_l.default"]),
    ("dora", "lora_magnitude_vector", [f"lora_magnitude_vector{end}.weight" for end in ("", ".default")])])
def test_names_that_peft_knows_are_known(kind, plain, known, tmp_path):
    """Each of them was tried with peft 0.21.2."""
    model, file = tiny_model(), tmp_path / "adapter_model.safetensors"
    add_adapter(model, "answer", kind)
    scatter(model)
    for ending in known:
        write_files(tmp_path, saved := adapter_bytes(model, "answer"))
        rewrite(file, lambda t: [t.update({n.replace(plain, ending): t.pop(n)}) for n in [*t] if plain in n])
        load_adapter(again := tiny_model(), "answer", tmp_path)
        assert adapter_bytes(again, "answer") == saved


def test_ranks_and_scales_of_single_layers(tmp_path):
    """As PEFT has them: patterns name the end of a path; a rank-stabilised scale is alpha / sqrt(r)."""
    model, path, config = tiny_model(), "model.layers.1.mlp.up_proj", tmp_path / "adapter_config.json"
    add_adapter(model, "answer", rank=2, lora_alpha=4.0)
    add_adapter(model, "answer", targets=[path], rank=3, lora_alpha=6.0)
    model.sets["answer"] = "lora", {"rank": 2, "lora_alpha": 4.0, "dropout": 0.0}
    scatter(model)
    write_files(tmp_path, adapter_bytes(model, "answer"))
    written = json.loads(config.read_text())
    assert (written["r"], written["rank_pattern"], written["alpha_pattern"]) == (2, {path: 3}, {path: 6.0})
    pattern = {r"layers\.1\.mlp\.up_proj": 3}
    for fields in ({}, {"rank_pattern": pattern}, {"rank_pattern": pattern, "use_rslora": True}):
        change(config, **fields)
        again = tiny_model()
        load_adapter(again, "answer", tmp_path)
        one, other = (causal_logits(m, IDS, adapter="answer") for m in (again, model))
        assert torch.equal(one, other) != ("use_rslora" in fields)
    for at, adapter in adapters(again, "answer").items():
        assert adapter.s == pytest.approx(6 / 3**0.5 if at == path else 4 / 2**0.5)


def test_a_tokenizer_beside_an_adapter_is_the_bases(tmp_path):
    base, spec = write_checkpoint(tmp_path / "base"), chats.small("chat-chatml")
    run = write_run(tmp_path / "run", tiny_bitune("causal"), base)
    (run / "bitune.json").unlink()
    for folder in (base, run):
        tokenizer_of(spec, folder, chat_template="one")
    load_run(run, base)
    end = {"eos_token": "<|im_end|>"}
    for own, others in (({"chat_template": "one"}, {"chat_template": "another"}),
                        ({"chat_template": "one"}, {"chat_template": "one"} | end), ({}, end)):
        tokenizer_of(spec, base, **own)
        tokenizer_of(spec, run, **others)
        with pytest.raises(ValueError, match="brings another tokenizer or chat template than .*base has"):
            load_run(run, base)


def test_a_merge_that_overflows_is_refused():
    model = tiny_model(torch.float16)
    adapter = add_adapter(model, "answer")["model.layers.1.mlp.up_proj"]
    adapter.lora_A.data.fill_(1e3), adapter.lora_B.data.fill_(1e3)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: merged in torch.float16, it would not"):
        fold(model, "answer")


@pytest.mark.parametrize("kind, decays", [
    ("full", {"weight"}), ("dora", {"lora_A", "lora_B"}), ("ia3", set())])
def test_weight_decay_is_for_matrices(kind, decays):
    """Also for those of rank 1."""
    own = {"adapters": {"rank": 1}} if kind == "dora" else {}
    bitune = tiny_bitune("bitune", kind, {"attention_bias": True}, **own)
    groups = make_optimizer(bitune, 0.01, 1e-6, 0.1).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    named = {name: p for name, p in bitune.named_parameters() if id(p) in decayed}
    assert {name.split(".")[-1] for name in named} == decays
    assert all(p.dim() == 2 for p in named.values())


def test_a_model_without_numbers_ends_in_one_line(folder, tmp_path, exits):
    rewrite(folder / "model.safetensors", lambda t: t["model.norm.weight"].fill_(3e38))     # finite itself
    data = write_rows(tmp_path / "data", [{"prompt": "x", "choices": ["a", "b"], "answer": 0}])
    for message, command, *argv in (("the model gives no numbers", sample, "--prompt=x", "--temperature=0"),
                                    ("the model gives no numbers", sample, "--prompt=x", "--temperature=1"),
                                    ("of a choice is nan", evaluate, "--task=rows", "--data", data)):
        assert message in exits(1, command, "--model", folder, *argv)


# ---- tokenizers ------------------------------------------------------------------------------------------

@pytest.mark.reference
@pytest.mark.parametrize("case", EXPECTED["encodings"])
def test_encodings(case):
    text, ids = EXPECTED["encodings"][case]
    assert Tokenizer.from_pretrained(CASES / case).encode(text) == ids


@pytest.mark.reference
def test_bos_eos_and_what_decoding_strips():
    bos = Tokenizer.from_pretrained(CASES / "tokenizer-bos-not-special")
    assert encode_prompt(bos, "plain", [("user", "the all")]) == [1, 291, 293, 292]
    assert stop_id(Tokenizer.from_pretrained(CASES / "tokenizer-eos-in-settings-only"), "plain") == 295
    metaspace = Tokenizer.from_pretrained(CASES / "tokenizer-decoder-metaspace")
    assert metaspace.decode([291, 293, 292]) == "the all"


def test_a_run_that_no_tokenizer_takes_is_dropped_and_counted(tmp_path):
    tokenizer = Tokenizer.from_pretrained(CASES / "tokenizer-added-lstrip")
    rows = [{"prompt": "hello", "completion": c} for c in ("wor", "a" + " " * 200_000 + "b")]
    tokenizer.eos_id = 0
    examples, dropped = load_examples(write_rows(tmp_path / "data", rows), tokenizer, "plain", 500)
    assert len(examples) == 1 and dropped == {"too long": [1, "line 2"]}
