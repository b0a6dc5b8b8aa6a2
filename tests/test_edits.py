"""The edits of docs/edits.md: made, trained, shown, asked and resumed; right they keep every identity, with
a slip in them they do not."""

import importlib
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch

import train
from bitune import Bitune, Tokens
from edits import ROOT, copy_project, edits
from test_commands import assert_same_run, at_step
from tiny import write_checkpoint, write_data, write_rows

# What a train.py of the edit is given to use it, and what a Bitune is made with.
FLAGS = {"vera": ["--peft", "vera", "--rank", "8"], "segments": ["--method", "segments"]}
MADE_WITH = {"vera": {"kind": "vera"}, "segments": {"method": "segments"}}

# Slips: the edit, an identity that must see it, and (file, what stands there, what becomes of it).
SLIPS = {
    "softmax over layers instead of passes": ("third", "the_passes_are_what_is_mixed", [
        ("bitune.py", "self.theta_value.softmax(1)    ", "self.theta_value.softmax(0)    ")]),
    "a θ index off by half": ("upper", "alpha_is_where_it_says", [
        ("bitune.py", '(blend(alpha["key"][layer], k_c', '(blend(alpha["key"][layer - self.lower], k_c')]),
    "slopes that are not saved": ("place", "saved_is_loaded", [
        ("files/run.py", 'if not n.startswith("model.")}', 'if n.startswith("theta")}')]),
    "slopes that are no parameters": ("place", "every_parameter_has_a_gradient_and_moves_the_output", [
        ("bitune.py", "(nn.Parameter(torch.zeros(L)) for _ in range(2))",
         "(torch.zeros(L, requires_grad=True) for _ in range(2))")]),
    "place counted by padded width": ("place", "batched_is_alone", [
        ("bitune.py", "positions.amax(dim=1, keepdim=True).clamp(min=1)",
         "max(1, positions.shape[1] - 1)")]),
    "a merged layer without its output scale": ("vera", "merged_is_unmerged", [
        ("lora.py", "linear.weight + B @ A", "linear.weight + self.vera_B[:linear.out_features] @ A")]),
    "frozen matrices drawn without a seed": ("vera", "saved_is_loaded", [
        ("lora.py", 'self.register_buffer("vera_A", A)  ', "self.vera_A = A"),
        ("lora.py", 'self.register_buffer("vera_B", B)  ', "self.vera_B = B"),
        ("lora.py", "torch.Generator().manual_seed(projection_seed)", "None")]),
    "one head's α for all": ("heads", "every_parameter_has_a_gradient_and_moves_the_output", [
        ("bitune.py", 'blend(alpha["key"][layer], k_c', 'blend(alpha["key"][layer, :1], k_c')]),
    "a factor in the groups that is never used": ("rate", "every_rate_acts", [
        ("train.py", '(10 if name.startswith("theta") else 1) * lr', "lr"),
        ("train.py", '"peak": peak, ', '"peak": peak, "factor": 10, ')]),
    "keys detached": ("token", "gradients_are_slopes", [
        ("bitune.py", "k.transpose(1, 2).flatten(2)", "k.detach().transpose(1, 2).flatten(2)")]),
    "a window open on one side": ("window", "both_sides_are_seen_alike", [
        ("model.py", "(k - q).abs() <= 64", "k - q <= 64")]),
    "the scale of one rank used for both": ("ranks", "a_rank_is_only_a_size", [
        ("lora.py", "lora_alpha / rank, dropout", "lora_alpha / 16, dropout")]),
    "keys not turned again": ("reversed", "layer_0_is_read_alike", [
        ("bitune.py", "rotate(k.take_along_dim(index, 2), cos, sin).to(k.dtype)",
         "k.take_along_dim(index, 2)")]),
    "no lower bound at short prompts": ("opening", "prompts_are_cut_in_two", [
        ("bitune.py", "max(0, len(prompt) - 4)", "len(prompt) - 4")])}


@contextmanager
def edited(folder, name, slips=()):
    """A copy of the project in the place of its own modules: module(name), and call(its name, *argv), a
    command."""
    folder = copy_project(folder / f"copy {name}", name, slips=slips)
    own = lambda name: name != "edits" and any((ROOT / f).exists() for f in (
        name.split(".")[0], f"{name.split('.')[0]}.py", f"tests/{name}.py"))
    kept = {name: module for name, module in sys.modules.items() if own(name)}
    module = importlib.import_module
    try:
        for name in kept:
            del sys.modules[name]
        with patch.object(sys, "path", [str(folder), str(folder / "tests"), *sys.path]):
            yield module, lambda command, *argv: module(command).main([str(a) for a in argv])
    finally:
        for name in [n for n in sys.modules if own(n)]:
            del sys.modules[name]
        sys.modules.update(kept)


def failures(folder, name, slips=(), *only):
    """The identities, of all or `only` some, that fail in a copy of the project."""
    with edited(folder, name, slips) as (module, _):
        identities, more = module("identities"), MADE_WITH.get(name, {})
        make = partial(module("tiny").tiny_bitune, config={"num_hidden_layers": 2}, **more)
        return identities.failures(make, folder / "identities", only or identities.IDENTITIES)


@pytest.mark.identity
@pytest.mark.parametrize("name", edits())
def test_a_right_edit_keeps_every_identity(name, tmp_path):
    assert failures(tmp_path, name) == {}


@pytest.mark.identity
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_turns_an_identity_red(slip, tmp_path):
    name, identity, slips = SLIPS[slip]
    assert failures(tmp_path, name, slips, identity).keys() == {identity}


def test_an_edit_goes_through_every_command(edit, flags, tmp_path, capsys):
    """Trained, killed, resumed to the same bytes, shown, asked alone and in a chat, evaluated."""
    run, whole, argv = tmp_path / "run", tmp_path / "whole", flags(*FLAGS.get(edit, []))
    row = {"question": "Which?", "choices": ["a", "bcd"], "answer": 0}
    choices = write_rows(tmp_path / "choices.jsonl", [row])
    with edited(tmp_path, edit) as (module, call):
        call("train", *argv, "--out", whole)
        with at_step(3, train=module("train")), pytest.raises(SystemExit):
            call("train", *argv)
        call("train", "--resume", run)
        assert_same_run(run, whole)
        mixes = any("alphas_" in line for line in (run / "log.jsonl").open())
        capsys.readouterr()
        call("sample", "--adapter", run, "--prompt", "What is 3?", "--max-new-tokens", 3,
             *["--show-mixing"] * mixes)
        said, last = capsys.readouterr().err, json.loads((run / "log.jsonl").read_text().splitlines()[-1])
        shown = [key for key in last if key.startswith("alphas_")]
        assert not mixes or len(shown) == said.splitlines()[1].count("α") and "█" in said
        bitune, text = module("files.run").load_run(run)[0], [5, 9, 250, 3, 7, 7, 1, 80]
        for kind in ("recompute", "alternating"):
            chat = module("cli.chat").conversation(bitune, "chat-chatml", kind)
            (answer,) = chat.generate([text], 3)
            assert answer == bitune.generate([text], 3)[0]
            assert len(chat.generate([text + answer + text], 3)[0]) == 3
        for file in (tmp_path / "data.jsonl", choices):
            call("experiments.evaluate", "--adapter", run, "--task", "rows", "--data", file, "--limit", 4,
                 "--max-new-tokens", 2)


# Edits that leave today's numbers as they are: on prompts as short, or by default.
SAME_NUMBERS = {"window", "vera", "segments", "ranks", "qv", "start", "clip", "rate"}


def test_the_whole_suite_through_an_edit(whole, tmp_path):
    """References turn red, if their numbers are no more today's; identities and commands stay green."""
    folder = copy_project(tmp_path / "copy", whole)
    for path in ("docs", "tests/reference", "tests/cases"):
        shutil.copytree(ROOT / path, folder / path, dirs_exist_ok=True)
    for file in ("README.md", "pytest.ini", "requirements.txt"):
        shutil.copy(ROOT / file, folder / file)
    suite = [sys.executable, "-m", "pytest", "--ignore=tests/test_edits.py", "--ignore=tests/fuzz", "-m"]
    run = lambda mark: subprocess.run([*suite, mark], cwd=folder, capture_output=True, text=True)
    green = run("not reference")
    assert green.returncode == 0, green.stdout[-2000:]
    assert whole in SAME_NUMBERS or run("reference").returncode == 1


def test_segments_see_themselves_and_what_comes_before(tmp_path):
    """They are read as turns are that come one after the other, bidirectionally."""
    with edited(tmp_path, "segments") as (module, _):
        bitune = module("tiny").tiny_bitune("segments", dtype=torch.float64)
        context, _ = bitune.lay_out([[1, 5, 6, 1, 7, 8, 9, 4]], [[]])     # the last opens the stream
        naive, past = Bitune(bitune.model, "naive-bidir"), None             # as it reads without the edit
        for turn in (slice(0, 3), slice(3, 7)):
            past = naive.encode(Tokens(*(t[:, turn] for t in context)), past)
        torch.testing.assert_close(bitune.encode(context).layers, past.layers)


OTHER = "was trained by code that computes something else: what has been edited since"


def test_a_run_of_other_code_is_refused(flags, tmp_path, exits):
    """By what it computes: passes, masks, mixing, opening, adapters, whatever their names."""
    run, base = tmp_path / "run", tmp_path / "model"
    with at_step(2), pytest.raises(SystemExit):
        train.main(flags())
    for name in ("relu", "window", "reversed", "opening", "heads", "gain"):
        message = "missing base_model" if name == "gain" else OTHER
        with edited(tmp_path, name) as (module, _), pytest.raises(ValueError) as refused:
            module("files.run").load_bitune(module("files.checkpoint").load_model(base), run)
        assert message in str(refused.value), (name, refused.value)
    with edited(tmp_path, "sigmoid") as (module, _):
        for command, *argv in (["sample", "--prompt", "x", "--adapter", run], ["train", "--resume", run]):
            assert OTHER in exits(2, module(command), *argv)


def test_a_new_kind_of_adapters_is_known_to_every_command(tmp_path, monkeypatch, capsys):
    """The class of the edit `vera` is all that merging, the grid and the cost table need."""
    base, data = write_checkpoint(tmp_path / "base"), write_data(tmp_path / "data.jsonl")
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "Which?", "choices": ["a", "b"], "answer": 0}])
    run, merged = tmp_path / "run", tmp_path / "merged"
    with edited(tmp_path, "vera") as (module, call):
        common = ["--model", base, "--data", data, "--steps", 2, "--batch-size", 2, "--rank", 4]
        call("train", *common, "--method", "causal", "--peft", "vera", "--out", run)
        call("experiments.merge", "--model", base, "--adapter", run, "--out", merged)
        call("sample", "--model", merged, "--prompt", "x", "--max-new-tokens", 2)
        call("experiments.ablate", *common, "--out", tmp_path / "grid", "--pefts", "vera", "--seeds", 42,
             "--evaluate", f"rows={rows}")
        cost = module("experiments.cost")
        cost.SHAPES = {"small": cost.SHAPES["phi-2"] | {"num_hidden_layers": 2}}
        call("experiments.cost", "--peft", "vera", "--prompt", 8, "--answer", 8)
    said = capsys.readouterr().out
    for line in ("VeRA rank 4 ", "VeRA rank 8 ", "Bitune, VeRA", "| causal, rank 512", "| bitune, rank 256"):
        assert line in said
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["peft_type"] == "VERA" and config["r"] == 4 and config["projection_prng_key"] == 0


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "vera"])
def test_peft_reads_our_adapters(kind, tmp_path):
    """(How we read PEFT's, tests/test_files.py has recorded.)"""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, ids = write_checkpoint(tmp_path / "base"), [256, 5, 9, 250, 3]
    with edited(tmp_path, "vera") as (module, _), torch.inference_mode():
        bitune = module("tiny").tiny_bitune("causal", kind)
        module("files.disk").write_files(tmp_path / "run", module("files.run").run_bytes(bitune, str(base)))
        ours, _ = bitune([ids[:1]], [[*ids[1:], 0]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.inference_mode():
        read = peft.PeftModel.from_pretrained(theirs, tmp_path / "run")(torch.tensor([ids])).logits
    torch.testing.assert_close(ours, read, atol=1e-4, rtol=0)


def test_the_command_writes_an_edited_copy(tmp_path):
    command = [sys.executable, ROOT / "tests/edits.py"]
    run = lambda *argv: subprocess.run([*command, *argv], capture_output=True, text=True)
    assert run("heads", tmp_path / "copy").stdout == f"wrote {tmp_path / 'copy'}\n"
    assert "num_key_value_heads, 1, 1)" in (tmp_path / "copy/bitune.py").read_text()
    assert "exists: expected a new name" in run("heads", tmp_path / "copy").stderr
    assert "the names are heads, sigmoid" in run("head", tmp_path / "other").stderr
