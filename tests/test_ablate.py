"""Grids of finetunings: what they are made of, that nothing is made twice, and what the tables say."""

import os
import signal
from itertools import dropwhile, takewhile

import pytest

import train
from experiments import ablate, compare, evaluate
from test_commands import at_step, exits, stop
from test_evaluate import PUBLISHED, write_rows
from tiny import write_data


def cells(text):
    """The first table that is in a text: its rows of cells, without the line under its head."""
    lines = dropwhile(lambda line: not line.startswith("| "), text.splitlines())
    rows = [line.split("|")[1:-1] for line in takewhile(lambda line: line.startswith("|"), lines)]
    return [[cell.strip() for cell in row] for row in rows if "--" not in row[1]]


def test_a_grid_varies_only_what_a_method_uses():
    kinds = ["lora", "dora", "ia3", "full"]
    models = ablate.variants(["bitune", "naive-bidir", "only-causal"], kinds, [0.1, 0.01], {"rank": 4})
    of = lambda method: [name for name, own in models.items() if own["method"] == method]
    ranked = [f"{kind} rank {rank}" for kind in ("LoRA", "DoRA") for rank in (4, 8)]
    assert of("causal") == [*ranked, "IA3", "full finetuning"]
    assert models["DoRA rank 8"] == {"method": "causal", "peft": "dora", "rank": 8, "lora_alpha": 2}
    assert len(of("bitune")) == 4 * 2 and len(of("naive-bidir")) == 4       # which mixes nothing
    assert "Bitune, DoRA, c 0.1" in models and len(models) == 6 + 8 + 4 + 8
    assert ablate.variants(["bitune"])["Bitune"] == models["Bitune"]    # a name stays as the grid grows
    assert list(ablate.variants(["bitune"])) == ["LoRA rank 8", "LoRA rank 16", "Bitune"]


def test_the_rate_is_chosen_on_validation_and_spreads_are_over_seeds():
    records = [{"name": name, "lr": lr, "seed": seed, "val_loss": loss, "scores": {"acc": [acc]},
                "trainable": 1234, "seconds": 3.0} for name, lr, seed, loss, acc in (
        ("A", 1e-3, 42, 1.0, 0.5), ("A", 1e-3, 43, 1.2, 0.6),
        ("A", 1e-2, 42, 0.9, 0.9), ("A", 1e-2, 43, 1.5, 0.9),       # better scores, but the worse loss
        ("A", 1e-1, 42, 0.1, 0.9),                                  # the other seed failed
        ("B", 1e-2, 42, 0.9, 0.1))]
    best = compare.chosen(records)
    assert [(r["lr"], r["seed"]) for r in best["A"]] == [(1e-3, 42), (1e-3, 43)]
    assert cells(compare.table([*best.values()]))[1:] == [
        ["A", "1,234", "0.001", "3 ± 0", "1.100 ± 0.141", "55.0 ± 7.1%"],
        ["B", "1,234", "0.01", "3", "0.900", "10.0%"]]
    rows = cells(compare.report(records, ["base"] + 5 * [""], "one that failed"))[2:]
    assert [row[2] for row in rows] == ["0.001 (best)", "0.01", "0.1", "0.01 (best)"]


@pytest.fixture
def argv(flags, tmp_path):
    arc = write_rows(tmp_path / "arc.jsonl", PUBLISHED["arc"][0])
    line = flags(*f"--steps 4 --save-every 2 --eval-every 1 --evaluate arc={arc} --seeds 42 43".split())
    return [part.replace("--lr", "--lrs") for part in line]


def test_a_grid_goes_on_where_it_was_stopped(argv, tmp_path, monkeypatch, capsys):
    """Stopped in its third run, in step 3; then extended by a method, other questions, and renamed."""
    step, steps, evaluated, scores = train.train_step, [], evaluate.evaluate, []
    counted = lambda *args: steps.append(args[3].keywords["tokens"]) or step(*args)
    monkeypatch.setattr(train, "train_step", at_step(counted, 2 * 4 + 3, stop))
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: scores.append(1) or evaluated(*args))

    def made(*more):
        """How many steps are taken and models scored, and what is said."""
        steps.clear(), scores.clear(), capsys.readouterr()
        ablate.main([*argv, *more])
        return len(steps), len(scores), capsys.readouterr().out

    line = exits(128 + signal.SIGTERM, ablate.main, argv, capsys)
    assert "step 3: stopped by SIGTERM. The save of step 3 is whole" in line
    *counts, said = made("--micro-batch-tokens", "90")             # which may change, also of a run begun
    assert counts == [1 + 3 * 4, 4 + 1] and max(steps) <= 90     # and the base model is scored
    head, *rows = cells(said)
    assert [row[0] for row in rows] == ["base model", "LoRA rank 8", "LoRA rank 16", "Bitune"]
    assert head[5:] == ["arc acc", "arc acc_norm"] and rows[0][5].endswith("%")
    assert (tmp_path / "run/tables.md").read_text() in said

    *counts, said = made("--methods", "bitune", "naive-bidir", "--seeds", "42", "42")
    assert counts == [4, 1] and "naive-bidir" in said
    assert made("--limit", "1")[:2] == (0, 7)                   # other questions: only scored again
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    assert made("--limit", "1", "--out", str(tmp_path / "elsewhere"))[:2] == (0, 0)
    os.rename(tmp_path / "elsewhere", tmp_path / "run")
    line = exits(2, ablate.main, [*argv, "--steps", "5", "--template", "plain"], capsys)
    assert "is there with other settings: template was paper and is plain; steps was 4 and is 5" in line

    tables, log = tmp_path / "run/tables.md", tmp_path / "run/bitune-lr0.01-seed42/log.jsonl"
    lines, before = log.read_text().splitlines(keepends=True), cells(tables.read_text())
    assert '"step": 4, "val_loss"' in lines[-1]
    log.write_text("".join(lines[:-1]))                         # as if killed in its last validation
    assert made("--limit", "1")[0] == 0
    assert [row[4] for row in cells(tables.read_text())] == [row[4] for row in before]
    assert log.read_text().splitlines(keepends=True)[-1] == lines[-1]

    finished, seen = ablate.finished, set()                     # each run ends by another process just now
    monkeypatch.setattr(ablate, "finished", lambda run: finished(run) if run in seen else seen.add(run))
    assert made("--limit", "1")[0] == 0 and len(seen) == 6

    write_data(tmp_path / "data.jsonl", 41)
    line = exits(2, ablate.main, [*argv, "--methods", "bitune", "naive-bidir"], capsys)
    assert "trained on other data than these: " in line


def test_a_run_that_fails_does_not_end_the_grid(argv, monkeypatch, capsys):
    step = train.train_step

    def fails(bitune, optimizer, *args):
        if bitune.method == "bitune" and optimizer.param_groups[0]["peak"] > 0.01:
            raise FloatingPointError("the loss is nan and the gradient norm nan")
        return step(bitune, optimizer, *args)

    monkeypatch.setattr(train, "train_step", fails)
    with pytest.raises(SystemExit) as end:
        ablate.main([*argv, "--seeds", "42", "--lrs", "0.01", "0.02", "--steps", "2"])
    said = capsys.readouterr()
    assert end.value.code == 1 and "error: 1 of the runs did not come to an end, as said above" in said.err
    assert "the loss is nan" in said.err
    rates = [(row[0], row[2].removesuffix(" (best)")) for row in cells(said.out)[2:]]
    plain = [(name, rate) for name in ("LoRA rank 8", "LoRA rank 16") for rate in ("0.01", "0.02")]
    assert rates == [*plain, ("Bitune", "0.01")]


def test_a_search_leaves_the_other_seeds_to_the_best_rate_and_to_the_baseline_s(argv, tmp_path, monkeypatch):
    """Nothing is trained; losses are what the rate says: low for plain LoRA at 0.01, for Bitune at 0.02."""
    made = []

    def run_one(key, s, tasks, common):
        (name, lr, seed), scores = key, {"arc acc": [0, 1]} if tasks else {}
        made.append((name, lr, seed, bool(tasks)))
        return {"name": name, "lr": lr, "seed": seed, "trainable": 1, "seconds": 1, "scores": scores,
                "run": "", "base": "",
                "val_loss": abs(lr - (0.02 if name == "Bitune" else 0.01)), "validations": []}

    monkeypatch.setattr(ablate, "run_one", run_one)
    ablate.main([*argv, "--lrs", "0.01", "0.02", "0.03", "--search"])
    names = "LoRA rank 8", "LoRA rank 16", "Bitune"
    assert made[:9] == [(name, lr, 42, False) for name in names for lr in (0.01, 0.02, 0.03)]
    assert made[9:] == [(name, lr, seed, True) for name, lrs in zip(names, ([0.01], [0.01], [0.01, 0.02]))
                        for lr in lrs for seed in (42, 43)]
    reached, gaps = map(cells, (tmp_path / "run/tables.md").read_text().split("\n\n"))
    assert [(row[0], row[2]) for row in reached[2:]] == [
        ("LoRA rank 8", "0.01 (best)"), ("LoRA rank 16", "0.01 (best)"),
        ("Bitune", "0.01"), ("Bitune", "0.02 (best)")]
    assert [row[:2] for row in gaps[1:]] == [[f"Bitune - {name}", f"{own} - 0.01"]
                                             for own in ("0.02", "0.01") for name in names[:2]]


def test_differences_are_paired_on_questions_and_a_small_gap_is_none():
    def group(name, *right):
        return [{"name": name, "lr": 0.01, "seed": 42 + i, "scores": {"acc": [*map(int, r)]}}
                for i, r in enumerate(right)]

    one, other = group("Bitune", "1111000011", "1110000011"), group("LoRA", "1011000001", "1110000001")
    by_seed, mean, error = compare.difference(one, other, "acc")
    assert by_seed == [20, 10] and mean == 15
    gains = [0, 50, 0, 0, 0, 0, 0, 0, 100, 0]                   # of each question, the mean over seeds
    variance = sum((g - 15) ** 2 for g in gains) / 9
    assert abs(error - (variance / 10 + 50 / 2) ** 0.5) < 1e-12
    _, *rows = cells(compare.gaps([{"Bitune": one, "LoRA": other}] * 2, "Bitune"))
    assert rows == [["Bitune - LoRA", "0.01 - 0.01", "acc", "+20.0 +10.0", f"+15.0 ± {error:.1f}", "none"]]
    sure = compare.gaps([{"Bitune": group("Bitune", "0" * 100), "LoRA": group("LoRA", "01" * 50)}], "Bitune")
    assert cells(sure)[1][4:] == ["-50.0 ± 5.0", "LoRA"]


def test_wrong_input_to_ablate_is_one_line_and_exit_status_2(argv, tmp_path, capsys):
    bad = lambda *more: exits(2, ablate.main, [*argv, *more], capsys)
    assert "unrecognized arguments: --method causal --lr 1" in bad("--method", "causal", "--lr", "1")
    assert "--evaluate arc=: expected TASK=FILE" in bad("--evaluate", "arc")
    assert "a row of piqa has 'goal'" in bad("--evaluate", f"piqa={tmp_path / 'arc.jsonl'}")
    assert "invalid choice: 'causal'" in bad("--methods", "causal")
    assert "nowhere is no folder here" in bad("--model", "nowhere")
    assert "no validation data to choose by" in bad("--val-size", "0", "--lrs", "1", "2")
    assert "--model not given" in exits(2, ablate.main, ["--out", "x", "--data", "y"], capsys)
    (tmp_path / "hard").mkdir()
    hard = write_rows(tmp_path / "hard/arc.jsonl", PUBLISHED["arc"][0])
    same = bad("--evaluate", f"arc={hard}", f"arc={tmp_path / 'arc.jsonl'}")
    assert "two files would both be called 'arc'" in same
    assert not (tmp_path / "run").exists()
