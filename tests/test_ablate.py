"""Grids of finetunings: what they are made of, that nothing is made twice, and what the tables say."""

import itertools
import os
import signal

import pytest

import train
from experiments import ablate, compare, evaluate
from test_commands import exits
from test_evaluate import PUBLISHED, write_rows
from tiny import write_checkpoint, write_data


def test_a_grid_varies_only_what_a_method_uses():
    kinds = ["lora", "dora", "ia3", "full"]
    models = ablate.variants(["bitune", "naive-bidir", "only-causal"], kinds, [0.1, 0.01], {"rank": 4})
    plain = {name: own for name, own in models.items() if own["method"] == "causal"}
    ranked = [f"{kind} rank {rank}" for kind in ("LoRA", "DoRA") for rank in (4, 8)]
    assert list(plain) == [*ranked, "IA3", "full finetuning"]
    assert plain["DoRA rank 8"] == {"method": "causal", "peft": "dora", "rank": 8, "lora_alpha": 2}
    assert sum(own["method"] == "bitune" for own in models.values()) == 4 * 2
    assert sum(own["method"] == "naive-bidir" for own in models.values()) == 4  # mixes nothing
    assert "Bitune, DoRA, c 0.1" in models and len(models) == 6 + 8 + 4 + 8
    assert ablate.variants(["bitune"])["Bitune"] == models["Bitune"]  # and a name stays as the grid grows
    assert list(ablate.variants(["bitune"])) == ["LoRA rank 8", "LoRA rank 16", "Bitune"]


def test_the_rate_is_chosen_on_validation_and_spreads_are_over_seeds():
    def record(name, lr, seed, loss, acc):
        return {
            "name": name, "lr": lr, "seed": seed, "val_loss": loss, "scores": {"acc": [acc]},
            "trainable": 1234, "seconds": 3.0,
        }

    records = [
        record("A", 1e-3, 42, 1.0, 0.5),
        record("A", 1e-3, 43, 1.2, 0.6),
        record("A", 1e-2, 42, 0.9, 0.9),
        record("A", 1e-2, 43, 1.5, 0.9),  # better scores, but the worse loss
        record("A", 1e-1, 42, 0.1, 0.9),  # the other seed failed
        record("B", 1e-2, 42, 0.9, 0.1),
    ]
    best = compare.chosen(records)
    assert [(r["lr"], r["seed"]) for r in best["A"]] == [(1e-3, 42), (1e-3, 43)]
    lines = compare.table([*best.values()]).splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
    assert rows[2] == ["A", "1,234", "0.001", "3 ± 0", "1.100 ± 0.141", "55.0 ± 7.1%"]
    assert rows[3] == ["B", "1,234", "0.01", "3", "0.900", "10.0%"]


@pytest.fixture
def argv(tmp_path):
    model, data = write_checkpoint(tmp_path / "model"), write_data(tmp_path / "data.jsonl")
    arc = write_rows(tmp_path / "arc.jsonl", PUBLISHED["arc"][0])
    line = f"--model {model} --data {data} --steps 4 --save-every 2 --batch-size 2 --evaluate arc={arc} " \
           f"--seeds 42 43 --lrs 0.01 --out {tmp_path / 'grid'}"
    return line.split()


def first_table(text):
    """The lines of the first table that is in a text."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| "))
    return list(itertools.takewhile(lambda line: line.startswith("| "), lines[begin:]))


def test_a_grid_goes_on_where_it_was_stopped(argv, tmp_path, monkeypatch, capsys):
    """Stopped in its third run, in step 3; then extended by a method, other questions, and renamed."""
    step, steps, evaluated, scores = train.train_step, [], evaluate.evaluate, []

    def counted(*args):
        steps.append(1)
        if stop and len(steps) == 2 * 4 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(train, "train_step", counted)
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: scores.append(1) or evaluated(*args))
    stop = True
    line = exits(128 + signal.SIGTERM, ablate.main, argv, capsys)
    assert "step 3: stopped by SIGTERM. The save of step 3 is whole" in line
    stop = False
    steps.clear()
    ablate.main(argv)
    assert len(steps) == 1 + 3 * 4 and len(scores) == 6 + 1  # and the base model
    said = capsys.readouterr().out
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in first_table(said)]
    names = ["LoRA rank 8", "LoRA rank 16", "Bitune"]
    assert [row[0] for row in rows] == ["", "-" * 12, "base model", *names]
    assert rows[0][5:] == ["arc acc", "arc acc_norm"] and rows[2][5].endswith("%")
    assert (tmp_path / "grid/tables.md").read_text() in said

    steps.clear()
    ablate.main([*argv, "--methods", "bitune", "naive-bidir", "--seeds", "42", "42"])
    assert len(steps) == 4 and len(scores) == 7 + 1 and "naive-bidir" in capsys.readouterr().out
    ablate.main([*argv, "--limit", "1"])  # other questions: scored again, not made again
    assert len(steps) == 4 and len(scores) == 8 + 7
    os.rename(tmp_path / "grid", tmp_path / "elsewhere")
    ablate.main([*argv, "--limit", "1", "--out", str(tmp_path / "elsewhere")])
    assert len(steps) == 4 and len(scores) == 8 + 7
    os.rename(tmp_path / "elsewhere", tmp_path / "grid")
    line = exits(2, ablate.main, [*argv, "--steps", "5"], capsys)
    assert "is there with other settings: steps was 4 and is 5" in line


def test_a_run_killed_in_its_last_validation_is_validated_before_it_is_scored(argv, tmp_path):
    argv = [*argv, "--seeds", "42"]
    ablate.main(argv)
    tables = tmp_path / "grid/tables.md"
    table, log = tables.read_text(), tmp_path / "grid/bitune-lr0.01-seed42/log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert '"step": 4, "val_loss"' in lines[-1]
    log.write_text("".join(lines[:-1]))
    ablate.main(argv)
    before, after = ([row.split("|")[5] for row in first_table(t)] for t in (table, tables.read_text()))
    assert after == before
    assert log.read_text().splitlines(keepends=True)[-1] == lines[-1]


def test_a_run_goes_on_with_the_flags_that_may_change(argv, tmp_path, monkeypatch):
    step, sizes = train.train_step, []

    def counted(bitune, optimizer, examples, cut, *args):
        sizes.append(cut.keywords["tokens"])
        if len(sizes) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(bitune, optimizer, examples, cut, *args)

    monkeypatch.setattr(train, "train_step", counted)
    with pytest.raises(SystemExit):
        ablate.main(argv)
    ablate.main([*argv, "--seeds", "42", "--micro-batch-tokens", "90"])
    assert len({*sizes[:3]}) == 1 and {*sizes[3:]} != {sizes[0]} and len(sizes) == 3 + 1 + 2 * 4


def test_a_run_that_fails_does_not_end_the_grid(argv, tmp_path, monkeypatch, capsys):
    step = train.train_step

    def fails(bitune, optimizer, *args):
        if bitune.method == "bitune" and optimizer.param_groups[0]["peak"] > 0.01:
            raise FloatingPointError("the loss is nan and the gradient norm nan")
        return step(bitune, optimizer, *args)

    monkeypatch.setattr(train, "train_step", fails)
    with pytest.raises(SystemExit) as end:
        ablate.main([*argv, "--seeds", "42", "--lrs", "0.01", "0.02"])
    said = capsys.readouterr()
    assert end.value.code == 1 and "error: 1 of the runs did not come to an end, as said above" in said.err
    assert "the loss is nan" in said.err
    bitune = [line for line in said.out.splitlines() if line.startswith("| Bitune  ")]
    assert len(bitune) == 2 and all("| 0.01 " in line for line in bitune)  # at its best, and at each rate
    assert "At each learning rate:" in said.out and said.out.count("| LoRA rank 16") == 4


def test_a_search_leaves_the_other_seeds_to_the_best_rate_and_to_the_baseline_s(argv, tmp_path, monkeypatch):
    """Nothing is trained; losses are what the rate says: low for plain finetuning at 0.01, for Bitune at
    0.02."""
    made = []

    def run_one(key, s, tasks, common):
        (name, lr, seed), scores = key, {"arc acc": [0, 1]} if tasks else {}
        made.append((name, lr, seed, bool(tasks)))
        return {"name": name, "lr": lr, "seed": seed, "trainable": 1, "seconds": 1, "scores": scores,
                "val_loss": abs(lr - (0.02 if name == "Bitune" else 0.01)), "validations": []}

    monkeypatch.setattr(ablate, "run_one", run_one)
    ablate.main([*argv, "--lrs", "0.01", "0.02", "0.03", "--search"])
    names = "LoRA rank 8", "LoRA rank 16", "Bitune"
    assert made[:9] == [(name, lr, 42, False) for name in names for lr in (0.01, 0.02, 0.03)]
    assert made[9:] == [(name, lr, seed, True) for name, lrs in zip(names, ([0.01], [0.01], [0.01, 0.02]))
                        for lr in lrs for seed in (42, 43)]
    text = (tmp_path / "grid/tables.md").read_text()
    heads = "Each at its own best", "All at 0.01, which is best for LoRA rank 8:", "At each learning rate:"
    assert [*map(text.index, heads)] == sorted(map(text.index, heads))
    assert text.count("| Bitune - LoRA rank 8 ") == 2           # two protocols


def test_differences_are_paired_on_questions_and_a_small_gap_is_none():
    def group(name, *right):
        return [{"name": name, "seed": 42 + i, "scores": {"acc": [*map(int, r)]}}
                for i, r in enumerate(right)]

    one, other = group("Bitune", "1111000011", "1110000011"), group("LoRA", "1011000001", "1110000001")
    by_seed, mean, error = compare.difference(one, other, "acc")
    assert by_seed == [20, 10] and mean == 15
    gains = [0, 50, 0, 0, 0, 0, 0, 0, 100, 0]                   # of each question, the mean over seeds
    variance = sum((g - 15) ** 2 for g in gains) / 9
    assert abs(error - (variance / 10 + 50 / 2) ** 0.5) < 1e-12
    lines = compare.gaps({"Bitune": one, "LoRA": other}, "Bitune")
    assert [c.strip() for c in lines.splitlines()[2].split("|")[1:-1]] == [
        "Bitune - LoRA", "acc", "+20.0 +10.0", f"+15.0 ± {error:.1f}", "none"]
    sure = compare.gaps({"Bitune": group("Bitune", "0" * 100), "LoRA": group("LoRA", "01" * 50)},
                               "Bitune")
    assert "-50.0 ± 5.0" in sure and sure.splitlines()[2].split("|")[5].strip() == "LoRA"


def test_wrong_input_to_ablate_is_one_line_and_exit_status_2(argv, tmp_path, capsys):
    bad = lambda *more: exits(2, ablate.main, [*argv, *more], capsys)
    assert "unrecognized arguments: --method causal --lr 1" in bad("--method", "causal", "--lr", "1")
    assert "--evaluate arc=: expected TASK=FILE" in bad("--evaluate", "arc")
    assert "a row of piqa has 'goal'" in bad("--evaluate", f"piqa={tmp_path / 'arc.jsonl'}")
    assert "invalid choice: 'causal'" in bad("--methods", "causal")
    assert "nowhere has no tokenizer.json" in bad("--model", "nowhere")
    assert "no validation data to choose by" in bad("--val-size", "0", "--lrs", "1", "2")
    assert "--model not given" in exits(2, ablate.main, ["--out", "x", "--data", "y"], capsys)
    (tmp_path / "hard").mkdir()
    hard = write_rows(tmp_path / "hard/arc.jsonl", PUBLISHED["arc"][0])
    same = ["--evaluate", f"arc={hard}", f"arc={tmp_path / 'arc.jsonl'}"]
    assert "two files would both be called 'arc'" in bad(*same)
    assert not (tmp_path / "grid").exists()
