"""The edits of docs/edits.md: made, trained, shown, asked and resumed; right they keep every identity, with
a slip in them they do not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from edits import ROOT, copy_project, edits, imported_from
from tiny import write_checkpoint, write_data

# What a train.py of the edit is given to use it, and what a Bitune is made with.
USED_BY = {"vera": (["--peft", "vera", "--rank", "8"], {"kind": "vera"}),
           "segments": (["--method", "segments"], {"method": "segments"})}

# Slips: the edit, the lines that go wrong, and an identity that must see it.
SLIPS = {
    "softmax over layers instead of passes": (
        "third", [("bitune.py", "self.theta_key.softmax(1), self.theta_value.softmax(1)         # (L",
                   "self.theta_key.softmax(0), self.theta_value.softmax(0)         # (L")],
        "equal_passes_are_mixed_to_themselves"),
    "a θ index off by half": (
        "upper", [("bitune.py", '(blend(alpha["key"][layer], k_c',
                   '(blend(alpha["key"][layer - self.lower], k_c')],
        "alpha_is_where_it_says"),
    "slopes that are not saved": (
        "place", [("files/run.py", 'if not n.startswith("model.")}', 'if n.startswith("theta")}')],
        "saved_is_loaded_and_loaded_again"),
    "slopes that are no parameters": (
        "place", [("bitune.py", "(nn.Parameter(torch.zeros(L)) for _ in range(2))",
                   "(torch.zeros(L, requires_grad=True) for _ in range(2))")],
        "every_parameter_has_a_gradient_and_moves_the_output"),
    "place counted by padded width": (
        "place", [("bitune.py", "positions.amax(dim=1, keepdim=True).clamp(min=1)",
                   "max(1, positions.shape[1] - 1)")],
        "batched_is_alone"),
    "a merged layer without its output scale": (
        "vera", [("lora.py", "return (linear.weight + B @ A)",
                  "return (linear.weight + self.vera_B[:linear.out_features] @ A)")],
        "merged_is_unmerged"),
    "frozen matrices drawn without a seed": (
        "vera", [("lora.py", 'self.register_buffer("vera_A", A)  ', "self.vera_A = A"),
                 ("lora.py", 'self.register_buffer("vera_B", B)  ', "self.vera_B = B"),
                 ("lora.py", "torch.Generator().manual_seed(projection_seed)", "None")],
        "saved_is_loaded_and_loaded_again"),
    "a pass whose set is forgotten": (
        "third", [("bitune.py", '*(adapter for _, adapter in METHODS[method])', '"prompt"')],
        "batched_is_alone"),
    "one head's α for all": (
        "heads", [("bitune.py", 'blend(alpha["key"][layer], k_c', 'blend(alpha["key"][layer, :1], k_c')],
        "every_parameter_has_a_gradient_and_moves_the_output"),
    "values mixed by the α of the keys": (
        "sigmoid", [("bitune.py", '"value": self.theta_value.sigmoid()',
                     '"value": self.theta_key.sigmoid()')],
        "every_parameter_has_a_gradient_and_moves_the_output"),
}


def failures(folder, tmp_path, name, *only):
    """The identities, of all or `only` some, that fail in a copy of the project."""
    with imported_from(folder) as module:
        make = partial(module("tiny").tiny_bitune, **USED_BY.get(name, ([], {}))[1])
        identities = module("identities")
        return identities.failures(make, tmp_path / "identities", only or identities.IDENTITIES)


def test_without_fast_the_program_still_runs(tmp_path, capsys):
    """Only slower, and by the same numbers."""
    base, data = write_checkpoint(tmp_path / "base"), write_data(tmp_path / "data.jsonl")
    folder, saved = copy_project(tmp_path / "copy", "heads"), []
    for name in ("with", "without"):
        with imported_from(folder) as module:
            flags = ["--model", base, "--data", data, "--steps", 3, "--lr", 0.01, "--out", tmp_path / name]
            module("train").main(list(map(str, flags)))
            module("sample").main(["--adapter", str(tmp_path / name), "--prompt", "What?"])
            with pytest.raises(SystemExit) if name == "without" else nullcontext():
                module("train").main([*map(str, flags[:-1]), f"{tmp_path / name}2", "--checkpointing"])
        saved.append(load_file(tmp_path / name / "adapter_model.safetensors"))
        shutil.rmtree(folder / "fast", ignore_errors=True)
    assert "--checkpointing needs the folder fast/" in capsys.readouterr().err
    for key, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][key], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", edits())
def test_a_right_edit_keeps_every_identity_and_every_command(name, tmp_path, capsys):
    folder = copy_project(tmp_path / "copy", name)
    if {file for file, _, _ in edits()[name]} != {"train.py"}:          # the identities are of a Bitune
        assert failures(folder, tmp_path, name) == {}
    if name in ("relu", "window", "segments", "start"):  # no new parameter, nothing new to show
        return

    base, data = write_checkpoint(tmp_path / "base"), write_data(tmp_path / "data.jsonl")
    run = tmp_path / "run"
    flags = ["--model", base, "--data", data, "--steps", 4, "--batch-size", 4, "--micro-batch-size", 4,
             "--lr", 0.01, "--save-every", 2, "--eval-every", 4, *USED_BY.get(name, ([], {}))[0]]
    with imported_from(folder) as module:
        train, sample, evaluate = module("train"), module("sample"), module("experiments.evaluate")
        call = lambda main, *argv: main([str(a) for a in argv])
        call(train.main, *flags, "--out", tmp_path / "whole")
        step, taken = train.train_step, []

        def stopped(*args):
            taken.append(1)
            if len(taken) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args)

        train.train_step = stopped
        with pytest.raises(SystemExit):
            call(train.main, *flags, "--out", run)
        train.train_step = step
        call(train.main, "--resume", run)
        for file in ("adapter_model.safetensors", "mixing.safetensors"):
            assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        capsys.readouterr()
        call(sample.main, "--adapter", run, "--prompt", "What is 3?", "--max-new-tokens", 3, "--show-mixing")
        said = capsys.readouterr().err
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        shown = [key for key in log[-2] if key.startswith("alpha_")]
        assert "layer  α " in said and len(shown) == said.splitlines()[1].count("α") and "█" in said
        assert re.findall(r"^    (\d)  \d\.\d+ ", said, re.M) == ["0", "1", "2"]
        call(evaluate.main, "--adapter", run, "--task", "rows", "--data", data, "--limit", 4,
             "--max-new-tokens", 2)


def test_segments_see_themselves_and_what_comes_before(tmp_path):
    """The masks of two prompts of several turns, one of them padded; of a single turn: bidirectional."""
    told, prompts = [], [[1, 5, 6, 1, 7, 8, 9], [3, 1, 4, 4]]
    with imported_from(copy_project(tmp_path / "copy", "segments")) as module:
        bitune = module("tiny").tiny_bitune("segments").eval()
        bitune.model.register_forward_pre_hook(lambda model, args: told.append(args[2][:, 0]))
        bitune(prompts, [[2], [2]])
        naive = module("bitune").Bitune(bitune.model, "naive-bidir")
        torch.testing.assert_close(bitune([[1, 5, 6, 7]], [[2, 3]]), naive([[1, 5, 6, 7]], [[2, 3]]))
    for mask, prompt in zip(told[0], prompts):
        n = len(prompt) - 1                                         # the last one opens the answer stream
        turn = torch.tensor(prompt[:n]).eq(1).cumsum(0)
        assert torch.equal(mask[:n, :n], turn[:, None] >= turn) and not mask[:n, n:].any()


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_turns_an_identity_red(slip, tmp_path):
    name, lines, identity = SLIPS[slip]
    assert failures(copy_project(tmp_path / "copy", name, slips=lines), tmp_path, name, identity)


def test_a_run_of_another_mixing_is_refused(tmp_path, capsys):
    """By its name; and, where somebody forgot to change that, by what it makes of given keys and values."""
    run, argv = tmp_path / "run", ["--prompt", "x", "--adapter", str(tmp_path / "run")]
    base, data = write_checkpoint(tmp_path / "base"), write_data(tmp_path / "data.jsonl")
    with imported_from(ROOT) as module:
        module("train").main([str(a) for a in (
            "--model", base, "--data", data, "--steps", 2, "--out", run, "--val-size", 0)])
    line = '("bidirectional", "prompt")],\n    "naive'
    other_pass = [("bitune.py", line, line.replace("bidirectional", "causal"))]
    forgotten = [("bitune.py", '    mixing = "sigmoid"', '    mixing = "abs"')]
    of_values = [("bitune.py", '    mixing = "relu"', '    mixing = "abs"'),
                 ("bitune.py", 'blend(alpha["key"][layer], k_c, k_b)', "k_c")]
    for name, slips, message in (
        ("sigmoid", [], "was trained with the mixing 'abs', and this code's is 'sigmoid'"),
        ("sigmoid", forgotten, "other keys and values were mixed from the same parameters"),
        ("relu", of_values, "other keys and values were mixed from the same parameters"),
        ("heads", [], "theta_key is (3,), expected (3, 2, 1, 1)"),
        (None, other_pass, "was trained by bitune with the passes"),
    ):
        with imported_from(copy_project(tmp_path / f"copy {message}", name, slips=slips)) as module:
            with pytest.raises(SystemExit) as end:
                module("sample").main(argv)
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_new_kind_of_adapters_is_known_to_every_command(tmp_path, monkeypatch, capsys):
    """The class of the edit `vera` is all that merging, the grid and the cost table need."""
    base, data = write_checkpoint(tmp_path / "base"), write_data(tmp_path / "data.jsonl")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Which?", "choices": ["a", "b"], "answer": 0}\n')
    with imported_from(copy_project(tmp_path / "copy", "vera")) as module:
        call = lambda name, *argv: module(name).main([str(a) for a in argv])
        common = ["--model", base, "--data", data, "--steps", 2, "--batch-size", 2]
        run = tmp_path / "run"
        call("train", *common, "--method", "causal", "--peft", "vera", "--rank", 4, "--out", run)
        call("experiments.merge", "--model", base, "--adapter", run, "--out", tmp_path / "merged")
        call("sample", "--model", tmp_path / "merged", "--prompt", "x", "--max-new-tokens", 2)
        call("experiments.ablate", *common, "--out", tmp_path / "grid", "--pefts", "vera", "--seeds", 42,
             "--rank", 4, "--evaluate", f"rows={rows}")
        cost = module("experiments.cost")
        cost.SHAPES = {"small": cost.SHAPES["phi-2"] | {"num_hidden_layers": 2}}
        call("experiments.cost", "--peft", "vera", "--prompt", 8, "--answer", 8)
    said = capsys.readouterr().out
    for line in ("VeRA rank 4 ", "VeRA rank 8 ", "Bitune, VeRA", "| causal, rank 512", "| bitune, rank 256"):
        assert line in said
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert config["peft_type"] == "VERA" and config["r"] == 4 and config["projection_prng_key"] == 0


def test_peft_reads_vera(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = write_checkpoint(tmp_path / "base")
    ids = torch.tensor([[256, 5, 9, 250, 3]])
    with imported_from(copy_project(tmp_path / "copy", "vera")) as module:
        bitune = module("tiny").tiny_bitune("causal", "vera")
        module("files.disk").write_files(tmp_path / "run", module("files.run").run_bytes(bitune, str(base)))
        with torch.inference_mode():
            ours, _ = bitune([ids[0].tolist()[:1]], [[*ids[0].tolist()[1:], 0]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.inference_mode():
        read = peft.PeftModel.from_pretrained(theirs, tmp_path / "run")(ids).logits
    torch.testing.assert_close(ours, read, atol=1e-4, rtol=0)


def test_the_command_writes_an_edited_copy(tmp_path):
    command = [sys.executable, ROOT / "tests/edits.py"]
    run = lambda *argv: subprocess.run([*command, *argv], capture_output=True, text=True)
    assert run("heads", tmp_path / "copy").stdout == f"wrote {tmp_path / 'copy'}\n"
    assert "num_key_value_heads, 1, 1)" in (tmp_path / "copy/bitune.py").read_text()
    assert "exists: expected a new name" in run("heads", tmp_path / "copy").stderr
    assert "the names are heads, sigmoid" in run("head", tmp_path / "other").stderr
