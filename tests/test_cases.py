"""Files of others, as they were met: each is read as its reference implementation reads it, or refused."""

import json
from contextlib import nullcontext

import pytest
import torch

import chats
import sample
from bitune import Bitune
from files.adapters import adapter_bytes, load_adapter
from files.checkpoint import load_base, load_model, parse_config
from files.disk import write_files
from files.run import load_run
from lora import adapters, add_adapter, fold
from model import may_attend
from test_commands import change, exits
from test_evaluate import write_rows
from text.examples import encode_prompt, load_examples, stop_id
from text.tokenizer import Tokenizer
from tiny import CASES, CONFIG, rewrite, scatter, tiny_bitune, tiny_model, tokenizer_of, write_checkpoint
from tiny import write_run
from train import make_optimizer

# The first 8 logits of the last token, by transformers 5.24 and, of adapters on their base, peft 0.21.2.
LOGITS = {
    "checkpoint-phi-defaults": [-0.57, -0.77, 1.57, -0.93, -1.26, 1.3, -1.02, -0.57],
    "checkpoint-rope-scaling-beside-rope-parameters": [0.69, 0.57, 0.78, -0.08, 1.32, 0.38, 0.01, -1.5],
    "checkpoint-stale-shards": [0.37, -0.71, -1.87, 0.05, -0.59, 0.06, 0.51, -0.32],
    "checkpoint-tied-flag-own-head": [-0.4, -0.1, 0.99, -0.45, -1.42, 0.77, 0.79, 1.59],
    "checkpoint-tied-head-only": [-1.08, 0.0, 0.71, 0.1, 1.32, -0.98, 1.23, 0.26],
    "checkpoint-without-prefix": [-0.54, -1.08, 1.08, -0.56, -1.02, 0.68, -0.97, -0.69],
    "adapter-dora-magnitude-dot-weight": [0.12, 1.6, 1.93, 0.15, 0.57, 1.57, -0.25, 0.1],
    "adapter-embeddings-saved-along": [-0.41, 2.14, 1.57, 1.67, 2.02, 0.95, 0.68, -0.55],
    "adapter-ia3-up-proj-scales-outputs": [-0.5, 1.35, 1.66, 2.1, 1.68, 1.13, -0.07, 0.06],
    "adapter-set-name-in-tensor-names": [-0.41, 2.14, 1.57, 1.67, 2.02, 0.95, 0.68, -0.55],
}


def first_logits(model, **adapter):
    ids = torch.tensor([[1, 260, 270, 264, 281, 262, 275, 268]])
    at = torch.arange(8)[None]
    with torch.inference_mode():
        return model(ids, at, may_attend(at, at), **adapter)[0][0, -1, :8]


@pytest.mark.reference
@pytest.mark.parametrize("case", LOGITS)
def test_checkpoints_and_adapters(case):
    if case.startswith("adapter"):
        model = load_model(CASES / case / "base")
        load_adapter(model, "answer", CASES / case)
        logits = first_logits(model, adapter="answer")
    else:
        logits = first_logits(load_model(CASES / case))
    torch.testing.assert_close(logits, torch.tensor(LOGITS[case]), atol=0.011, rtol=0)


@pytest.mark.reference
def test_special_tokens_beyond_the_vocabulary_do_no_harm():
    model, tokenizer = load_base(CASES / "checkpoint-pad-beyond-vocabulary", "cpu")
    prompt = encode_prompt(tokenizer, "plain", [("user", "the all")])
    assert Bitune(model, "causal").generate([prompt], 6) == [[153, 190, 4, 119, 190, 38]]
    assert "<pad>" not in tokenizer.special and "<pad>" in tokenizer.names.values()


def test_a_head_equal_to_the_embedding_stays_tied(tmp_path):
    folder = write_checkpoint(tmp_path, tie_word_embeddings=True)
    head = lambda tensors: {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update(head(tensors)))
    assert load_model(folder).config.tie_word_embeddings


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
    ("llama", {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2.0}},
     {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
     {"rope": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}),
    ("llama", {"partial_rotary_factor": 0.5}, {"rotary_dim": 8}),   # the reference does not look at it
    ("llama", {"logit_scale": None, "made_up": False, "_name_or_path": "x"}, {}),
])
def test_configs(kind, changes, want):
    config = parse_config(CONFIG | {"model_type": kind, "head_dim": 8} | changes)
    assert {name: getattr(config, name) for name in want} == want


BARE = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 32}
LEFT_OUT = {        # of BARE, by the config classes of transformers 5.24
    "llama": (1e-6, 2048, 32, 8, None, "silu", False),
    "mistral": (1e-6, 131072, 8, 8, 4096, "silu", False),
    "qwen2": (1e-6, 32768, 32, 8, None, "silu", False),
    "qwen3": (1e-6, 32768, 32, 128, None, "silu", False),
    "gemma": (1e-6, 8192, 16, 256, None, "gelu_pytorch_tanh", True),
    "phi": (1e-5, 2048, 32, 8, None, "gelu_new", False),
}


@pytest.mark.reference
@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_a_config_leaves_out(kind):
    c = parse_config(BARE | {"model_type": kind})
    assert LEFT_OUT[kind] == (c.norm_eps, c.max_position_embeddings, c.num_key_value_heads, c.head_dim,
                              c.sliding_window, c.activation, c.tie_word_embeddings)
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
    ({"hidden_act": "relu"}, "it has the hidden_act 'relu', expected .silu. or .gelu."),
    ({"hidden_size": None}, "config.json: it lacks hidden_size"),
    ({"is_causal": False}, "it has the is_causal False, expected true or null"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised, by gptq: expected weights"),
])
def test_what_a_config_says_and_is_not_understood_is_refused(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


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
    (dict.clear, "no tensors"),
])
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
        same = torch.equal(first_logits(again, adapter="answer"), first_logits(model, adapter="answer"))
        assert same != ("use_rslora" in fields)
    for at, adapter in adapters(again, "answer").items():
        assert adapter.s == pytest.approx(6 / 3**0.5 if at == path else 4 / 2**0.5)


def test_a_tokenizer_beside_an_adapter_is_the_bases(tmp_path):
    base, spec = write_checkpoint(tmp_path / "base"), chats.small("chat-chatml")
    run = write_run(tmp_path / "run", tiny_bitune("causal"), base)
    (run / "bitune.json").unlink()
    for folder in (base, run):
        tokenizer_of(spec, folder, chat_template="one")
    load_run(run, base)
    tokenizer_of(spec, run, chat_template="another")
    with pytest.raises(ValueError, match="brings another tokenizer or chat template than .*base has"):
        load_run(run, base)


def test_a_base_with_nan_and_a_merge_that_overflows_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "base")
    rewrite(folder / "model.safetensors", lambda t: t["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match="model.safetensors: model.norm.weight holds NaN or infinity"):
        load_model(folder)
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


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_without_numbers_ends_in_one_line(temperature, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "base")
    rewrite(folder / "model.safetensors", lambda t: t["model.norm.weight"].fill_(3e38))     # finite itself
    argv = ["--model", folder, "--prompt", "x", "--temperature", temperature]
    assert "the model gives no numbers: its logits are not" in exits(1, sample.main, argv, capsys)


# ---- tokenizers ------------------------------------------------------------------------------------------

ENCODINGS = {       # by tokenizers 0.23.3
    "tokenizer-added-lstrip": ("hello  <tool> wor", [258, 260, 264, 263]),
    "tokenizer-added-normalized": ("the foobar xfoobarx",
                                   [291, 295, 259, 283, 265, 274, 274, 261, 260, 277, 283]),
    "tokenizer-added-single-word": (
        "yes eyes yesterday yes!",
        [264, 222, 70, 90, 70, 84, 222, 90, 70, 84, 85, 70, 83, 69, 66, 90, 222, 264, 2]),
    "tokenizer-appended-merges": (" given hello", [222, 266, 79, 222, 258, 260]),
    "tokenizer-byte-level-unk": ("h \xe9 w", [73, 222, 0, 104, 261]),
    "tokenizer-dummy-space-after-added": ("the<tool>all", [291, 295, 293, 292]),
    "tokenizer-newline-byte-missing": ("the\nall", [290, 0, 259, 291]),
    "tokenizer-normalizer-posix-class": ("the\t\nall", [291, 293, 292]),
    "tokenizer-normalizer-unicode-property": ("the all", [291, 293, 292]),
    "tokenizer-pattern-with-gaps": ("hello12 wor", [258, 260, 18, 19, 263]),
}


@pytest.mark.reference
@pytest.mark.parametrize("case", ENCODINGS)
def test_encodings(case):
    text, ids = ENCODINGS[case]
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
