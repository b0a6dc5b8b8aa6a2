"""The two commands, end to end on a tiny checkpoint: what they write, what they say, and what a kill
leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
from bitune import METHODS, Bitune, adapter_sets
from cli import memory
from experiments import evaluate, merge
from files.adapters import adapter_bytes
from files.checkpoint import load_base
from files.disk import finish_saves, locked, write_files
from files.run import alpha_by_layer, load_bitune, load_run, own_tensors, run_bytes
from lora import adapters, add_adapter
from text.examples import Example, batches
from tiny import ANSWERS, RAGGED, scatter, some_of, tiny_bitune, tiny_model, write_checkpoint, write_data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def files(folder):
    """All tensors and settings of a run, by file name."""
    found = {}
    for f in sorted(folder.rglob("*")):
        if f.suffix == ".safetensors":
            found |= {f"{f.relative_to(folder)}:{n}": t for n, t in load_file(f).items()}
        elif f.name in ("bitune.json", "adapter_config.json"):
            found[str(f.relative_to(folder))] = json.loads(f.read_text())
    return found


def assert_same_run(a, b):
    a, b = files(a), files(b)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key], key


def log(folder, key="loss"):
    return [r[key] for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if key in r]


def exits(code, main, argv, capsys):
    """The one line that a command says on standard error as it ends with `code`."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in argv])
    assert end.value.code == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---- train and ask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_train_then_ask(method, flags, tmp_path, capsys):
    train.main(flags("--method", method, "--dropout", 0.1))
    said = capsys.readouterr().out
    assert "[[ It is 0.</s>]]" in said and "base model: validation loss" in said and "step 6/6" in said
    run = tmp_path / "run"
    assert (run / "bidirectional/adapter_model.safetensors").exists() == ("prompt" in adapter_sets(method))
    assert (run / "mixing.safetensors").exists() == bool(own_tensors(load_run(run)[0]))
    assert len(log(run)) == 6 and len(log(run, "val_loss")) == 3
    assert log(run, "val_loss")[-1] < log(run, "val_loss")[0]

    sample.main(  # the run names its base
        ["--adapter", str(run), "--prompt", "What is 3?", "--max-new-tokens", "5"]
    )
    said = capsys.readouterr()
    assert (
        f"loaded {run}:" in said.err and f"method {method}, template paper, trained for 6 steps" in said.err
    )
    assert "tensors" in said.err and "tokens/s" in said.err and len(said.out) > 0


@pytest.mark.reference          # of today's method
def test_settings_and_derived_numbers_are_saved(flags, tmp_path):
    train.main(flags("--rank", 3))
    saved = json.loads((tmp_path / "run/settings.json").read_text())
    assert saved["settings"]["rank"] == 3 and saved["settings"]["eps"] == 1e-6
    d = saved["derived"]
    assert (d["train_examples"], d["val_examples"]) == (36, 4)
    assert d["trainable_parameters"] == 2 * 3 * 3 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3) + 6
    assert d["answer_tokens"] == sum(len(f" It is {i + i % 7}.") + 1 for i in range(36))


@pytest.mark.reference          # of today's method
def test_a_run_loaded_answers_as_the_one_trained(flags, tmp_path):
    train.main(flags())
    bitune, n, about = load_bitune(load_base(tmp_path / "model", "cpu", None)[0], tmp_path / "run")
    state = load_file(tmp_path / "run/state.safetensors")
    assert n == 2 * 2 * 21 + 2 and about["template"] == "paper"
    trained = {name for name, p in bitune.named_parameters() if p.requires_grad}
    assert trained > {name.split(".", 2)[2] for name in state if name.startswith("adamw.")} > set()


def test_the_schedule_rises_and_falls_linearly():
    rates = [train.schedule(s, 10, 2) for s in range(10)]
    assert rates == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert train.schedule(0, 10, 0) == 1.0


def test_validation_numbers():
    """Without dropout, with which training then goes on."""
    bitune = tiny_bitune(adapters={"dropout": 0.5})
    examples = [Example(p, a) for p, a in zip(RAGGED, ANSWERS)]
    result = train.validate(bitune, examples, batches)
    assert all(module.training for module in bitune.modules())
    bitune.eval()
    losses = [bitune.losses([p], [a]).item() for p, a in examples]
    n = [len(a) for a in ANSWERS]
    assert result["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert result["perplexity"] == pytest.approx(
        torch.tensor([l * k for l, k in zip(losses, n)]).sum().div(sum(n)).exp().item(), rel=1e-4
    )
    greedy = [bitune([p], [a])[0][0].argmax(-1).tolist() for p, a in examples]
    assert result["accuracy"] == sum(x == y for g, a in zip(greedy, ANSWERS) for x, y in zip(g, a)) / sum(n)


# ---- interrupted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_resumed_is_uninterrupted(peft, flags, tmp_path, monkeypatch):
    """Bit for bit, with dropout drawing random numbers on the way: saves draw none. SIGTERM after step
    3, then on to the end."""
    train.main(flags("--peft", peft, "--dropout", 0.2, "--save-every", 1, "--out", tmp_path / "whole"))

    step = train.train_step

    def interrupted(*args):
        result = step(*args)
        interrupted.count += 1
        if interrupted.count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    interrupted.count = 0
    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(SystemExit) as end:
        train.main(flags("--peft", peft, "--dropout", 0.2, "--save-every", 1))
    assert end.value.code == 128 + signal.SIGTERM and len(log(tmp_path / "run")) == 3
    with open(tmp_path / "run/log.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # what a kill may leave of a line
    monkeypatch.setattr(train, "train_step", step)
    torch.manual_seed(999)
    train.main(["--resume", str(tmp_path / "run")])
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert log(tmp_path / "whole") == log(tmp_path / "run")


def in_child(function, *args):
    """Call a function in a child process, which ends with it; returns its pid."""
    pid = os.fork()
    if not pid:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1), os.dup2(null.fileno(), 2)
            try:
                function(*args)
            finally:
                os._exit(0)
    return pid


def test_killed_at_any_moment_the_last_save_loads(flags, tmp_path):
    """SIGKILL twice over, at moments that move through the save; each time the run loads and goes on."""
    more = flags("--steps", 5000, "--save-every", 1, "--batch-size", 1, "--val-size", 0)
    run = tmp_path / "run"
    for i in range(2):
        pid = in_child(train.main, more)
        more = ["--resume", str(run)]
        before = len(log(run)) if (run / "log.jsonl").exists() else 0
        while (
            not (run / "log.jsonl").exists()
            or len(log(run)) < before + 3
            or not (run / "state.safetensors").exists()
        ):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        time.sleep(0.013 * i)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        load_bitune(tiny_model(), run)
        assert load_file(run / "state.safetensors")["step"] >= len(log(run)) - 1


def test_a_signal_during_validation_ends_it_there_and_nothing_is_lost(flags, tmp_path, monkeypatch, capsys):
    validate = train.validate

    def interrupted(bitune, *args):
        if len(log(tmp_path / "run")) == 3 and len(args) == 3:  # not the look at a step before its save
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("validation went on")
        return validate(bitune, *args)

    monkeypatch.setattr(train, "validate", interrupted)
    line = exits(128 + signal.SIGINT, train.main, flags("--save-every", 6), capsys)
    assert "step 3: stopped by SIGINT. The save of step 3 is whole" in line
    monkeypatch.setattr(train, "validate", validate)
    train.main(["--resume", str(tmp_path / "run")])     # makes up for the validation that was cut short
    train.main(flags("--save-every", 6, "--out", tmp_path / "whole"))
    assert log(tmp_path / "run", "val_loss") == log(tmp_path / "whole", "val_loss")


def test_as_many_tokens_go_at_a_time_as_fit(flags, tmp_path, monkeypatch, capsys):
    """By what one example takes beside the memory that is free, by trying, or by what was typed; it is said,
    and a resumed run goes on with the same."""
    losses, sizes = Bitune.losses, []

    def limited(self, prompts, answers):
        sizes.append(len(prompts))
        if len(prompts) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return losses(self, prompts, answers)

    monkeypatch.setattr(Bitune, "losses", limited)
    at_once = lambda run: json.loads((tmp_path / run / "settings.json").read_text())["settings"]
    longest, limit = 48, 99
    train.main(flags("--out", tmp_path / "all"))
    assert at_once("all")["micro_batch_tokens"] == 4 * longest and sizes[:2] == [1, 4]
    limit, sizes[:] = 2, []
    train.main(flags("--out", tmp_path / "tried", "--steps", 2))
    assert at_once("tried")["micro_batch_tokens"] == 2 * longest and sizes[:3] == [1, 4, 2]
    with monkeypatch.context() as patch:
        limit, sizes[:] = 99, []
        patch.setattr(memory, "free_bytes", lambda device: 10**6)
        train.main(flags("--out", tmp_path / "reckoned", "--steps", 2))
        assert at_once("reckoned")["micro_batch_tokens"] == longest and sizes[:2] == [1, 1]
    limit = 0
    line = exits(1, train.main, flags("--out", tmp_path / "none"), capsys)
    assert "step 0: not enough memory (out of memory): try a smaller --micro-batch-tokens. Nothing" in line


@pytest.mark.parametrize(
    "fault, advice",
    [
        (FloatingPointError("the loss is nan and the gradient norm nan"), "start again with a lower --lr"),
        (OSError(28, "No space left on device"), "No space left on device. "),
        (torch.OutOfMemoryError("out of memory"), "try a smaller --micro-batch-tokens"),
    ],
)
def test_what_goes_wrong_later_loses_nothing_that_was_saved(
    fault, advice, flags, tmp_path, monkeypatch, capsys
):
    step = train.train_step

    def failing(*args):
        failing.count += 1
        if failing.count == 4:
            raise fault
        return step(*args)

    failing.count = 0
    monkeypatch.setattr(train, "train_step", failing)
    line = exits(1, train.main, flags(), capsys)
    assert (
        "step 4" in line
        and advice in line
        and "The save of step 3 is whole: python train.py --resume" in line
    )
    monkeypatch.setattr(train, "train_step", step)
    train.main(["--resume", str(tmp_path / "run"), "--micro-batch-tokens", "90"])
    assert len(log(tmp_path / "run")) == 6


def test_a_loss_that_is_not_finite_stops_before_it_is_applied():
    bitune = tiny_bitune()
    optimizer = train.make_optimizer(bitune, 0.01, 1e-6, 0.0)
    some_of(bitune).data[0] = float("nan")
    before = [p.detach().clone() for p in bitune.parameters()]
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        train.train_step(bitune, optimizer, [Example(RAGGED[0], ANSWERS[0])], batches, 1.0, 1.0)
    assert all(torch.equal(a, b.detach()) or a.isnan().any() for a, b in zip(before, bitune.parameters()))


# ---- wrong input -----------------------------------------------------------------------------------------


def test_wrong_input_to_train_is_one_line_and_exit_status_2(flags, tmp_path, capsys):
    bad = lambda *more: exits(2, train.main, flags(*more), capsys)
    assert "--model, --out not given" in exits(2, train.main, ["--data", "x"], capsys)
    assert "--data, --out not given" in exits(2, train.main, ["--model", "x"], capsys)
    assert "nowhere is not a folder" in bad("--model", "nowhere")
    assert "'nowhere' is not there: expected a data file" in bad("--data", "nowhere")
    assert "argument --rank: 0 is out of range: expected at least 1" in bad("--rank", 0)
    assert "invalid choice: 'bitun'" in bad("--method", "bitun")
    assert "no linear is named fc1" in bad("--targets", "fc1")
    assert "300 tokens are more than the model's max_position_embeddings of 256" in bad("--max-length", 300)
    assert "no example left; dropped: 40 too long (first: line 1)" in bad("--max-length", 5)
    assert "device 'tpu' cannot be used" in bad("--device", "tpu")
    (tmp_path / "data.jsonl").write_text('{"question": "a"}\n')
    assert "dropped: 1 no answer" in bad("--data", tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text('{"question"\n')
    assert "data.jsonl, line 1: not JSON" in bad()
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_and_resumes_only_as_it_was(flags, tmp_path, capsys):
    train.main(flags())
    capsys.readouterr()
    assert "already holds a run: continue it with --resume" in exits(2, train.main, flags(), capsys)
    assert "is finished: all of its 6 steps are done" in exits(
        2, train.main, ["--resume", tmp_path / "run"], capsys
    )
    assert "which --lr would change" in exits(
        2, train.main, ["--resume", tmp_path / "run", "--lr", 3e-4], capsys
    )
    write_data(tmp_path / "data.jsonl", 41)
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/log.jsonl").write_text("".join(lines[:-1]))  # as if killed in the last validation
    line = exits(2, train.main, ["--resume", tmp_path / "run"], capsys)
    assert "data.jsonl, or the validation data, has changed since" in line
    assert "has no settings.json" in exits(2, train.main, ["--resume", tmp_path / "nowhere"], capsys)


def test_wrong_input_to_sample_is_one_line_and_exit_status_2(flags, tmp_path, monkeypatch, capsys):
    train.main(flags("--method", "causal"))
    capsys.readouterr()
    bad = lambda *argv: exits(2, sample.main, argv, capsys)
    model, run = ["--model", tmp_path / "model"], ["--adapter", tmp_path / "run"]
    monkeypatch.chdir(tmp_path)
    assert "no run of the demonstration below runs/: python train.py makes one" in bad("--prompt", "x")
    assert f"--model not given, and {tmp_path} has no bitune.json" in bad("--adapter", tmp_path)
    assert "nowhere has no adapter_config.json" in bad(
        *model, "--adapter", tmp_path / "nowhere", "--prompt", "x"
    )
    assert "method causal mixes nothing; give a run that does" in bad(*model, *run, "--show-mixing", "--prompt", "x")
    assert "are more than the model's max_position_embeddings of 256" in bad(
        *model, *run, "--prompt", "x" * 300
    )
    other = write_checkpoint(tmp_path / "other", hidden_size=64, rope_theta=5e5)
    line = bad("--model", other, *run, "--prompt", "x")
    assert f"{tmp_path / 'run'} was finetuned from {tmp_path / 'model'}, which {other} is not" in line
    assert "hidden_size is 32 there and 64 here" in line and "rope is" in line
    (tmp_path / "model/tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "add_bos_token": true, "added_tokens_decoder": {"300": {"content": "<s>"}}}'
    )
    assert "the tokenizer's ids go up to 300, but the model's vocabulary has 300" in bad(
        *model, "--prompt", "x"
    )


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda run: (run / "bitune.json").unlink(),
            "has no bitune.json, which says how its two sets are used",
        ),
        (
            lambda run: (run / "bitune.json").write_text("[]"),
            "bitune.json is not what it should be: expected an object",
        ),
        (lambda run: change(run / "bitune.json", method=None), "bitune.json lacks method"),
        (lambda run: change(run / "bitune.json", method="bituna"), "has the method 'bituna', expected"),
        (lambda run: change(run / "bitune.json", c="x"), "bitune.json has the c 'x', expected a whole number or a number"),
        (
            lambda run: change(run / "bitune.json", template="x"),
            "has the template 'x', expected",
        ),
        (lambda run: change(run / "adapter_config.json", r=None), "adapter_config.json lacks r"),
        (lambda run: (run / "mixing.safetensors").unlink(), "has no mixing.safetensors"),
        (
            lambda run: save_file({"theta_key": torch.ones(2)}, run / "mixing.safetensors"),
            "missing theta_value (3,); theta_key is (2,), expected (3,)",
        ),
        (
            lambda run: (run / "adapter_model.safetensors").write_bytes(b"x" * 9),
            "adapter_model.safetensors cannot be read",
        ),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(spoil, message, tmp_path, capsys):
    model, run = write_checkpoint(tmp_path / "model"), tmp_path / "run"
    write_files(run, run_bytes(tiny_bitune(), "base", template="paper", step=1))
    spoil(run)
    assert message in exits(2, sample.main, ["--model", model, "--adapter", run, "--prompt", "x"], capsys)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_killed_between_two_renames_loads_as_the_new_one(tmp_path, monkeypatch):
    bitune, replace, calls = tiny_bitune(), os.replace, []
    write_files(tmp_path, run_bytes(bitune, "base", step=1))
    some_of(bitune).data += 1

    def dying(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr("os.replace", dying)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, run_bytes(bitune, "base", step=2))
    monkeypatch.undo()
    loaded, _, about = load_bitune(tiny_model(), tmp_path)
    assert about["step"] == 2 and torch.equal(some_of(loaded), some_of(bitune))


def test_a_first_save_killed_between_two_renames_is_not_overwritten(flags, tmp_path, monkeypatch, capsys):
    replace, run = os.replace, tmp_path / "run"

    def dying(source, target):
        if str(target).endswith("bidirectional/adapter_model.safetensors"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", dying)
    with pytest.raises(SystemExit):
        train.main(flags())
    monkeypatch.undo()
    assert (run / "renaming.json").exists() and not (run / "adapter_config.json").exists()
    capsys.readouterr()
    assert "already holds a run: continue it with --resume" in exits(2, train.main, flags(), capsys)
    train.main(["--resume", str(run)])
    assert len(log(run)) == 6


def test_a_model_that_a_step_has_ruined_is_not_saved(flags, tmp_path, monkeypatch, capsys):
    step = train.train_step

    def ruining(bitune, *args):
        result = step(bitune, *args)
        if len(log(tmp_path / "run")) == 3:
            some_of(bitune).data[1] = float("nan")
        return result

    monkeypatch.setattr(train, "train_step", ruining)
    line = exits(1, train.main, flags(), capsys)
    assert (
        "step 4: the validation loss is nan: start again with a lower --lr. The save of step 3 is whole"
        in line
    )
    assert all(t.isfinite().all() for name, t in files(tmp_path / "run").items() if torch.is_tensor(t))


# ---- going on --------------------------------------------------------------------------------------------


def logits(run, prompts=RAGGED[:2]):
    bitune, _, _, _ = load_run(run)
    with torch.inference_mode():
        return bitune(prompts, ANSWERS[:2])[0]


@pytest.mark.parametrize("method, peft", [("bitune", "lora"), ("causal", "full")])
def test_a_second_stage_starts_where_the_first_ended(method, peft, flags, tmp_path, monkeypatch, capsys):
    train.main(flags("--method", method, "--peft", peft, "--template", "plain"))
    first, second = tmp_path / "run", ["--adapter", tmp_path / "run", "--data", tmp_path / "data.jsonl"]
    common = [*second, "--batch-size", 4, "--eval-every", 3, "--save-every", 2]
    train.main([str(a) for a in [*common, "--out", tmp_path / "still", "--steps", 1, "--lr", 0]])
    assert torch.equal(logits(first), logits(tmp_path / "still"))
    assert log(tmp_path / "still", "val_loss") == [log(first, "val_loss")[-1]] * 2
    about = json.loads((tmp_path / "still/bitune.json").read_text())
    assert (about["method"], about["template"], about["step"]) == (method, "plain", 1)
    assert f"{first}: validation loss" in capsys.readouterr().out

    common += ["--steps", 4, "--lr", 0.01]                  # killed and resumed, it ends in the same bytes
    train.main([str(a) for a in [*common, "--out", tmp_path / "whole"]])
    real, calls = train.train_step, []

    def train_step(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(SystemExit):
        train.main([str(a) for a in [*common, "--out", tmp_path / "killed"]])
    train.main(["--resume", str(tmp_path / "killed")])
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not torch.equal(logits(first), logits(tmp_path / "whole"))


@pytest.mark.parametrize("method", ["anticausal", "shared-weights"])
def test_another_method_that_mixes_goes_on_with_the_mixing(method, flags, tmp_path):
    run, first = tmp_path / "run", tmp_path / "first"
    write_files(first, run_bytes(tiny_bitune("only-causal"), str(tmp_path / "model"), template="paper", step=1))
    train.main(flags("--adapter", first, "--method", method, "--steps", 1, "--lr", 0, "--val-size", 0))
    assert json.loads((run / "bitune.json").read_text())["method"] == method
    before, after = ({n: t.tolist() for n, t in files(f).items() if "mixing" in n} for f in (first, run))
    assert after == before


def test_bitune_starts_from_a_peft_adapter_whose_ranks_differ(flags, tmp_path, capsys):
    model = tiny_model()
    for target, rank in (("q_proj", 2), ("up_proj", 3)):
        add_adapter(model, "answer", "lora", [target], rank=rank, lora_alpha=4.0)
    scatter(model)
    adapter = tmp_path / "adapter"
    write_files(adapter, adapter_bytes(model, "answer", str(tmp_path / "model")))
    argv = flags("--adapter", adapter, "--lr", 0, "--steps", 2)
    train.main(argv[2:])                                    # the adapter names its base
    bitune, _, _, about = load_run(tmp_path / "run")
    given = adapters(model, "answer")
    for path, one in adapters(bitune.model, "answer").items():
        two = adapters(bitune.model, "prompt")[path]
        assert torch.equal(one.lora_A, given[path].lora_A) and torch.equal(one.lora_A, two.lora_A)
    settings = json.loads((tmp_path / "run/settings.json").read_text())["settings"]
    assert (about["method"], settings["peft"]) == ("bitune", "lora")
    assert settings["model"] == str(tmp_path / "model")
    assert settings["rank"] == 3 and {a.made_with["rank"] for a in given.values()} == {2, 3}


def test_what_cannot_go_on_says_why(flags, tmp_path, capsys):
    train.main(flags("--method", "causal"))
    capsys.readouterr()
    run, bad = tmp_path / "run", lambda *argv: exits(2, train.main, argv, capsys)
    line = bad("--resume", run, "--steps", 9)
    assert "each step's learning rate hangs on their number, 6. For another stage" in line
    assert f"--adapter {run} --steps 9" in line
    assert "all of its 6 steps are done" in bad("--resume", run, "--steps", 6)
    assert "all of its 6 steps are done" in bad("--resume", run)
    assert "--rank: adapters and mixing are those of" in bad(*flags("--adapter", run, "--rank", 3))
    other = write_checkpoint(tmp_path / "other", rope_theta=5e5)
    argv = [*flags("--adapter", run, "--model", other), "--out", tmp_path / "new"]
    assert f"{run} was finetuned from {tmp_path / 'model'}, which {other} is not" in bad(*argv)
    assert "nowhere has no adapter_config.json" in bad("--adapter", tmp_path / "nowhere", "--out", "x")


def test_a_folder_in_use_is_left_to_the_process_that_uses_it(flags, tmp_path, capsys):
    run = tmp_path / "run"
    def hold():
        with locked(run):
            (run / "held").touch()
            time.sleep(60)

    other = in_child(hold)
    while not (run / "held").exists():
        time.sleep(0.01)
    assert "run is in use: another process trains there" in exits(2, train.main, flags(), capsys)
    assert not (run / "settings.json").exists()
    (run / "renaming.json").write_text("[]")                # it is about to do this itself
    finish_saves(run)
    assert (run / "renaming.json").exists()
    os.kill(other, signal.SIGKILL)                          # the lock dies with it
    os.waitpid(other, 0)
    train.main(flags())
    assert not (run / "renaming.json").exists()
    with locked(run):                                       # a run that has ended lets go
        pass


# ---- asking ----------------------------------------------------------------------------------------------


def test_a_base_model_goes_on_with_the_text_as_it_stands(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model")
    sample.main(["--model", str(folder), "--prompt", "ab", "--max-new-tokens", "8"])
    ids = Bitune(tiny_model(), "causal").generate([[256, 97, 98]], 8, stop_ids={257})[0]
    text = bytes(i for i in ids if i < 256).decode(errors="replace")
    assert capsys.readouterr().out == text + "\n"


def test_lines_of_standard_input_are_prompts(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    ask = lambda *argv, **more: subprocess.run(
        [sys.executable, os.path.join(ROOT, "sample.py"), "--model", folder, *argv], capture_output=True,
        text=True, **more,
    )
    done = ask("--max-new-tokens", "4", input="ab\n\n" + "x" * 300 + "\ncd\n")
    assert done.returncode == 1 and done.stderr.count("tokens/s; answer") == 2
    assert "error: 302 tokens are more than the model's max_position_embeddings of 256" in done.stderr


def test_stops_limits_and_prompts_of_several_lines(tmp_path, capsys, monkeypatch):
    folder = write_checkpoint(tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [0, 257]}')
    (tmp_path / "prompt.txt").write_bytes("\ufeffab\r\nc\n\nd\r\n".encode())
    asked = []

    def answer(self, prompts, max_new_tokens=256, stop_ids=(), temperature=0.0, top_k=0, top_p=1.0, seed=0):
        asked.append(bytes(prompts[0][1:]).decode())
        yield from ([i] for i in "One, é two. Three".encode()[:max_new_tokens])

    monkeypatch.setattr(Bitune, "answer", answer)
    for argv, said, cut in (
        (["--max-new-tokens", "20"], "One, é two. Three", ""),
        (["--max-new-tokens", "5"], "One, ", "; cut by the limit of 5 tokens]"),
        (["--max-new-tokens", "6"], "One, \ufffd", "; cut by the limit of 6 tokens]"),
        (["--stop", "two", "--stop", "Three"], "One, é ", ""),
        (["--stop", " tw, "], "One, é two. Three", ""),         # begun, and not ended
        (["--stop", "One", "--max-new-tokens", "3"], "", ""),
    ):
        file = tmp_path / "prompt.txt"
        for prompt in (["--prompt", "ab\nc\n\nd"], ["--prompt", "-"]):
            monkeypatch.setattr("sys.stdin", file.open(encoding="utf-8"))
            sample.main([str(a) for a in ["--model", folder, *prompt, *argv]])
            out, err = capsys.readouterr()
            assert out == said + "\n" and asked.pop() == "ab\nc\n\nd"
            assert (err.strip().endswith(cut) if cut else "cut by" not in err), (argv, err)


@pytest.mark.reference          # of today's method
def test_mixing_is_drawn_layer_by_layer(flags, tmp_path, capsys):
    train.main(flags())
    capsys.readouterr()
    sample.main(
        [
            "--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "run"), "--show-mixing",
            "--prompt", "x", "--max-new-tokens", "1",
        ]
    )
    lines = capsys.readouterr().err.splitlines()
    assert "α key" in lines[1] and [l.split()[0] for l in lines[2:5]] == ["0", "1", "2"]
    alpha = alpha_by_layer(load_bitune(tiny_model(), tmp_path / "run")[0], RAGGED[0])
    assert float(lines[3].split()[1]) == pytest.approx(alpha["key"][1], abs=5e-4)


# ---- merge -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("model_type", ["qwen2", "phi"])
def test_a_merged_checkpoint_answers_as_base_and_adapter_do(model_type, peft, flags, tmp_path, capsys):
    write_checkpoint(tmp_path / "model", model_type=model_type, num_key_value_heads=4)
    train.main(flags("--method", "causal", "--peft", peft, "--lr", 0.3))
    argv = ["--model", tmp_path / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "merged"]
    merge.main([str(a) for a in argv])
    merged, _ = load_base(tmp_path / "merged", "cpu", None)
    base, _ = load_base(tmp_path / "model", "cpu", None)
    logits = lambda model: Bitune(model, "causal")(RAGGED, ANSWERS)[0]
    before = logits(base)
    adapted = load_bitune(base, tmp_path / "run")[0](RAGGED, ANSWERS)[0]
    assert (adapted - before).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-4)
    assert "merged exists: choose another name" in exits(2, merge.main, argv, capsys)


def test_a_run_with_prompt_passes_is_not_merged(flags, tmp_path, capsys):
    train.main(flags())
    capsys.readouterr()
    argv = ["--model", tmp_path / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "merged"]
    assert "is of method bitune, whose prompt passes need" in exits(2, merge.main, argv, capsys)
    assert not (tmp_path / "merged").exists()


# ---- full finetuning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["causal", "bitune"])
def test_a_fully_finetuned_run_is_a_checkpoint(method, flags, tmp_path, capsys):
    run = tmp_path / "run"
    change(tmp_path / "model/config.json", torch_dtype="bfloat16")
    train.main(flags("--method", method, "--peft", "full"))
    assert json.loads((run / "config.json").read_text())["torch_dtype"] == "float32"    # as its weights are
    said = capsys.readouterr().out.replace("\n  ", " ")
    bitune, tokenizer, _, _ = load_run(run)
    n = sum(p.numel() for p in bitune.parameters())
    assert f"memory: {16 * n / 1e6:.1f} MB for 0 frozen parameters and {n:,} that train" in said
    sample.main(["--adapter", str(run), "--prompt", "x", "--max-new-tokens", "2"])
    assert f"loaded {run}:" in capsys.readouterr().err

    sample.main(["--model", str(run), "--prompt", "x", "--max-new-tokens", "2"])
    assert f"loaded {run}: " in capsys.readouterr().err  # not its answering half alone
    if method == "bitune":
        line = exits(2, train.main, flags("--model", run, "--out", tmp_path / "next"), capsys)
        assert "is a run with prompt passes, which need more than its checkpoint" in line
    model, _ = load_base(run)  # as any checkpoint: what writes the answers, without its prompt passes
    plain = Bitune(model, "causal")(RAGGED, ANSWERS)[0]
    assert torch.equal(plain, Bitune(bitune.model, "causal")(RAGGED, ANSWERS)[0])
    before = Bitune(load_base(tmp_path / "model")[0], "causal")(RAGGED, ANSWERS)[0]
    assert (plain - before).abs().max() > 0.1


def test_full_finetuning_is_refused_where_it_makes_no_sense(flags, tmp_path, capsys):
    full = flags("--method", "causal", "--peft", "full")
    line = exits(2, train.main, [*full, "--dtype", "bfloat16"], capsys)
    assert "--peft full trains the weights, which takes float32" in line
    line = exits(2, train.main, [*full, "--out", tmp_path / "model"], capsys)
    assert "already holds a run" in line  # and would be written over
    train.main(full)
    capsys.readouterr()
    pair = ["--model", tmp_path / "model", "--adapter", tmp_path / "run"]
    for main, more in ((sample.main, ["--prompt", "x"]), (merge.main, ["--out", tmp_path / "merged"])):
        assert "run is a whole checkpoint, not an adapter of" in exits(2, main, [*pair, *more], capsys)


# ---- which folder is which -------------------------------------------------------------------------------


@pytest.mark.parametrize("method, peft", [("causal", "full"), ("bitune", "lora")])
def test_a_folder_is_the_same_however_it_is_written(method, peft, flags, tmp_path, monkeypatch):
    """With a slash, relative, through a link, and beside another of its name."""
    train.main(flags("--method", method, "--peft", peft, "--steps", 2))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run").symlink_to(tmp_path / "run")
    want = logits(tmp_path / "run")
    for n, way in enumerate(("run/", "./run", "other/../run", "other/run", f"{tmp_path}//run/")):
        assert torch.equal(logits(way), want)
        train.main(["--adapter", way, "--data", "data.jsonl", "--steps", "1", "--lr", "0", "--out", f"next{n}"])
        assert torch.equal(logits(f"next{n}"), want)


def test_scores_on_files_of_one_name_stay_apart(tmp_path, capsys):
    base, rows = write_checkpoint(tmp_path / "base"), []
    for n in range(2):
        (tmp_path / f"{n}").mkdir()
        rows.append(tmp_path / f"{n}/q.jsonl")
        rows[n].write_text(json.dumps({"question": "x", "choices": ["a", "b"], "answer": n}) + "\n")
    for file in (*rows, *rows):                             # the second time, what is there is shown
        evaluate.main(["--model", str(base), "--task", "rows", "--data", str(file), "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*.json"))) == 2


def test_a_merge_says_what_its_dtype_keeps(flags, tmp_path, capsys):
    base = write_checkpoint(tmp_path / "model")
    state = {name: t.bfloat16() for name, t in load_file(base / "model.safetensors").items()}
    train.main(flags("--method", "causal", "--lr", 1e-4))   # too little to move a bfloat16 weight
    save_file(state, base / "model.safetensors")
    argv = ["--adapter", tmp_path / "run", "--out", tmp_path / "merged"]
    line = exits(2, merge.main, argv, capsys)
    assert "more than half of what was learned would be rounded away: give --dtype float32" in line
    merge.main([str(a) for a in [*argv, "--dtype", "float32"]])
    assert "float32 keeps 100.0% of what was learned" in capsys.readouterr().out
