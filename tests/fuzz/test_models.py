"""Random config.json files, and adapters as PEFT and others write them: each is read as transformers and
PEFT read it, or refused in one line."""

import copy
import json
import os
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from files.adapters import load_adapter
from files.checkpoint import load_model, parse_config
from fuzzing import JUNK, edit_json, judge_all, some
from model import Llama
from tiny import causal_logits, write_checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"
transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
transformers.logging.set_verbosity(50)
transformers.logging.disable_progress_bar()


def compare(folder, case, ours, reference):
    """What becomes of a folder, in one line. ours() and reference(length) read it and give logits."""
    try:
        got = ours()
    except ValueError as problem:
        message = re.sub(r"\d+", "#", str(problem).replace(str(folder), "FOLDER"))
        assert "\n" not in message, case
        return f"refused: {message[:110]}"
    try:
        want = reference(got.shape[1])
    except Exception as problem:
        return f"read, but not by the reference: {type(problem).__name__}"
    if not want.isfinite().all():
        return "read, but not finite by the reference"
    assert got.shape == want.shape and (got - want).abs().max() < 1e-3 * want.abs().max(), case
    return "read"


# ---- config.json ---------------------------------------------------------------------------------------

ALWAYS = {"model_type": ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi"], "vocab_size": [50, 177, 300],
          "num_hidden_layers": [2], "hidden_size": [16, 32], "intermediate_size": [24],
          "num_attention_heads": [4]}
SLIDING, FULL, LENGTH = "sliding_attention", "full_attention", "original_max_position_embeddings"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 64}
ROPES = [("default", {}), ("linear", {"factor": 2.0}), ("dynamic", {"factor": 2.0}), ("proportional", {}),
         ("llama3", LLAMA3), ("llama3", LLAMA3), ("llama3", LLAMA3 | {"low_freq_factor": 4.0}),
         ("yarn", {"factor": 4.0, LENGTH: 32}), ("mrope", {"factor": 2.0}), (None, {}), (None, LLAMA3),
         ("longrope", {"short_factor": [1.5] * 4, "long_factor": [3.0] * 4, "factor": 2.0, LENGTH: 32})]
IN_ROPE = {"rope_theta": [300.0, 20000, None], "partial_rotary_factor": [0.5, 1.0, None]}


def random_rope(rng):
    """What stands under rope_scaling or rope_parameters."""
    kind, own = rng.choice([*ROPES, *ROPES[:2]])
    words = rng.choice([["rope_type"], ["type"], ["type", "rope_type"]]) if kind else []
    rope = own | dict.fromkeys(words, kind) | some(rng, IN_ROPE, 0.2)
    rope = edit_json(rng, rope, ODD) if rng.random() < 0.15 else rope
    return rng.choice([{FULL: rope}, {FULL: rope, SLIDING: rope}]) if rng.random() < 0.05 else rope


USUAL = {       # field -> its values: those that published files have
    "num_key_value_heads": [1, 2, 4], "head_dim": [8, 16], "attention_bias": [True, False],
    "hidden_act": ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "swish", "gelu_fast"],
    "rms_norm_eps": [1e-6, 0.1, 1], "layer_norm_eps": [1e-5, 0.1], "mlp_bias": [True, False],
    "tie_word_embeddings": [True, False], "sliding_window": [1, 4, 16, 4096],
    "max_window_layers": [0, 1, 2, 28], "use_sliding_window": [True, False],
    "rope_theta": [10000, 500.0, 1e6], "rope_scaling": [random_rope], "rope_parameters": [random_rope],
    "partial_rotary_factor": [0.5, 0.25, 1.0], "use_cache": [True, False],
    "max_position_embeddings": [8, 16, 128, 4096], "initializer_range": [0.02], "attention_dropout": [0.5],
    "layer_types": [[FULL, FULL], [FULL, SLIDING], [SLIDING, SLIDING]], LENGTH: [16], "bos_token_id": [1],
    "torch_dtype": ["float16", "bfloat16"], "eos_token_id": [2, [2, 3]], "pad_token_id": [0, 999, -1],
    "architectures": [["LlamaForCausalLM"], ["PhiForSequenceClassification"], ["LlamaModel"]]}
ODD = [*JUNK, 4, 8, 0.25, 8.0, 30, 64, "8", "1e-6", "gelu", "float32", [0, 1], {"quant_method": "gptq"},
       {"1": {"intermediate_size": 16}}, {"AutoModelForCausalLM": "modeling_x.X"}]
RARE = dict.fromkeys("""      hidden_activation qk_layernorm pretraining_tp use_bidirectional_attention dtype
    scale_attn attn_logit_softcapping final_logit_softcapping logit_scale bias embedding_multiplier
    residual_multiplier attention_multiplier logits_scaling scale_attn_weights query_pre_attn_scalar
    rotary_dim use_qk_norm is_decoder add_cross_attention is_encoder_decoder cross_attention_hidden_size
    quantization_config auto_map rotary_pct resid_pdrop embd_pdrop num_labels return_dict qkv_bias
    output_hidden_states chunk_size_feed_forward tie_encoder_decoder no_rope_layers num_experts
    per_layer_config text_config attn_implementation is_causal made_up""".split(), ODD)   # hardly any file has these


def random_config(rng):
    share, none = rng.choice([0.1, 0.3]), rng.choice([0, 0, 0.1])
    c = some(rng, {"num_key_value_heads": [2]}, 0.95) | some(rng, USUAL, share) | some(rng, RARE, 0.015)
    c = {field: None if rng.random() < none else value for field, value in c.items()} | some(rng, ALWAYS, 1)
    edited = edit_json(rng, c, ODD) if rng.random() < 0.2 else c
    return edited if isinstance(edited, dict) else c


def write_weights(folder, config):
    """Weights for the config.json there, by the reference or else by us, drawn wide so that errors show."""
    torch.manual_seed(0)
    try:
        theirs = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").float()
    except Exception:
        model = Llama(parse_config(config))
    state = {name: torch.randn(p.shape) * 0.3 + (p.dim() == 1) for name, p in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):     # a head that is the same or, unlike, none
        embedding = state["model.embed_tokens.weight"]
        state |= {name: embedding.clone() for name in state if name == "lm_head.weight"}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_random_configs(tmp_path, request):
    ids = torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(0))

    def ours():
        model = load_model(tmp_path)
        return causal_logits(model, ids[:, :max(1, min(24, model.config.max_length))])

    def reference(length):
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(tmp_path, dtype=torch.float32, attn_implementation="eager")
        return model(ids[:, :length], return_dict=True).logits

    def judge(rng):
        config = random_config(rng)
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            write_weights(tmp_path, config)
        except Exception:       # neither makes a model of it: then it has to be refused
            save_file({"model.norm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
        return compare(tmp_path, config, ours, reference)

    judge_all(request, judge)


# ---- adapters ------------------------------------------------------------------------------------------

BASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "mistral": {}, "gemma": {"head_dim": 8},
         "qwen2": {"tie_word_embeddings": True}, "phi": {}}
NAMES = {True: ["q_proj", "v_proj", "dense", "fc1", "fc2"],
         False: ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
TARGETS = ["all-linear", r".*\.(q|v)_proj", r"model\.layers\.[01]\.mlp\..*", ["embed_tokens", "q_proj"],
           ["model.layers.1.self_attn.q_proj"], ["lm_head", "v_proj"], None,
           ["layers.0.self_attn.v_proj", "k_proj"]]
PATTERNS = r"""q_proj .*_proj layers.1.self_attn.q_proj ^model\.layers\.0\..* model.layers.0.mlp.fc1 proj
    mlp.* layers\.\d\.self_attn\.(q|v)_proj fc1|fc2 up_proj|model.layers.2.*""".split()


def random_pattern(rng):
    return {pattern: rng.randint(1, 5) for pattern in rng.sample(PATTERNS, rng.randint(1, 3))}


OFTEN = {       # field -> its values, made by PEFT
    "lora_alpha": [1, 16, 0.5, 0, -3], "use_rslora": [True], "use_dora": [True],
    "rank_pattern": [random_pattern], "alpha_pattern": [random_pattern]}
LORA = {
    "bias": ["all", "lora_only"], "lora_dropout": [0.1, 0.9], "lora_bias": [True], "fan_in_fan_out": [True],
    "modules_to_save": [["lm_head"], ["norm"], ["embed_tokens"], ["q_proj"], []],
    "layers_to_transform": [[0], 1, [0, 2]], "layers_pattern": ["layers"], "use_qalora": [True],
    "exclude_modules": [["v_proj"], r".*layers\.0.*", []], "trainable_token_indices": [[1, 2]],
    "init_lora_weights": [False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "OLoRA", "mica"],
    "target_parameters": [["mlp.up_proj.weight"]], "layer_replication": [[[0, 2], [1, 3]]],
    "alora_invocation_tokens": [[3, 4]], "ensure_weight_tying": [True], "kasa_config": [{}],
    "use_bdlora": [{"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}],
    "monteclora_config": [{}], "velora_config": [{"num_groups": 2}]}
IA3 = {
    "feedforward_modules": [r".*\.mlp\..*", ".*q_proj", []], "fan_in_fan_out": [True],
    "init_ia3_weights": [False], "modules_to_save": [["lm_head"]], "exclude_modules": [["v_proj"]]}
OTHERS = [("LOHA", {}), ("ADALORA", {"total_step": 9}), ("VERA", {}), ("ROAD", {"group_size": 8}),
          ("MISS", {}), ("OFT", {"oft_block_size": 8, "r": 0}), ("FOURIERFT", {"n_frequency": 5})]
ODD_PEFT = [*JUNK, 4.0, "16", "yes", "lora", "FULL", "q_proj", ".*q_proj", ["q_proj"], ["_proj"], [3],
       {"q_proj": 0}, {"q_proj": None}, {"q_proj": 2.0}, {"q_proj": "2"}, {"v_proj": 5}, {"[": 2}, "pissa",
       "eva", "OLORA", "lora_ga", "SEQ_CLS", [[[0, 2], [1, 3]]], {"loftq_bits": 4}]
PREFIX, BIAS = "base_model.model.", "base_model.model.model.layers.0.self_attn.q_proj.bias"
TENSORS = {     # how others may have written a file's tensors, or damage left them; n is an adapter's own
    "one less": lambda tensors, n: {k: t for k, t in tensors.items() if k != n},
    "less a layer": lambda tensors, n: {k: t for k, t in tensors.items() if "layers.1" not in k},
    "nan": lambda tensors, n: tensors | {n: tensors[n] * torch.nan},
    "longer": lambda tensors, n: tensors | {n: torch.cat([tensors[n]] * 2)},
    "no prefix": lambda tensors, n: {k.removeprefix(PREFIX): t for k, t in tensors.items()},
    "set's name": lambda tensors, n: {re.sub(r"(\.weight)?$", r".default\1", k, count=1) if k == n else k: t
                                      for k, t in tensors.items()},
    "one of nowhere": lambda tensors, n: tensors | {n.replace("layers.", "layers.7"): tensors[n].clone()},
    "bias of the base": lambda tensors, n: tensors | {BIAS: torch.ones(32)},
    "another base": lambda tensors, n: {k: t if "lora_" in k or "ia3_" in k else t + 1
                                        for k, t in tensors.items()},
    **{dtype: lambda tensors, n, dtype=dtype: {k: t.to(getattr(torch, dtype)) for k, t in tensors.items()}
       for dtype in ("bfloat16", "float16", "float64", "int32")}}
OURS = ("base", "peft_type", "edited", "tensors", "save_embedding_layers")


def random_adapter(rng):
    base, kind = rng.choice([*BASES]), rng.choices(["LORA", "IA3", "other"], [20, 4, 1])[0]
    names = lambda: rng.sample(NAMES[base == "phi"], rng.randint(1, 4))
    targets = rng.choice([names(), names(), rng.choice(TARGETS)])
    case = {"base": base, "peft_type": kind, "target_modules": targets}
    if kind == "other":
        case["peft_type"], own = rng.choice(OTHERS)
        return case | own
    case |= {"r": rng.randint(1, 6)} if kind == "LORA" else {"feedforward_modules": []}
    if kind == "IA3" and rng.random() < 0.5 and isinstance(case["target_modules"], list):
        case["feedforward_modules"] = case["target_modules"][:rng.choice([1, 9])]   # PEFT: some of these
    case |= some(rng, LORA if kind == "LORA" else IA3, rng.choice([0, 0.04, 0.12]))
    case |= some(rng, OFTEN, 0.3) if kind == "LORA" else {}
    case |= some(rng, {"edited": [rng.random()]}, 0.4) | some(rng, {"tensors": [*TENSORS]}, 0.25)
    if case.get("tensors") == "less a layer":       # PEFT would draw what is not there by these
        case = {field: value for field, value in case.items() if not field.startswith("init_")}
    return case | some(rng, {"save_embedding_layers": [True]}, 0.1)


def write_adapter(folder, base, case):
    """Make a case by PEFT, with random values in place of those that training starts at, and edit it."""
    torch.manual_seed(0)
    fields = {k: v for k, v in case.items() if k not in OURS}
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[case["peft_type"]](**fields)
    made = peft.get_peft_model(copy.deepcopy(base), config)
    made.save_pretrained(folder, save_embedding_layers=case.get("save_embedding_layers", "auto"))
    file, state = folder / "adapter_model.safetensors", base.state_dict()
    tensors = {n: t if n.removeprefix(PREFIX) in state else torch.rand_like(t) + 0.3
               if "magnitude" in n or "ia3" in n else torch.randn_like(t) * 0.4
               for n, t in load_file(file).items()}
    if "tensors" in case:
        own = [n for n in tensors if "lora_" in n or "ia3_" in n] or [*tensors]
        tensors = TENSORS[case["tensors"]](tensors, own[0])
    save_file(tensors, file)
    if "edited" in case:
        written = json.loads((folder / "adapter_config.json").read_text())
        written = edit_json(random.Random(case["edited"]), written, ODD_PEFT)
        (folder / "adapter_config.json").write_text(json.dumps(written))


@torch.inference_mode()
def test_random_adapters(tmp_path, request):
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    load, folder = transformers.AutoModelForCausalLM.from_pretrained, tmp_path / "adapter"
    paths = {k: write_checkpoint(tmp_path / k, model_type=k, **more) for k, more in BASES.items()}
    bases = {kind: load(path, attn_implementation="eager") for kind, path in paths.items()}

    def judge(rng):
        case = random_adapter(rng)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            write_adapter(folder, bases[case["base"]], case)
        except Exception as problem:
            return f"not made by PEFT: {type(problem).__name__}"

        def ours():
            model = load_model(paths[case["base"]])
            load_adapter(model, "answer", folder)
            return causal_logits(model.eval(), ids, adapter="answer")

        def reference(length):
            base = copy.deepcopy(bases[case["base"]])
            return peft.PeftModel.from_pretrained(base, folder).eval()(ids).logits

        return compare(folder, case, ours, reference)

    judge_all(request, judge)
