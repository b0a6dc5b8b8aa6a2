"""Random adapters as PEFT saves them, and as others write them: each is read as PEFT reads it, or refused.
"""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fuzzing
from files.adapters import load_adapter
from files.checkpoint import load_model
from model import may_attend
from tiny import write_checkpoint

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
transformers.logging.set_verbosity(50)
transformers.logging.disable_progress_bar()
BASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "mistral": {}, "gemma": {"head_dim": 8},
         "qwen2": {"tie_word_embeddings": True}, "phi": {}}
NAMES = {True: ["q_proj", "v_proj", "dense", "fc1", "fc2"],
         False: ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
TARGETS = [
    "all-linear", r".*\.(q|v)_proj", r"model\.layers\.[01]\.mlp\..*", ["model.layers.1.self_attn.q_proj"],
    ["embed_tokens", "q_proj"], ["lm_head", "v_proj"], ["layers.0.self_attn.v_proj", "k_proj"], None,
]
PATTERNS = [
    "q_proj", ".*_proj", "layers.1.self_attn.q_proj", r"^model\.layers\.0\..*", "model.layers.0.mlp.fc1",
    r"layers\.\d\.self_attn\.(q|v)_proj", "proj", "mlp.*", "fc1|fc2", "up_proj|model.layers.2.*",
]
LORA = {       # field -> its values, made by PEFT
    "lora_alpha": [1, 16, 0.5, 0, -3], "use_rslora": [True], "use_dora": [True],
    "bias": ["all", "lora_only"], "rank_pattern": "pattern", "alpha_pattern": "pattern",
    "lora_dropout": [0.1, 0.9], "lora_bias": [True], "fan_in_fan_out": [True],
    "modules_to_save": [["lm_head"], ["norm"], ["embed_tokens"], ["q_proj"], []],
    "layers_to_transform": [[0], 1, [0, 2]], "layers_pattern": ["layers"], "use_qalora": [True],
    "exclude_modules": [["v_proj"], r".*layers\.0.*", []], "trainable_token_indices": [[1, 2]],
    "init_lora_weights": [False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "OLoRA", "mica"],
    "target_parameters": [["mlp.up_proj.weight"]], "layer_replication": [[[0, 2], [1, 3]]],
    "alora_invocation_tokens": [[3, 4]], "ensure_weight_tying": [True], "kasa_config": [{}],
    "use_bdlora": [ {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}],
    "monteclora_config": [{}], "velora_config": [{"num_groups": 2}],
}
IA3 = {
    "feedforward_modules": [r".*\.mlp\..*", ".*q_proj", []], "fan_in_fan_out": [True],
    "init_ia3_weights": [False], "modules_to_save": [["lm_head"]], "exclude_modules": [["v_proj"]],
}
OTHERS = [
    ("LOHA", {}), ("LOKR", {}), ("ADALORA", {"total_step": 9}), ("VERA", {}), ("HRA", {}), ("MISS", {}),
    ("OFT", {"oft_block_size": 8, "r": 0}), ("BOFT", {"boft_block_size": 8}), ("LN_TUNING", {}),
    ("FOURIERFT", {"n_frequency": 5}), ("ROAD", {"group_size": 8}), ("C3A", {"block_size": 8}),
    ("PROMPT_TUNING", {"num_virtual_tokens": 3}), ("PREFIX_TUNING", {"num_virtual_tokens": 3}),
    ("TRAINABLE_TOKENS", {"token_indices": [1]}), ("RANDLORA", {}), ("DELORA", {}), ("GRALORA", {}),
]
EDITS = {       # field -> what is written there afterwards; DROP leaves it out
    "made_up": [None, False, 1, {}, "x"], "enable_lora": [None, [True]], "merge_weights": [False],
    "r": [3, 4.0], "target_modules": [["q_proj"], None, "q_proj", []], "peft_type": ["lora", "FULL", 3],
    "lora_alpha": ["16"], "bias": [None, False], "use_rslora": [None, 1, "yes"], "use_dora": [None, 1, True],
    "task_type": ["SEQ_CLS"],
    "rank_pattern": [None, [], {"q_proj": 0}, {"q_proj": None}, {"q_proj": 2.0}, "q_proj"],
    "alpha_pattern": [None, [], {"q_proj": None}, {"q_proj": "2"}, {"v_proj": 5}, {"[": 2}, "q_proj"],
    "lora_dropout": [None, 2, "0.1"], "layers_to_transform": [[0]], "exclude_modules": [["q_proj"]],
    "init_lora_weights": [None, "pissa", "eva", "OLORA", "lora_ga", "mica", "odd"],
    "lora_bias": [None, True], "feedforward_modules": [None, ["q_proj"], "q_proj", ".*q_proj", ["_proj"]],
    "inference_mode": [True, None], "megatron_config": [{"a": 1}], "loftq_config": [{"loftq_bits": 4}],
    "runtime_config": [None, {}], "layer_replication": [[[0, 2], [1, 3]], []],
    "alora_invocation_tokens": [[3], []], "kasa_config": [{}, None], "trainable_token_indices": [[1], []],
    "target_parameters": [["q_proj.weight"], []], "arrow_config": [{}],
    "modules_to_save": [["lm_head"], [], "lm_head"], "base_model_name_or_path": ["gpt2", None, 3],
}
DROP, PREFIX = "left out", "base_model.model."
TENSORS = [
    "bfloat16", "float16", "float64", "set's name", "no prefix", "one less", "one of nowhere", "longer",
    "another base", "nan", "int32", "less a layer", "bias of the base",
]


def random_adapter(rng):
    base, kind = rng.choice([*BASES]), rng.choices(["LORA", "IA3", "other"], [20, 4, 1])[0]
    names = NAMES[base == "phi"]
    case = {"base": base, "peft_type": kind, "target_modules": rng.choice([
        rng.sample(names, rng.randint(1, 4)), rng.sample(names, rng.randint(1, 4)), rng.choice(TARGETS)])}
    if kind == "other":
        case["peft_type"], own = rng.choice(OTHERS)
        return case | own
    case |= {"r": rng.randint(1, 6)} if kind == "LORA" else {"feedforward_modules": []}
    if kind == "IA3" and rng.random() < 0.5 and isinstance(case["target_modules"], list):
        case["feedforward_modules"] = case["target_modules"][:rng.choice([1, 9])]   # PEFT: some of these
    fields, share = {"LORA": LORA, "IA3": IA3}[kind], rng.choice([0, 0.04, 0.12])
    for field, values in fields.items():
        often = field in ("lora_alpha", "use_rslora", "use_dora") or values == "pattern"
        if rng.random() < (0.3 if often else share):
            drawn = {p: rng.randint(1, 5) for p in rng.sample(PATTERNS, rng.randint(1, 3))}
            case[field] = drawn if values == "pattern" else rng.choice(values)
    for field in rng.sample([*EDITS], rng.choice([0, 0, 1, 2])):
        case["edit " + field] = rng.choice([*EDITS[field], DROP])
    return case | ({"tensors": rng.choice(TENSORS)} if rng.random() < 0.25 else {}) | (
        {"save_embedding_layers": True} if rng.random() < 0.1 else {})


def edit_tensors(tensors, how):
    """The tensors of a file as others may have written them, or as damage left them."""
    own = [n for n in tensors if "lora_" in n or "ia3_" in n] or [*tensors]
    first, at = tensors[own[0]], own[0].removesuffix(".weight")
    less = {n: t for n, t in tensors.items() if n != own[0]}
    new = {"one less": less, "no prefix": {n.removeprefix(PREFIX): t for n, t in tensors.items()},
           "one of nowhere": tensors | {at.replace("layers.", "layers.7"): first.clone()},
           "longer": less | {own[0]: torch.cat([first, first])}, "nan": less | {own[0]: first * torch.nan},
           "set's name": less | {at + ".default" + own[0].removeprefix(at): first},
           "less a layer": {n: t for n, t in tensors.items() if "layers.1" not in n},
           "bias of the base": tensors | {
               f"{PREFIX}model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
           "another base": {n: t if n in own else t + 1 for n, t in tensors.items()}}
    return new[how] if how in new else {n: t.to(getattr(torch, how)) for n, t in tensors.items()}


def write_adapter(folder, base, case):
    """Make a case by PEFT, with random values in place of those that training starts at, and edit it."""
    torch.manual_seed(0)
    ours = ("base", "peft_type", "tensors", "save_embedding_layers")
    fields = {k: v for k, v in case.items() if k not in ours and not k.startswith("edit ")}
    if case["peft_type"] in ("PROMPT_TUNING", "PREFIX_TUNING", "TRAINABLE_TOKENS", "LN_TUNING"):
        fields = {"task_type": "CAUSAL_LM"} | {k: v for k, v in fields.items() if k != "target_modules"}
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[case["peft_type"]](**fields)
    made = peft.get_peft_model(copy.deepcopy(base), config)
    made.save_pretrained(folder, save_embedding_layers=case.get("save_embedding_layers", "auto"))
    file, state = folder / "adapter_model.safetensors", base.state_dict()
    tensors = {n: t if n.removeprefix(PREFIX) in state else torch.rand_like(t) + 0.3
               if "magnitude" in n or "ia3" in n else torch.randn_like(t) * 0.4
               for n, t in load_file(file).items()}
    save_file(edit_tensors(tensors, case["tensors"]) if "tensors" in case else tensors, file)
    written = json.loads((folder / "adapter_config.json").read_text())
    written |= {k.removeprefix("edit "): v for k, v in case.items() if k.startswith("edit ")}
    kept = {k: v for k, v in written.items() if v != DROP}
    (folder / "adapter_config.json").write_text(json.dumps(kept))


@torch.inference_mode()
def test_random_adapters(tmp_path, request):
    torch.manual_seed(0)
    ids, at = torch.randint(0, 300, (1, 20)), torch.arange(20)[None]
    load, folder = transformers.AutoModelForCausalLM.from_pretrained, tmp_path / "adapter"
    paths = {k: write_checkpoint(tmp_path / k, model_type=k, **more) for k, more in BASES.items()}
    bases = {kind: load(path, attn_implementation="eager") for kind, path in paths.items()}

    def judge(case):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            write_adapter(folder, bases[case["base"]], case)
        except Exception as problem:
            return f"not made by PEFT: {type(problem).__name__}"

        def ours():
            model = load_model(paths[case["base"]])
            load_adapter(model, "answer", folder)
            return model.eval()(ids, at, may_attend(at, at), adapter="answer")[0]

        def reference(length):
            base = copy.deepcopy(bases[case["base"]])
            return peft.PeftModel.from_pretrained(base, folder).eval()(ids).logits

        return fuzzing.verdict(folder, ours, reference)

    assert not fuzzing.run(random_adapter, ["base", "peft_type", "target_modules", "r"], judge,
                           request.config.getoption("--fuzz"))
