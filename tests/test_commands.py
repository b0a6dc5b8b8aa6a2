"""The two commands, end to end on a tiny checkpoint: what they write, what they say, and what a kill
leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
from bitune import Bitune, adapter_sets
from cli import memory
from edits import ROOT
from experiments import evaluate, merge
from files.adapters import adapter_bytes
from files.checkpoint import checkpoint_dtype, load_base
from files.disk import finish_saves, locked, write_files
from files.run import fingerprint, load_run, own_tensors, read_settings
from lora import adapters, add_adapter

from text.examples import Example, batches, load_examples
from tiny import (ANSWERS, CASES, RAGGED, call, change, rewrite, scatter, some_of, tiny_bitune, tiny_model,
                  write_checkpoint, write_data, write_run)

ASK = "--prompt", "x", "--max-new-tokens", 2


def tensors(folder):
    """All tensors of a run, by file and name."""
    return {f"{f.relative_to(folder)}:{n}": t for f in folder.rglob("*.safetensors")
            for n, t in load_file(f).items()}


def assert_same_run(a, b):
    torch.testing.assert_close(tensors(a), tensors(b), atol=0, rtol=0)
    one, two = ({f.relative_to(run): f.read_text() for f in run.rglob("*.json") if f.name != "settings.json"}
                for run in (a, b))
    assert one == two


def log(folder, key="loss"):
    return [r[key] for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if key in r]


@contextmanager
def at_step(n, act=lambda *args: signal.raise_signal(signal.SIGTERM), train=train):
    """In here, act(what the step is given) comes before training's n-th step: by default, it has to stop."""
    step, calls = train.train_step, count(1)
    with patch.object(train, "train_step", lambda *args: (next(calls) == n and act(*args), step(*args))[1]):
        yield


# ---- train and ask ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["bitune", "shared-weights", "naive-bidir", "causal"])
def test_train_then_ask(method, flags, tmp_path, says):
    said, run = says(train, *flags("--method", method, "--dropout", 0.1)).out, tmp_path / "run"
    assert "[[ It is 0.</s>]]" in said and "base model: validation loss" in said and "step 6/6" in said
    assert (run / "prompt/adapter_model.safetensors").exists() == ("prompt" in adapter_sets(method))
    assert len(log(run)) == 6 and len(log(run, "val_loss")) == 3
    assert log(run, "val_loss")[-1] < log(run, "val_loss")[0]

    said = says(sample, "--adapter", run, *ASK)                 # the run names its base
    assert f"loaded {run}:" in said.err and "tensors" in said.err and "tokens/s" in said.err and said.out
    assert f"method {method}, template paper, trained for 6 steps" in said.err
    bitune, tokenizer, *_ = load_run(run)
    assert (run / "mixing.safetensors").exists() == bool(own_tensors(bitune))
    val = load_examples(tmp_path / "data.jsonl", tokenizer, "paper", 256)[0][-4:]
    assert train.validate(bitune, val, batches)["loss"] == pytest.approx(log(run, "val_loss")[-1], 1e-6)


@pytest.mark.reference          # of today's method
def test_settings_and_derived_numbers_are_saved(flags, tmp_path):
    train.main(flags("--rank", 3, "--steps", 1))
    settings, derived = read_settings(tmp_path / "run")
    assert settings["rank"] == 3 and settings["eps"] == 1e-6
    assert (derived["train_examples"], derived["val_examples"]) == (36, 4)
    assert derived["trainable_parameters"] == 2 * 3 * 3 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3) + 6
    assert derived["answer_tokens"] == sum(len(f" It is {i + i % 7}.") + 1 for i in range(36))


def test_validation_numbers():
    """Without dropout, with which training then goes on."""
    bitune = tiny_bitune(adapters={"dropout": 0.5}).train()
    examples, n = [Example(p, a) for p, a in zip(RAGGED, ANSWERS)], [len(a) for a in ANSWERS]
    result = train.validate(bitune, examples, batches)
    assert all(module.training for module in bitune.modules())
    bitune.eval()
    losses = [bitune.losses([p], [a]).item() for p, a in examples]
    assert result["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    mean = sum(loss * k for loss, k in zip(losses, n)) / sum(n)
    assert result["perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-4)
    greedy = [bitune([p], [a])[0][0].argmax(-1).tolist() for p, a in examples]
    assert result["accuracy"] == sum(x == y for g, a in zip(greedy, ANSWERS) for x, y in zip(g, a)) / sum(n)


# ---- interrupted -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["--peft full", "--dropout 0.2"])
def test_resumed_is_uninterrupted(kind, flags, tmp_path, exits, says):
    """Bit for bit, with dropout drawing random numbers on the way: saves draw none. SIGTERM in step 3 of a
    run, and of a second stage, which starts where the first ended."""
    first, second = tmp_path / "first", tmp_path / "second"
    more = f"--adapter {first} --data {tmp_path}/data.jsonl --batch-size 4 --steps 4 --lr 0.01".split()
    whole = flags("--method", "bitune", *kind.split(), "--template", "plain")
    for run, argv in ((first, whole), (second, more)):
        killed, said = tmp_path / "killed" / run.name, says(train, *argv, "--out", run).out
        with at_step(3):
            line = exits(128 + signal.SIGTERM, train, *argv, "--out", killed)
        assert "step 3: stopped by SIGTERM" in line and len(log(killed)) == 3
        with open(killed / "log.jsonl", "a") as f:
            f.write('{"step": 4, "loss": 0}\n{"step": 5, "lo')  # what a kill may leave behind the save
        torch.manual_seed(999)
        call(train, "--resume", killed)
        assert_same_run(run, killed)
        assert log(run) == log(killed)
    assert f"{first}: validation loss" in said
    assert log(second, "val_loss")[0] == log(first, "val_loss")[-1] != log(second, "val_loss")[-1]
    about = json.loads((second / "bitune.json").read_text())
    assert (about["method"], about["template"], about["step"]) == ("bitune", "plain", 4)


def test_a_first_save_killed_between_two_renames_is_whole(flags, tmp_path):
    """By SIGKILL: also its lock has died with the process."""
    replace, run = os.replace, tmp_path / "run"

    def dying(source, target):
        if str(target).endswith("prompt/adapter_model.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    with patch("os.replace", dying):
        child = get_context("fork").Process(target=train.main, args=(flags(),))
        child.start(), child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (run / "renaming.json").exists() and not (run / "adapter_config.json").exists()
    assert load_run(shutil.copytree(run, tmp_path / "copy"))[3]["step"] == 3    # to read it finishes it
    call(train, "--resume", run)
    train.main(flags("--out", tmp_path / "whole"))
    assert_same_run(run, tmp_path / "whole")


def test_a_second_signal_ends_a_validation_and_nothing_is_lost(flags, tmp_path, monkeypatch, exits):
    run, validate = tmp_path / "run", train.validate

    def interrupted(bitune, *args):
        if len(log(run)) == 3 and len(args) == 3:               # not the look at a step before its save
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("validation went on")
        return validate(bitune, *args)

    monkeypatch.setattr(train, "validate", interrupted)
    line = exits(128 + signal.SIGINT, train, *flags("--save-every", 6))
    assert "step 3: stopped by SIGINT. The save of step 3 is whole" in line
    monkeypatch.setattr(train, "validate", validate)
    call(train, "--resume", run)                                # makes up for what was cut short
    train.main(flags("--save-every", 6, "--out", tmp_path / "whole"))
    assert log(run, "val_loss") == log(tmp_path / "whole", "val_loss")


def test_as_many_tokens_go_at_a_time_as_fit(flags, tmp_path, monkeypatch, exits):
    """By what one example takes beside the memory that is free, or by trying; it is said."""
    losses, sizes, longest = Bitune.losses, [], 48

    def limited(self, prompts, answers):
        sizes.append(len(prompts) if len(answers[0]) == 1 else "in training")      # a trial is all prompt
        if len(prompts) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return losses(self, prompts, answers)

    monkeypatch.setattr(Bitune, "losses", limited)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    for out, limit, free, examples, tried, *typed in (
            ("all", 99, 1e9, 4, [1, 4]), ("tried", 2, 1e9, 2, [1, 4, 2]), ("reckoned", 99, 1e6, 1, [1, 1]),
            ("typed", 99, 1e9, 2, [2], 100), ("batch", 99, 1e9, 4, [4], 10**6)):
        sizes.clear()
        more = ["--micro-batch-tokens", *typed] * len(typed)
        train.main(flags("--out", tmp_path / out, "--steps", 2, *more))
        assert read_settings(tmp_path / out)[0]["micro_batch_tokens"] == examples * longest
        assert sizes[:len(tried)] == tried
    limit = 0
    line = exits(1, train, *flags("--out", tmp_path / "none"))
    assert "step 0: not enough memory (out of memory): try a smaller --micro-batch-tokens. Nothing" in line


def test_what_goes_wrong_later_loses_no_save(flags, tmp_path, exits):
    with at_step(4, Mock(side_effect=OSError(28, "No space left on device"))):
        line = exits(1, train, *flags())
    assert "step 4: [Errno 28] No space left on device. The save of step 3 is whole: python train.py" in line
    call(train, "--resume", tmp_path / "run", "--micro-batch-tokens", 90)
    assert len(log(tmp_path / "run")) == 6


def test_a_loss_that_is_not_finite_stops_before_it_is_applied():
    bitune = tiny_bitune()
    optimizer = train.make_optimizer(bitune, 0.01, 1e-6, 0.0)
    some_of(bitune).data[0] = float("nan")
    before = [p.detach().clone() for p in bitune.parameters()]
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        train.train_step(bitune, optimizer, [Example(RAGGED[0], ANSWERS[0])], batches, 1.0, 1.0)
    assert all(torch.equal(a, b.detach()) or a.isnan().any() for a, b in zip(before, bitune.parameters()))


def test_a_model_that_a_step_has_ruined_is_not_saved(flags, tmp_path, monkeypatch, exits):
    step = train.train_step

    def ruining(bitune, *args):
        result = step(bitune, *args)
        if len(log(tmp_path / "run")) == 3:
            some_of(bitune).data[1] = float("nan")
        return result

    monkeypatch.setattr(train, "train_step", ruining)
    line = exits(1, train, *flags("--save-every", 2))
    assert "step 4: the validation loss is nan: start again with a lower --lr. The save of step 3 is" in line
    assert all(t.isfinite().all() for t in tensors(tmp_path / "run").values())


def test_a_folder_in_use_is_left_to_the_process_that_uses_it(flags, tmp_path, exits):
    run = tmp_path / "run"
    with locked(run):
        assert "run is in use: another process trains there" in exits(2, train, *flags())
        assert not (run / "settings.json").exists()
        (run / "renaming.json").write_text("[]")                # it is about to do this itself
        finish_saves(run)
        assert (run / "renaming.json").exists()
    train.main(flags("--steps", 1))
    assert not (run / "renaming.json").exists()
    with locked(run):                                           # a run that has ended lets go
        pass


# ---- wrong input -----------------------------------------------------------------------------------------

WRONG = {       # a command -> what is typed behind it, and what it says
    "train --data data.jsonl": [("", "--model, --out not given")],
    "train --resume=": [("", "--resume is empty")],             # no demonstration
    "experiments.demo.depth --out new": [(f"--bases 3x64 {odd}", f"--bases {odd}: expected LAYERSxWIDTH")
                                         for odd in ("2x", "axb", "2x64x2", "0x64", "2x33")],
    "experiments.demo.__main__": [("--seeds 1000000000000", "expected a whole number from 1 to 1000")],
    "experiments.demo.pretrain --steps 1": [("--out model", "--out model exists: choose another name")],
    "experiments.cost": [
        *((f"--{flag} 1000000000", "expected a whole number from") for flag in ("prompt", "answer", "card")),
        ("--gbytes 9", "--gbytes has no effect without --card"),
        ("--card 64 --prompt 9", "--prompt has no effect with --card"),
        ("--card 64 --checkpointing", "--checkpointing has no effect with --card")],
    "experiments.benchmark --device cpu --preset tiny": [
        ("--parts answering --batches 2", "--batches has no effect without --parts training"),
        ("--launch 9", "--launch has no effect on cpu")],
    "train --model model --data data.jsonl --out new": [
        ("--model nowhere", "nowhere is no folder here"), ("--method bitun", "invalid choice: 'bitun'"),
        ("--data nowhere", "'nowhere' is not there: expected a data file"),
        ("--rank 0", "argument --rank: 0 is out of range: expected a whole number from 1 to 65536"),
        ("--targets fc1 q_proj", "no linear is named fc1: expected down_proj, gate_proj, k_proj, o_proj"),
        ("--max-length 300", "300 tokens are more than the model's max_position_embeddings of 256"),
        ("--max-length 5", "no example left; dropped: 40 too long (first: line 1)"),
        *((f"{flag}=", f"{flag} is empty") for flag in ("--adapter", "--targets", "--device")),
        ("--device tpu", "device 'tpu' cannot be used"), ("--peft full --dtype bfloat16", "takes float32"),
        ("--peft full --method causal --targets q_proj", "--targets: --peft full trains all weights"),
        ("--peft ia3 --feedforward dwn_proj", "no linear is named dwn_proj"),
        ("--val-data data.jsonl --val-size 5", "--val-size: all of --val-data"),
        ("--method causal --c 1", "--c has no effect with --method causal --peft lora"),
        ("--peft ia3 --rank 4", "--rank has no effect"), ("--feedforward x", "--feedforward has no effect"),
        ("--data half", "half, line 1: not JSON"), ("--data twice", "twice, line 1: not JSON")],
    "sample --prompt x": [
        ("", "no run of the demonstration below runs/: python train.py makes one"),
        ("--adapter hard", "hard has no adapter_config.json"),
        ("--model model --adapter nowhere", "nowhere has no adapter_config.json"),
        ("--model model --top-k 3", "--top-k has no effect without a --temperature above 0"),
        ("--model model --top-p 0.5", "--top-p has no effect without a --temperature above 0"),
        ("--model model --chat", "--chat has no effect with --prompt"),
        ("--adapter plain --show-mixing", "method causal mixes nothing of this prompt"),
        (f"--adapter plain --prompt {'x' * 300}", "are more than the model's max_position_embeddings of"),
        ("--model other --adapter plain", "plain was finetuned from model, which other is not"),
        ("--model bos", "the tokenizer's ids go up to 300, but the model's vocabulary has 300")],
    "experiments.merge --model model --out new": [
        ("--adapter mixed", "is of method bitune, whose prompt passes need"),
        ("--adapter whole", "whole is a whole checkpoint, not an adapter of")],
    "experiments.evaluate --task arc --data arc.jsonl --out scored": [
        ("", "neither --model nor --adapter"), ("--model model --data none", "No such file"),
        ("--task ultrafeedback", "invalid choice"), ("--adapter model", "model has no adapter_config.json"),
        ("--model none --adapter whole", "none is no folder here"),         # whose scores are there
        ("--model model --task piqa", "a row of piqa has 'goal'"),
        ("--model model --forced-causal", "method causal mixes nothing: there is no α to set to 0"),
        ("--adapter mixed", "the tokenizer has no special token <|im_")],
    "experiments.ablate --out new --data data.jsonl": [
        ("", "--model not given"), ("--model model --limit 3", "--limit has no effect without --evaluate"),
        ("--model model --methods naive-bidir --cs 1", "--cs has no effect with methods that mix nothing")],
    "experiments.ablate --out new --data data.jsonl --model model --evaluate arc=arc.jsonl": [
        ("--method causal --lr 1", "unrecognized arguments: --method causal --lr 1"),
        ("--evaluate arc", "--evaluate arc=: expected TASK=FILE"),
        ("--evaluate piqa=arc.jsonl", "a row of piqa has 'goal'"),
        ("--methods causal", "invalid choice: 'causal'"), ("--model nowhere", "nowhere is no folder here"),
        *((f"{more}pipe", "pipe is a pipe, which can be read once")
          for more in ("--data ", "--val-data ", "--evaluate rows=")),
        ("--val-size 0 --lrs 1 2", "no validation data to choose by"),
        ("--data few.jsonl --lrs 1 2", "no validation data to choose by"),
        ("--evaluate arc=hard/arc.jsonl arc=arc.jsonl", "two files would both be called 'arc'")],
    "experiments.curves": [("model", "no step is logged in model"),
                           *((f"plain --out {name}", "is there, and is no file") for name in (".", "pipe"))]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models (of 300 ids), runs of them and data, as WRONG calls them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("world"))
        for name in ("model", "other"):
            write_checkpoint(Path(name), **{"hidden_size": 64, "rope_theta": 5e5} if name == "other" else {})
        for name, tokens in (("bos", {"<s>": 300, "</s>": 257}),
                             ("marked", {"<s>": 256, "</s>": 257, "<|im_start|>": 300, "<|im_end|>": 301})):
            added = {str(i): {"content": token, "special": True} for token, i in tokens.items()}
            change(write_checkpoint(Path(name)) / "tokenizer_config.json", added_tokens_decoder=added)
        write_run(Path("mixed"), tiny_bitune(), "marked", template="chat-chatml")
        for name, kind in (("plain", "lora"), ("whole", "full")):
            write_run(Path(name), tiny_bitune("causal", kind), "model")
        shutil.copytree(CASES / "published", "hard")
        shutil.copy("hard/arc.jsonl", "arc.jsonl")
        Path("plain/log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        os.mkfifo("pipe")
        write_data(Path("data.jsonl"))
        write_data(Path("few.jsonl"), 5)
        Path("half").write_text('{"question"')
        Path("twice").write_text('{"prompt": "a", "prompt": "b", "answer": "c"}')
        call(evaluate, *"--model whole --task arc --data arc.jsonl --out scored".split())
        return Path.cwd()


@pytest.mark.parametrize("line, more, message", [(line, *c) for line, cases in WRONG.items() for c in cases])
def test_wrong_input_is_one_line_and_exit_status_2(line, more, message, world, monkeypatch, exits):
    """And nothing is written."""
    held = lambda: {file: file.stat().st_mtime_ns for file in world.rglob("*")}
    monkeypatch.chdir(world)
    (command, *argv), before = f"{line} {more}".split(), held()
    assert message in exits(2, import_module(command), *argv)
    assert held() == before


@pytest.mark.parametrize("heads, groups", [(9, 3), (8, 1), (4, 4), (14, 2), (1, 1)])
def test_a_fingerprint_is_taken_of_any_number_of_heads(heads, groups):
    config = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": groups}
    assert len(fingerprint(tiny_bitune(config=config))) > 4


def test_a_run_is_never_overwritten_and_resumes_only_as_it_was(flags, tmp_path, exits):
    train.main(flags())
    run, bad = tmp_path / "run", lambda *argv: exits(2, train, *argv)
    assert "already holds a run: continue it with --resume" in bad(*flags())
    assert "already holds a run" in bad(*flags("--peft", "full", "--out", tmp_path / "model"))     # the base
    for more in ([], ["--steps", 6]):
        assert "is finished: all of its 6 steps are done" in bad("--resume", run, *more)
    assert "which --lr would change" in bad("--resume", run, "--lr", 3e-4)
    line = bad("--resume", run, "--steps", 9)
    assert "which --steps would change" in line and f"--adapter {run}, and another --out" in line
    assert "--rank: adapters and mixing are those of" in bad(*flags("--adapter", run, "--rank", 3))
    other = shutil.copytree(tmp_path / "model", tmp_path / "other")     # with what an adapter has changed
    rewrite(other / "model.safetensors", lambda t: t["model.layers.1.mlp.up_proj.weight"].mul_(1.1))
    line = bad(*flags("--adapter", run, "--model", other, "--out", tmp_path / "new"))
    assert f"which {other} is not: " in line
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:-2]))         # a save is never ahead of its log
    assert "log.jsonl is damaged: it ends before step 6" in bad("--resume", run)
    (run / "log.jsonl").write_text("".join(lines[:-1]))         # as if killed in the last validation
    rows, parts = (tmp_path / "data.jsonl").read_text().splitlines(), (tmp_path / "a", tmp_path / "b")
    for part, own in zip(parts, (rows[:30], rows[30:])):        # 36 are trained on, and 4 validate
        part.write_text("\n".join(own))
    assert "has changed since" in bad("--resume", run, "--data", parts[0], "--val-data", parts[1])
    write_data(tmp_path / "data.jsonl", 41)
    assert "data.jsonl, or the validation data, has changed since" in bad("--resume", run)
    assert "has no settings.json" in bad("--resume", tmp_path / "nowhere")
    change(run / "settings.json", settings=read_settings(run)[0] | {"val_size": None})
    assert "settings.json lacks val_size" in bad("--resume", run)


@pytest.mark.parametrize("file, damage, message", [
    ("bitune.json", Path.unlink, "has no bitune.json, which says how its two sets are used"),
    ("bitune.json", partial(Path.write_text, data="[]"), "is not what it should be: expected an object"),
    ("bitune.json", partial(change, method=None), "bitune.json lacks method"),
    ("bitune.json", partial(change, c="x"), "has the c 'x', expected a whole number or a number"),
    ("bitune.json", partial(change, template="x"), "has the template 'x', expected"),
    ("adapter_config.json", partial(change, r=None), "adapter_config.json lacks r"),
    ("adapter_model.safetensors", partial(Path.write_text, data="x"), "safetensors cannot be read"),
    ("adapter_model.safetensors", lambda f: f.rename(f.with_suffix(".bin")), "a pickle, is not read"),
    pytest.param("mixing.safetensors", Path.unlink, "has no mixing.saf", marks=pytest.mark.reference),
    pytest.param("mixing.safetensors", partial(save_file, {"theta_key": torch.ones(2)}),
                 "missing theta_value (3,); theta_key is (2,), expected", marks=pytest.mark.reference)])
def test_a_damaged_run_is_refused_in_one_line(file, damage, message, tmp_path, exits):
    run = write_run(tmp_path / "run", tiny_bitune(), write_checkpoint(tmp_path / "model"))
    damage(run / file)
    assert message in exits(2, sample, "--model", tmp_path / "model", "--adapter", run, *ASK)


# ---- going on --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["anticausal", "shared-weights"])
def test_another_method_that_mixes_goes_on_with_the_mixing(method, flags, tmp_path):
    first = write_run(tmp_path / "first", tiny_bitune("only-causal"), tmp_path / "model")
    train.main(flags("--adapter", first, "--method", method, "--steps", 1, "--lr", 0, "--val-size", 0))
    assert json.loads((tmp_path / "run/bitune.json").read_text())["method"] == method
    mixing = lambda run: {n: t.tolist() for n, t in tensors(run).items() if "mixing" in n}
    assert mixing(tmp_path / "run") == mixing(first)


def test_bitune_starts_from_a_peft_adapter_whose_ranks_differ(flags, tmp_path, capsys):
    model, run, adapter = tiny_model(), tmp_path / "run", tmp_path / "adapter"
    for target, rank in (("q_proj", 2), ("up_proj", 3)):
        add_adapter(model, "answer", "lora", [target], rank=rank, lora_alpha=4.0)
    scatter(model)
    write_files(adapter, adapter_bytes(model, "answer", str(tmp_path / "model")))
    train.main(flags("--adapter", adapter, "--lr", 0, "--steps", 2)[2:])       # the adapter names its base
    (bitune, _, _, about), (settings, _) = load_run(run), read_settings(run)
    given, prompt = adapters(model, "answer"), adapters(bitune.model, "prompt")
    for path, one in adapters(bitune.model, "answer").items():
        assert torch.equal(one.lora_A, given[path].lora_A) and torch.equal(one.lora_A, prompt[path].lora_A)
    assert (about["method"], settings["peft"], settings["rank"]) == ("bitune", "lora", 3)
    assert settings["model"] == str(tmp_path / "model")
    assert {a.made_with["rank"] for a in given.values()} == {2, 3}


# ---- asking ----------------------------------------------------------------------------------------------

def test_lines_of_standard_input_are_prompts(tmp_path):
    """To a base model, which goes on with the text as it stands, without what Windows adds."""
    folder = write_checkpoint(tmp_path / "model")
    command = [sys.executable, ROOT / "sample.py", "--model", folder, "--max-new-tokens", "4"]
    lines = b"\xef\xbb\xbfab\r\n\r\n" + b"x" * 300 + b"\ncd\n"
    done = subprocess.run(command, capture_output=True, input=lines)
    assert done.returncode == 1 and done.stderr.count(b"tokens/s; answer") == 2
    assert b"error: 302 tokens are more than the model's max_position_embeddings of 256" in done.stderr
    answers = Bitune(tiny_model(), "causal").generate([[256, 97, 98], [256, 99, 100]], 4, stop_ids={257})
    one, two = (bytes(i for i in ids if i < 256).decode(errors="replace") for ids in answers)
    assert done.stdout.decode() == f"{one}\n\n\n{two}\n" and b"an empty line asks nothing" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_an_empty_one(closed, tmp_path):
    """Also for lines, and nothing but answers comes out of what is left."""
    folder = write_checkpoint(tmp_path / "model")
    command = f"{sys.executable} {ROOT}/sample.py --model {folder} --max-new-tokens 4 {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, input=b"ab\n")
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"tokens/s" not in done.stdout
    assert (b"tokens/s" in done.stderr) == (closed == ">&-") and bool(done.stdout) == (closed == "2>&-")


def test_stops_limits_and_prompts_of_several_lines(tmp_path, exits, says, monkeypatch):
    folder, file, asked = write_checkpoint(tmp_path / "model"), tmp_path / "prompt.txt", []
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 257]}')
    file.write_bytes("\ufeffab\r\nc\n\nd\r\n".encode())

    def answer(self, prompts, max_new_tokens, *options):
        asked.append(bytes(prompts[0][1:]).decode())
        yield from ([i] for i in "One, é two. Three".encode()[:max_new_tokens])

    monkeypatch.setattr(Bitune, "answer", answer)
    for limit, stops, said, cut in (
            (20, [], "One, é two. Three", ""), (5, [], "One, ", "; cut by the limit of 5 tokens]"),
            (6, [], "One, \ufffd", "; cut by the limit of 6 tokens]"), (99, ["two", "Three"], "One, é ", ""),
            (99, [" tw, "], "One, é two. Three", ""), (3, ["One"], "", "")):    # begun, and not ended; met
        for prompt in ("ab\nc\n\nd", "-"):
            monkeypatch.setattr("sys.stdin", file.open(encoding="utf-8"))
            argv = ["--max-new-tokens", limit, *(f"--stop={text}" for text in stops)]
            out, err = says(sample, "--model", folder, "--prompt", prompt, *argv)
            assert out == said + "\n" and asked.pop() == "ab\nc\n\nd"
            assert (err.strip().endswith(cut) if cut else "cut by" not in err), (argv, err)
    file.write_bytes(b"caf\xe9")
    monkeypatch.setattr("sys.stdin", file.open(encoding="utf-8", errors="replace"))
    assert "can't decode byte 0xe9" in exits(2, sample, "--model", folder, "--prompt", "-")
    monkeypatch.setattr(Bitune, "answer", lambda *args: map(signal.raise_signal, [signal.SIGINT]))
    with pytest.raises(SystemExit, match="130"):        # an answer that is cut by hand is no answer
        call(sample, "--model", folder, "--prompt", "ab")


# ---- merge -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model_type, peft", [("qwen2", "lora"), ("qwen2", "dora"), ("phi", "ia3")])
def test_a_merged_checkpoint_answers_as_base_and_adapter_do(model_type, peft, tmp_path, exits):
    config, merged = {"model_type": model_type, "num_key_value_heads": 4}, tmp_path / "merged"
    own = {} if peft == "ia3" else {"adapters": {"dropout": 0.5}}
    bitune = tiny_bitune("causal", peft, config, **own)
    model = write_checkpoint(tmp_path / "model", **config)
    argv = ["--adapter", write_run(tmp_path / "run", bitune, model), "--out", merged]
    call(merge, *argv)
    base, whole = (load_run(None, folder)[0] for folder in (model, merged))
    adapted, base, whole = (b(RAGGED, ANSWERS)[0] for b in (bitune, base, whole))
    assert (adapted - base).abs().max() > 0.1
    torch.testing.assert_close(whole, adapted, atol=1e-4, rtol=1e-4)
    assert "merged exists: choose another name" in exits(2, merge, *argv)


def test_a_merge_says_what_its_dtype_keeps(tmp_path, exits, says):
    base, bitune = write_checkpoint(tmp_path / "model"), tiny_bitune("causal")
    for adapter in adapters(bitune.model, "answer").values():
        adapter.lora_B.data *= 1e-5                             # too little to move a bfloat16 weight
    rewrite(base / "model.safetensors", lambda t: t.update({name: w.bfloat16() for name, w in t.items()}))
    rewrite(base / "model.safetensors", lambda t: t.update({"layers.0.rotary_emb.inv_freq": torch.ones(4)}))
    argv = ["--adapter", write_run(tmp_path / "run", bitune, base), "--out", tmp_path / "merged"]
    assert "would be rounded away: give --dtype float32" in exits(2, merge, *argv)
    assert "float32 keeps 100.0% of what was learned" in says(merge, *argv, "--dtype", "float32").out
    rewrite(base / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(32)}))
    assert checkpoint_dtype(base) == torch.float32              # of several, the one that keeps all


# ---- full finetuning -------------------------------------------------------------------------------------

def test_a_fully_finetuned_run_is_a_checkpoint(flags, tmp_path, exits, says):
    run, model = tmp_path / "run", tmp_path / "model"
    change(model / "config.json", torch_dtype="bfloat16")
    train.main(flags("--peft", "full"))
    assert json.loads((run / "config.json").read_text())["torch_dtype"] == "float32"    # as its weights are
    bitune, _, _, _ = load_run(run)
    for way in ("--adapter", "--model"):                        # also then not its answering half alone
        assert f"loaded {run}: " in says(sample, way, run, *ASK).err
    line = exits(2, train, *flags("--model", run, "--out", tmp_path / "next"))
    assert "is a run with prompt passes, which need more than" in line
    models = load_base(run)[0], bitune.model, load_base(model)[0]      # the run as any checkpoint
    plain, own, before = (Bitune(m, "causal")(RAGGED, ANSWERS)[0] for m in models)
    assert torch.equal(plain, own) and (plain - before).abs().max() > 0.1
