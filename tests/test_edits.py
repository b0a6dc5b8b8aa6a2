"""The edits of docs/edits.md: made, trained, shown, asked and resumed; right they keep every identity, with
a slip in them they do not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

from edits import ROOT, copy_project, edits, imported_from
from tiny import write_checkpoint, write_data

# What a train.py of the edit is given to use it, and what a Bitune is made with.
USED_BY = {"vera": (["--peft", "vera", "--rank", "8"], {"kind": "vera"}),
           "segments": (["--method", "segments"], {"method": "segments"})}

# Slips: the edit, (file, line, what becomes of it), and an identity that must see it.
SLIPS = {
    "softmax over layers instead of passes": (
        "third", [("bitune.py", "self.theta_key.softmax(1), self.theta_value.softmax(1)         # (L",
                   "self.theta_key.softmax(0), self.theta_value.softmax(0)         # (L")],
        "the_passes_are_what_is_mixed"),
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
    "a factor in the groups that is never used": (
        "rate", [("train.py", '(10 if name.startswith("theta") else 1) * lr', "lr"),
                 ("train.py", '"peak": peak, ', '"peak": peak, "factor": 10, ')],
        "every_rate_acts"),
    "keys detached": (
        "token", [("bitune.py", "k.transpose(1, 2).flatten(2)", "k.detach().transpose(1, 2).flatten(2)")],
        "gradients_are_slopes"),
    "a window open on one side": (
        "window", [("model.py", "(k - q).abs() <= 64", "k - q <= 64")], "both_sides_are_seen_alike"),
    "the scale of one rank used for both": (
        "ranks", [("lora.py", "lora_alpha / rank, dropout", "lora_alpha / 16, dropout")],
        "a_rank_is_only_a_size"),
    "keys not turned again": (
        "reversed", [("bitune.py", "rotate(k.take_along_dim(index, 2), cos, sin).to(k.dtype)",
                      "k.take_along_dim(index, 2)")],
        "layer_0_is_read_alike"),
    "positions interleaved": (
        "beside", [("bitune.py", "    return both\n",
                    "    both.positions = context.positions.repeat_interleave(len(self.passes), 1)\n"
                    "        return both\n")],
        "batched_is_alone"),
    "no lower bound at short prompts": (
        "opening", [("bitune.py", "max(0, len(prompt) - 4)", "len(prompt) - 4")], "prompts_are_cut_in_two"),
    "merged without the gain": (
        "gain", [("lora.py", "return (self.gain * self.weight(linear))", "return (self.weight(linear))")],
        "merged_is_unmerged"),
}


def failures(folder, tmp_path, name, *only):
    """The identities, of all or `only` some, that fail in a copy of the project."""
    with imported_from(folder) as module:
        make = partial(module("tiny").tiny_bitune, **USED_BY.get(name, ([], {}))[1])
        identities = module("identities")
        return identities.failures(make, tmp_path / "identities", only or identities.IDENTITIES)


@pytest.mark.identity
@pytest.mark.parametrize("name", edits())
def test_a_right_edit_keeps_every_identity(name, tmp_path):
    assert failures(copy_project(tmp_path / "copy", name), tmp_path, name) == {}


@pytest.mark.identity
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_turns_an_identity_red(slip, tmp_path):
    name, lines, identity = SLIPS[slip]
    folder = copy_project(tmp_path / "copy", name, slips=lines)
    assert failures(folder, tmp_path, name, identity).keys() == {identity}


def test_an_edit_goes_through_every_command(edit, tmp_path, capsys):
    """Trained, killed, resumed to the same bytes, shown, asked alone and in a chat, evaluated."""
    base, data = write_checkpoint(tmp_path / "base"), write_data(tmp_path / "data.jsonl")
    choices, run = tmp_path / "choices.jsonl", tmp_path / "run"
    choices.write_text('{"question": "Which?", "choices": ["a", "bcd"], "answer": 0}\n')
    flags = ["--model", base, "--data", data, "--steps", 20, "--batch-size", 4, "--lr", 0.01, "--save-every", 5,
             "--eval-every", 10, *USED_BY.get(edit, ([], {}))[0]]
    with imported_from(copy_project(tmp_path / "copy", edit)) as module:
        train, sample, evaluate = module("train"), module("sample"), module("experiments.evaluate")
        call = lambda main, *argv: main([str(a) for a in argv])
        call(train.main, *flags, "--out", tmp_path / "whole")
        step, taken = train.train_step, []

        def stopped(*args):
            taken.append(1)
            if len(taken) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args)

        train.train_step = stopped
        with pytest.raises(SystemExit):
            call(train.main, *flags, "--out", run)
        train.train_step = step
        call(train.main, "--resume", run)
        for file in run.rglob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "whole" / file.relative_to(run)).read_bytes()
        mixes = bool(json.loads((run / "bitune.json").read_text())["alpha"])
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        shown = [key for key in log[-2] if key.startswith("alpha_")]
        capsys.readouterr()
        call(sample.main, "--adapter", run, "--prompt", "What is 3?", "--max-new-tokens", 3,
             *["--show-mixing"] * mixes)
        said = capsys.readouterr().err
        assert not mixes or len(shown) == said.splitlines()[1].count("α") and "█" in said
        bitune, text = module("files.run").load_run(run)[0], [5, 9, 250, 3, 7, 7, 1, 80]
        for kind in ("recompute", "alternating"):
            chat = module("cli.chat").conversation(bitune, "chat-chatml", kind)
            (said,) = chat.generate([text], 3)
            assert said == bitune.generate([text], 3)[0]
            assert len(chat.generate([text + said + text], 3)[0]) == 3
        for file in (data, choices):
            call(evaluate.main, "--adapter", run, "--task", "rows", "--data", file, "--limit", 4,
                 "--max-new-tokens", 2)


# Edits that leave today's numbers as they are: on prompts as short, or by default.
SAME_NUMBERS = {"window", "vera", "segments", "ranks", "qv", "start", "clip", "rate"}


def test_the_whole_suite_through_an_edit(whole, tmp_path):
    """References turn red, where their numbers are not those of today; identities and commands stay green."""
    folder = copy_project(tmp_path / "copy", whole)
    for path in ("docs", "tests/reference", "tests/cases", "README.md", "pytest.ini", "requirements.txt"):
        if (ROOT / path).is_dir():
            shutil.copytree(ROOT / path, folder / path, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / path, folder / path)
    suite = [sys.executable, "-m", "pytest", "--ignore=tests/test_edits.py", "--ignore=tests/fuzz", "-m"]
    run = lambda mark: subprocess.run([*suite, mark], cwd=folder, capture_output=True, text=True)
    green = run("not reference")
    assert green.returncode == 0, green.stdout[-2000:]
    assert whole in SAME_NUMBERS or run("reference").returncode == 1


def test_segments_see_themselves_and_what_comes_before(tmp_path):
    """The masks of two prompts of several turns, one of them padded; of a single turn: bidirectional."""
    told, prompts = [], [[1, 5, 6, 1, 7, 8, 9], [3, 1, 4, 4]]
    with imported_from(copy_project(tmp_path / "copy", "segments")) as module:
        bitune = module("tiny").tiny_bitune("segments").eval()
        states = bitune.model.states
        bitune.model.states = lambda *args: told.append(args[2][:, 0]) or states(*args)
        bitune(prompts, [[2], [2]])
        naive = module("bitune").Bitune(bitune.model, "naive-bidir")
        torch.testing.assert_close(bitune([[1, 5, 6, 7]], [[2, 3]]), naive([[1, 5, 6, 7]], [[2, 3]]))
    for mask, prompt in zip(told[0], prompts):
        n = len(prompt) - 1                                         # the last one opens the answer stream
        turn = torch.tensor(prompt[:n]).eq(1).cumsum(0)
        assert torch.equal(mask[:n, :n], turn[:, None] >= turn) and not mask[:n, n:].any()


def test_a_run_of_other_code_is_refused(tmp_path, capsys):
    """By what it computes: passes, masks, mixing, opening, adapters, whatever their names."""
    run, argv = tmp_path / "run", ["--prompt", "x", "--adapter", str(tmp_path / "run")]
    base, data = write_checkpoint(tmp_path / "base"), write_data(tmp_path / "data.jsonl")
    flags = ["--model", base, "--data", data, "--steps", 4, "--save-every", 2, "--val-size", 0, "--out", run]
    with imported_from(ROOT) as module:
        module("train").main([str(a) for a in flags])
    (run / "settings.json").write_text((run / "settings.json").read_text().replace('"steps": 4', '"steps": 5'))
    line = '("bidirectional", "prompt")],\n    "naive'
    other_pass = [("bitune.py", line, line.replace("bidirectional", "causal"))]
    other = "was trained by code that computes something else (from the same made-up numbers another"
    for name, slips, message in (
        ("sigmoid", [], f"{other} cache and logits)"), ("relu", [], f"{other} cache and logits)"),
        ("window", [], f"{other} cache and logits)"), ("opening", [], f"{other} opening and cache and logits)"),
        ("gain", [], "base_model.model.model.layers.0"),
        ("heads", [], "theta_key is (3,), expected (3, 2, 1, 1)"),
        (None, other_pass, f"{other} cache and logits)"),
    ):
        with imported_from(copy_project(tmp_path / f"copy {name}", name, slips=slips)) as module:
            for main, more in ((module("sample").main, argv), (module("train").main, ["--resume", str(run)])):
                with pytest.raises(SystemExit) as end:
                    main(more)
                said = capsys.readouterr().err
                assert end.value.code == 2 and (message in said or "was trained by code that computes something else" in said), said


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
