"""The commands of experiments/: grids of finetunings, pictures and controls of runs, computed costs, and the
demonstration, whose short form shows what the long one does."""

import io
import json
import os
import signal
import xml.etree.ElementTree as ElementTree
from itertools import groupby
from pathlib import Path

import pytest
import torch

import sample
import train
from cli.memory import bytes_kept, step_bytes
from cli.settings import DEMO
from edits import ROOT
from experiments import ablate, benchmark, compare, cost, curves, evaluate
from experiments.demo import __main__ as demo, depth, language, pretrain
from experiments.real import alphas
from files import disk
from files.checkpoint import load_model
from files.run import load_run
from pretended import pretended
from test_commands import ASK, at_step, log
from text.examples import Example
from text.tokenizer import Tokenizer
from tiny import ANSWERS, CASES, RAGGED, call, some_of, tiny_bitune, write_checkpoint, write_data

ARC = CASES / "published/arc.jsonl"


def tables(text):
    """The tables of a text: rows of cells, without the line under a head."""
    found = groupby(text.splitlines(), lambda line: line.startswith("|"))
    rows = ([line.split("|")[1:-1] for line in lines] for is_table, lines in found if is_table)
    return [[[cell.strip() for cell in row] for row in table if "--" not in row[1]] for table in rows]


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
    assert tables(compare.table([*best.values()]))[0][1:] == [
        ["A", "1,234", "0.001", "3 ± 0", "1.100 ± 0.141", "55.0 ± 7.1%"],
        ["B", "1,234", "0.01", "3", "0.900", "10.0%"]]
    rows = tables(compare.report(records, ["base"] + 5 * [""], "one that failed"))[0][2:]
    assert [row[2] for row in rows] == ["0.001 (best)", "0.01", "0.1", "0.01 (best)"]


@pytest.fixture
def argv(flags):
    line = flags(*f"--steps 4 --save-every 2 --eval-every 1 --evaluate arc={ARC} --seeds 42 43".split())
    return [part.replace("--lr", "--lrs") for part in line]


def test_a_grid_goes_on_where_it_was_stopped(argv, tmp_path, monkeypatch, exits, says):
    """Stopped in its third run, in step 3; then extended by a method, other questions, and renamed."""
    step, steps, evaluated, scores = train.train_step, [], evaluate.evaluate, []
    counted = lambda *args: steps.append(args[3].keywords["tokens"]) or step(*args)
    monkeypatch.setattr(train, "train_step", counted)
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: scores.append(1) or evaluated(*args))

    def made(*more):
        """How many steps are taken and models scored, and what is said."""
        steps.clear(), scores.clear()
        said = says(ablate, *argv, *more).out
        return len(steps), len(scores), said

    with at_step(2 * 4 + 3):
        line = exits(128 + signal.SIGTERM, ablate, *argv)
    assert "step 3: stopped by SIGTERM. The save of step 3 is whole" in line
    *counts, said = made("--micro-batch-tokens", "90")             # which may change, also of a run begun
    assert counts == [1 + 3 * 4, 4 + 1] and max(steps) <= 90     # and the base model is scored
    head, *rows = tables(said)[0]
    assert [row[0] for row in rows] == ["base model", "LoRA rank 8", "LoRA rank 16", "Bitune"]
    assert head[5:] == ["arc acc", "arc acc_norm"] and rows[0][5].endswith("%")
    assert (tmp_path / "run/tables.md").read_text() in said

    *counts, said = made("--methods", "bitune", "naive-bidir", "--seeds", "42", "42")
    assert counts == [4, 1] and "naive-bidir" in said
    assert made("--limit", "1")[:2] == (0, 7)                   # other questions: only scored again
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    assert made("--limit", "1", "--out", str(tmp_path / "elsewhere"))[:2] == (0, 0)
    os.rename(tmp_path / "elsewhere", tmp_path / "run")
    line = exits(2, ablate, *argv, "--steps", "5", "--template", "plain")
    assert "is there with other settings: template was paper and is plain; steps was 4 and is 5" in line

    report, log = tmp_path / "run/tables.md", tmp_path / "run/bitune-lr0.01-seed42/log.jsonl"
    losses = lambda: [row[4] for row in tables(report.read_text())[0]]
    lines, before = log.read_text().splitlines(keepends=True), losses()
    assert '"step": 4, "val_loss"' in lines[-1]
    log.write_text("".join(lines[:-1]))                         # as if killed in its last validation
    assert made("--limit", "1")[0] == 0 and losses() == before
    assert log.read_text().splitlines(keepends=True)[-1] == lines[-1]

    finished, seen = ablate.finished, set()                     # each run ends by another process just now
    monkeypatch.setattr(ablate, "finished", lambda run: finished(run) if run in seen else seen.add(run))
    assert made("--limit", "1")[0] == 0 and len(seen) == 6

    write_data(tmp_path / "data.jsonl", 41)
    assert "trained on other data" in exits(2, ablate, *argv, "--methods", "bitune", "naive-bidir")


def test_a_run_that_fails_does_not_end_the_grid(argv, monkeypatch, capsys):
    step = train.train_step

    def fails(bitune, optimizer, *args):
        if bitune.method == "bitune" and optimizer.param_groups[0]["peak"] > 0.01:
            raise FloatingPointError("the loss is nan and the gradient norm nan")
        return step(bitune, optimizer, *args)

    monkeypatch.setattr(train, "train_step", fails)
    with pytest.raises(SystemExit, match="1"):
        ablate.main([*argv, "--seeds", "42", "--lrs", "0.01", "0.02", "--steps", "2"])
    said = capsys.readouterr()
    assert "error: 1 of the runs did not come to an end, as said above" in said.err
    assert "the loss is nan" in said.err
    rates = [(row[0], row[2].removesuffix(" (best)")) for row in tables(said.out)[0][2:]]
    plain = [(name, rate) for name in ("LoRA rank 8", "LoRA rank 16") for rate in ("0.01", "0.02")]
    assert rates == [*plain, ("Bitune", "0.01")]


def test_a_grid_without_room_goes_on_when_there_is_some(argv, monkeypatch, says):
    """Every run ends in its first save, which leaves nothing that the same command would trip over."""
    def full(path, data):
        if path.name == "adapter_model.safetensors.part":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1"):
        patch.setattr(disk, "write_through", full)
        ablate.main([*argv, "--seeds", "42"])
    rows = tables(says(ablate, *argv, "--seeds", "42").out)[0]
    assert [row[0] for row in rows[2:]] == ["LoRA rank 8", "LoRA rank 16", "Bitune"]


def test_a_search_leaves_the_other_seeds_to_the_best_rate_and_to_the_baseline_s(argv, tmp_path, monkeypatch):
    """Nothing is trained; losses are what the rate says: low for plain LoRA at 0.01, for Bitune at 0.02."""
    made = []

    def run_one(key, s, tasks, common):
        (name, lr, seed), scores = key, {"arc acc": [0, 1]} if tasks else {}
        made.append((name, lr, seed, bool(tasks)))
        return {"name": name, "lr": lr, "seed": seed, "trainable": 1, "seconds": 1, "scores": scores,
                "run": "", "base": "", "validations": [],
                "val_loss": abs(lr - (0.02 if name == "Bitune" else 0.01))}

    monkeypatch.setattr(ablate, "run_one", run_one)
    ablate.main([*argv, "--lrs", "0.01", "0.02", "0.03", "--search"])
    names = "LoRA rank 8", "LoRA rank 16", "Bitune"
    assert made[:9] == [(name, lr, 42, False) for name in names for lr in (0.01, 0.02, 0.03)]
    assert made[9:] == [(name, lr, seed, True) for name, lrs in zip(names, ([0.01], [0.01], [0.01, 0.02]))
                        for lr in lrs for seed in (42, 43)]
    reached, gaps = tables((tmp_path / "run/tables.md").read_text())
    assert [(row[0], row[2]) for row in reached[2:]] == [("LoRA rank 8", "0.01 (best)"), (
        "LoRA rank 16", "0.01 (best)"), ("Bitune", "0.01"), ("Bitune", "0.02 (best)")]
    assert [row[:2] for row in gaps[1:]] == [[f"Bitune - {name}", f"{own} - 0.01"]
                                             for own in ("0.02", "0.01") for name in names[:2]]


def test_differences_are_paired_on_questions_and_a_small_gap_is_none():
    def group(name, *right):
        return [{"name": name, "lr": 0.01, "seed": 42 + i, "scores": {"acc": [*map(int, r)]}}
                for i, r in enumerate(right)]

    one, other = group("Bitune", "1111000011", "1110000011"), group("LoRA", "1011000001", "1110000001")
    by_seed, mean, error = compare.difference(one, other, "acc")
    assert by_seed == [20, 10] and mean == 15
    variance = ((50 - 15)**2 + (100 - 15)**2 + 8 * 15**2) / 9   # of questions: the mean over seeds of each
    assert abs(error - (variance / 10 + 50 / 2) ** 0.5) < 1e-12
    ((_, *rows),) = tables(compare.gaps([{"Bitune": one, "LoRA": other}] * 2, "Bitune"))
    assert rows == [["Bitune - LoRA", "0.01 - 0.01", "acc", "+20.0 +10.0", f"+15.0 ± {error:.1f}", "none"]]
    sure = compare.gaps([{"Bitune": group("Bitune", "0" * 100), "LoRA": group("LoRA", "01" * 50)}], "Bitune")
    assert tables(sure)[0][1][4:] == ["-50.0 ± 5.0", "LoRA"]


SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.reference          # of today's method
def test_the_log_has_alpha_layer_by_layer_and_sample_and_curves_draw_it(flags, tmp_path, says):
    run, plain, out = tmp_path / "run", tmp_path / "plain", tmp_path / "curves.svg"
    train.main(flags("--lr", 0.5))
    train.main(flags("--method", "causal", "--out", plain))
    by_layer = log(run, "alphas_key")
    assert by_layer[0] == [0.5] * 3 and by_layer[-1] != by_layer[0] and len(by_layer) == 3
    drawn = says(sample, "--adapter", run, "--show-mixing", *ASK).err.splitlines()[2:5]
    assert [float(line.split()[1]) for line in drawn] == pytest.approx(by_layer[-1], abs=5e-4)
    assert says(curves, run, plain, "--out", out).out == f"wrote {out}\n"
    panels = [*ElementTree.parse(out).getroot().iter(f"{SVG}g")]
    of = lambda panel, kind: len([*panel.iter(SVG + kind)])
    assert [(p.find(f"{SVG}text").text, of(p, "polyline"), of(p, "rect")) for p in panels] == [
        *((name, 2, 0) for name in ("training loss", "validation loss", "exact match on validation data")),
        *((f"α of the {part} by layer, run", 0, 3 * 3 + 5) for part in ("keys", "values"))]    # and the key


def test_a_panel_has_a_line_for_the_mean_and_a_band_for_the_seeds():
    line = [(0, [0.0, 1.0]), (10, [0.5, 0.5])]
    root = ElementTree.fromstring(curves.picture([curves.panel("x", {"A": line}, {"A": "#123456"})]))
    top, bottom, left = curves.TOP, curves.TOP + curves.HEIGHT, curves.LEFT
    middle, right = (top + bottom) / 2, left + curves.WIDTH
    mean = root.find(f".//{SVG}polyline").get("points")
    assert mean == f"{left:.1f},{middle:.1f} {right:.1f},{middle:.1f}"
    assert curves.smoothed([(n, n) for n in range(1, 121)])[::59] == [(2, [1.5]), (120, [119.5])]
    band = root.find(f".//{SVG}polygon").get("points").split()
    assert band[0] == f"{left:.1f},{bottom:.1f}" and band[-1] == f"{left:.1f},{top:.1f}"


def test_a_map_s_first_row_is_the_lowest_and_what_is_more_covers_more():
    svg = curves.picture([curves.heat("x", [[0.0, 0.5], [1.0, 2.0]], "ab", [10, 20], "steps")])
    cells = [cell.attrib for cell in ElementTree.fromstring(svg).iter(f"{SVG}rect")][:4]
    assert [cell["fill-opacity"] for cell in cells] == ["0.000", "0.500", "1.000", "1.000"]
    middle = curves.TOP + curves.HEIGHT / 2
    assert [(float(cell["x"]), float(cell["y"])) for cell in cells] == [
        (curves.LEFT, middle), (curves.LEFT + curves.WIDTH / 2, middle),
        (curves.LEFT, curves.TOP), (curves.LEFT + curves.WIDTH / 2, curves.TOP)]


def test_the_best_save_is_kept_beside_the_last(flags, tmp_path, monkeypatch):
    """Its losses are made up: the second of three validations is the lowest."""
    run, validate, made_up = tmp_path / "run", train.validate, iter([9.0, 1.0, 2.0])
    monkeypatch.setattr(train, "validate", lambda *args: validate(*args) | (
        {"loss": next(made_up)} if len(args) > 3 else {}))
    train.main(flags("--keep", "best"))
    (best, _, _, then), (last, _, _, now) = load_run(run / "best"), load_run(run)
    assert (then["step"], now["step"]) == (3, 6) and not torch.equal(some_of(best), some_of(last))
    assert not (run / "best/state.safetensors").exists()
    made_up = iter([0.5, 2.0])                          # the base model's loss is not of the run
    train.main(flags("--keep", "best", "--out", tmp_path / "second", "--steps", 3))
    assert load_run(tmp_path / "second/best")[3]["step"] == 3


@pytest.mark.reference          # of today's method
def test_alphas_are_scaled_from_the_causal_reading_to_the_run_s_own(flags, tmp_path, says):
    train.main(flags("--lr", 0.1))
    losses = log(tmp_path / "run", "val_loss")

    def table(*of):
        said = says(alphas, *of, "--data", tmp_path / "data.jsonl", "--n", 4, "--scales", 1).out
        rows = sum(tables(said), [])
        assert [row[0] for row in rows[-3:]] == ["0", "1", "2"]                 # layers, each alone
        return [[float(cell) for cell in row[1:]] for row in (rows[1], rows[2], *rows[-3:])]

    none, own, *alone = table("--adapter", tmp_path / "run")
    assert own[0] not in sum(alone, []) and len({*sum(alone, [])}) > 1
    assert own[0] == pytest.approx(losses[-1], abs=6e-4) and len({*none}) == 1 and len({*own, *none}) == 4
    none, *_ = table("--model", tmp_path / "model")
    assert none[0] == pytest.approx(losses[0], abs=6e-4)                        # the base's


@pytest.mark.reference          # of today's method
def test_forced_causal_is_alpha_zero_and_a_prompt_may_come_twice(tmp_path, monkeypatch):
    bitune = tiny_bitune()
    with torch.inference_mode():
        want, forced = bitune(RAGGED, ANSWERS)[0], bitune.twin(evaluate.CausalOnly)(RAGGED, ANSWERS)[0]
        assert not torch.allclose(forced, want) and torch.equal(bitune(RAGGED, ANSWERS)[0], want)
        bitune.theta_key.zero_(), bitune.theta_value.zero_()
        torch.testing.assert_close(bitune(RAGGED, ANSWERS)[0], forced)
    model, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    argv = ["--model", model, "--task", "arc", "--data", ARC, "--out", out]

    seen, log_probs = [], evaluate.log_probs
    monkeypatch.setattr(evaluate, "log_probs", lambda b, prompts, choices:
                        seen.append(prompts) or log_probs(b, prompts, choices))
    call(evaluate, *argv)
    call(evaluate, *argv, "--twice")
    assert len([*out.glob("*.json")]) == 2
    once, twice = (bytes(i for i in ids[0] if i < 256).decode() for ids in (seen[0], seen[-1]))
    assert len(twice) > len(once) and twice.count("\n\n") > once.count("\n\n")


SHAPE = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
         "num_hidden_layers": 3, "num_attention_heads": 4}


def test_parameters_are_the_published_models():
    """As their model cards have them."""
    published = {"gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "llama-2-7b": 6_738_415_616,
                 "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3-8b": 8_030_261_248,
                 "phi-2": 2_779_683_840}
    for name, shape in cost.SHAPES.items():
        with torch.device("meta"):
            model = cost.Llama(cost.parse_config(shape))
        assert sum(p.numel() for p in model.parameters()) == published[name]


@pytest.mark.reference          # of today's method
def test_operations_of_a_step_are_those_of_its_tokens():
    """Four a weight and token with a frozen base, forward and backward; in Bitune for each reading."""
    P, A = 40, 24
    n, _, frozen, _, lora = cost.cost(SHAPE, "causal", "lora", {"rank": 2}, P, A)
    _, _, _, _, bitune = cost.cost(SHAPE, "bitune", "lora", {"rank": 2}, P, A)
    layers = n - 2 * 1000 * 256
    assert frozen == 2 * n
    assert abs(lora / (4 * (layers * (P + A - 1) + 1000 * 256 * A)) - 1) < 0.15
    assert 1 < (bitune - lora) / (4 * layers * 2 / 3 * (P - 1)) < 1.6  # the last layer's is but K and V
    _, trained, frozen, _, full = cost.cost(SHAPE, "bitune", "full", {}, P, A)
    assert frozen == 0 and trained == n + 3 * (4 * 256**2 + 3 * 256 * 512) + 6 and full > bitune


def test_what_autograd_keeps_is_counted_once():
    x, w = torch.randn(10, 4), torch.nn.Parameter(torch.randn(4, 4))
    bitune = tiny_bitune()
    bitune.w = w
    y = lambda: (x @ w @ w).exp().sin()  # keeps x, the first product, exp's result (twice); and w
    assert bytes_kept(bitune, y) == 3 * 10 * 4 * 4

    example = Example([5] * 30, [7] * 10)
    with cost.Fused():
        real = step_bytes(bitune, [example])
        assert step_bytes(bitune.to("meta"), [example]) == real > 30 * 32 * 4 * 3  # an activation a layer


def test_what_a_card_does_at_least():
    """Every weight but the embedding's is read once a token, by a prompt's reading in Bitune three times but
    for the last layer, and twice a step with plain LoRA; an operator more a layer is a launch more."""
    P, A, (layer, head) = 40, 24, (4 * 256**2 + 3 * 256 * 512, 1000 * 256)
    lora, bitune = (cost.without_memory(SHAPE, method) for method in ("causal", "bitune"))
    adapters = 4 * sum(p.numel() for p in lora.parameters() if p.requires_grad)
    (_, _, _), (flops, read, launches) = cost.answer_work(lora, P, A)
    assert 0 < read - (2 * (3 * layer + head) + adapters) < 2 * 7 * 256 + 1        # the norms
    assert 0.9 < flops / (2 * (3 * layer + head)) < 1.3
    assert cost.answer_work(bitune, P, A)[1] == (flops, read, launches)


def test_on_a_card_the_benchmark_prints_the_share_that_was_needed(monkeypatch, says):
    """On the pretended card, with times that are told: a millisecond, two for an answer of two tokens."""
    def told(device, repeats, functions):
        for function in functions.values():
            function()
        return {name: 0.002 if name[-1] == 2 else 0.001 for name in functions}

    monkeypatch.setattr(benchmark, "medians", told)
    monkeypatch.setattr(benchmark, "READ", (64, 64))
    monkeypatch.setitem(benchmark.SHAPES, "tiny", SHAPE | {"num_hidden_layers": 1})
    for name, answer in (("get_device_name", "a card"), ("reset_peak_memory_stats", None),
                         ("memory_allocated", 0), ("max_memory_allocated", 10**6)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    line = "--preset tiny --device cuda --batches 1 --prompts 8 --answer 2 --launch 0.5"
    with pretended():
        rows = sum(tables(says(benchmark, *line.split()).out), [])
    assert [row[0] for row in rows] == ["P", "8", "P", *["8"] * 4]
    train, lora = dict(zip(*rows[:2])), dict(zip(*rows[2:4]))
    bare = cost.without_memory(benchmark.SHAPES["tiny"], "causal")
    works = [cost.step_work(bare, [Example([0] * 8, [0] * 2)]), *cost.answer_work(bare, 8, 2)]
    shares = train["lora of card"], lora["first of card"], lora["token of card"]
    assert (lora["what"], *shares) == ("lora", *(f"{launches * 0.5e-3:.2f}" for _, _, launches in works))


BASE = DEMO["model"]


@pytest.mark.parametrize("task", language.TASKS)
def test_the_data_follow_from_the_seed_and_their_splits_are_disjoint(task):
    one, same, other = (language.splits(task, seed, train=300, val=50, test=50) for seed in (0, 0, 1))
    assert one == same and one != other
    prompts = [row["prompt"] for rows in one.values() for row in rows]
    assert len(set(prompts)) == 400
    for prompt, answer in ((r["prompt"], r["completion"]) for r in one["train"]):
        name, said = prompt.split()[-2], answer.removesuffix(".")
        assert f"{said}, says {name}" in prompt or f"{name} says {said}" in prompt


def test_the_data_that_come_with_the_project_are_the_generator_s(tmp_path):
    language.write("behind", tmp_path)
    for name in language.SIZES:
        shipped = DEMO["data"].replace("train", name)
        assert (tmp_path / f"{name}.jsonl").read_text() == open(shipped, encoding="utf-8").read()


def test_the_base_answers_its_own_questions_and_not_the_one_it_has_to_learn():
    scores = pretrain.scores(load_model(BASE), Tokenizer.from_pretrained(BASE), n=60)
    new = scores.pop("behind What")
    assert min(scores.values()) > 0.9 and new < 0.4, (scores, new)


def test_pretraining_follows_from_seed_and_step(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "scores", lambda *_: {})
    for name in ("one", "two"):
        call(pretrain, "--out", tmp_path / name, "--steps", 2)
    one, two = ({f.name: f.read_bytes() for f in sorted((tmp_path / n).iterdir())} for n in ("one", "two"))
    assert one == two
    for name in one.keys() - {"model.safetensors"}:             # as in the base that is shipped
        assert one[name] == Path(BASE, name).read_bytes(), name


def test_half_of_the_way_lies_between_two_validations():
    record = lambda *exact: {
        "scores": {"rows": [1, 0]},
        "validations": [{"step": 20 * i, "val_exact_match": e} for i, e in enumerate(exact)]}
    late, never = record(0.2, 0.4, 0.8, 0.9), record(0.2, 0.4)
    assert depth.half_way(late) == pytest.approx(25) and depth.half_way(never) is None
    assert depth.half_way(record(0.6, 0.7)) == 0
    assert depth.cell([late, never]) == "50.0 ± 0.0% (25, 1 of 2)" and depth.cell([never]) == "50.0%"


@pytest.fixture
def anywhere(tmp_path, monkeypatch):
    """The working directory of a test, from which the demonstration's files are found all the same."""
    for key in ("model", "data", "val_data"):
        monkeypatch.setitem(DEMO, key, str(ROOT / DEMO[key]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.reference          # of today's method
def test_without_arguments_train_learns_what_lora_does_not_and_sample_asks_it(anywhere, monkeypatch, says):
    """The demonstration, cut short."""
    few = open(DEMO["val_data"], encoding="utf-8").readlines()[:40]
    for name in ("val", "test"):
        (anywhere / f"{name}.jsonl").write_text("".join(few), encoding="utf-8")
    monkeypatch.setitem(DEMO, "val_data", str(anywhere / "val.jsonl"))
    for steps, argv in ((46, []), (16, ["--method", "causal"])):
        monkeypatch.setitem(DEMO, "steps", steps), monkeypatch.setitem(DEMO, "eval_every", steps)
        said = says(train, *argv).out
    assert "saved runs/demo-2 after" in said
    learned, plain = (log(anywhere / run, "val_exact_match")[-1] for run in ("runs/demo", "runs/demo-2"))
    assert learned > 0.9 and plain < 0.35

    os.utime("runs/demo/bitune.json")                       # the last run is the one that is asked
    row = json.loads(few[0])
    monkeypatch.setattr("sys.stdin", io.StringIO(row["prompt"] + "\n"))
    said = says(sample)
    assert said.out == f" {row['completion']}\n"
    assert "loaded runs/demo:" in said.err and "Unseen questions:" in said.err


@pytest.mark.reference          # of today's method
def test_the_command_compares_the_models(anywhere, monkeypatch, exits, says):
    monkeypatch.setitem(DEMO, "batch_size", 4)
    monkeypatch.setattr(language, "SIZES", {"train": 40, "val": 5, "test": 5})
    monkeypatch.setattr(demo, "ABLATIONS", [])
    argv = "--all --tasks front --seeds 2 --steps 2 --out runs/all".split()
    said = says(demo, *argv).out
    (_, *rows), *_ = tables(said)
    assert [name for name, *_ in rows] == ["one of the sayings", "LoRA rank 8", "LoRA rank 16", "Bitune"]
    assert "±" in "".join(rows[1]) and "the truth" in said and "α key" in said
    svg = (anywhere / "runs/all/front/curves.svg").read_text()
    assert svg.count("<polyline") == 3 and svg.rstrip().endswith("</svg>")
    assert " and is 5" in exits(2, demo, *argv, "--steps", "5")
