"""What is shown of runs: pictures, the best save, and controls of a score."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch

import sample
import train
from experiments import curves, evaluate
from experiments.real import alphas
from files.run import load_run
from test_commands import ASK, call, exits, log
from test_evaluate import PUBLISHED, write_rows
from tiny import ANSWERS, RAGGED, some_of, tiny_bitune, write_checkpoint

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.reference          # of today's method
def test_the_log_has_alpha_layer_by_layer_and_sample_and_curves_draw_it(flags, tmp_path, capsys):
    run, plain, out = tmp_path / "run", tmp_path / "plain", tmp_path / "curves.svg"
    train.main(flags("--lr", 0.5))
    train.main(flags("--method", "causal", "--out", plain))
    by_layer = log(run, "alphas_key")
    assert by_layer[0] == [0.5] * 3 and by_layer[-1] != by_layer[0] and len(by_layer) == 3
    capsys.readouterr()
    call(sample, "--adapter", run, "--show-mixing", *ASK)
    drawn = [line.split() for line in capsys.readouterr().err.splitlines()[2:5]]
    assert [float(key) for _, key, *_ in drawn] == pytest.approx(by_layer[-1], abs=5e-4)
    call(curves, run, plain, "--out", out)
    assert capsys.readouterr().out == f"wrote {out}\n"
    panels = [*ElementTree.parse(out).getroot().iter(f"{SVG}g")]
    of = lambda panel, kind: len([*panel.iter(SVG + kind)])
    assert [(panel.find(f"{SVG}text").text, of(panel, "polyline"), of(panel, "rect")) for panel in panels] == [
        ("training loss", 2, 0), ("validation loss", 2, 0), ("exact match on validation data", 2, 0),  # a run each
        ("α of the keys by layer, run", 0, 3 * 3 + 5),          # layers by validations, and the key
        ("α of the values by layer, run", 0, 3 * 3 + 5)]
    assert f"no step is logged in {tmp_path.name}" in exits(2, curves.main, [tmp_path], capsys)


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
def test_alphas_are_scaled_from_the_causal_reading_to_the_run_s_own(flags, tmp_path, capsys):
    train.main(flags("--lr", 0.1))
    losses = log(tmp_path / "run", "val_loss")

    def table(*of):
        capsys.readouterr()
        call(alphas, *of, "--data", tmp_path / "data.jsonl", "--n", 4, "--scales", 1)
        rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
        assert [row[0].strip() for row in rows[-3:]] == ["0", "1", "2"]         # layers, each alone
        return [[float(cell) for cell in row[1:]] for row in (rows[2], rows[3], *rows[-3:])]

    none, own, *alone = table("--adapter", tmp_path / "run")
    assert own[0] not in sum(alone, []) and len({*sum(alone, [])}) > 1
    assert own[0] == pytest.approx(losses[-1], abs=6e-4) and len({*none}) == 1 and len({*own, *none}) == 4
    none, *_ = table("--model", tmp_path / "model")
    assert none[0] == pytest.approx(losses[0], abs=6e-4)                        # the base's


@pytest.mark.reference          # of today's method
def test_forced_causal_is_alpha_zero_and_a_prompt_may_come_twice(tmp_path, capsys, monkeypatch):
    bitune = tiny_bitune()
    with torch.inference_mode():
        want, forced = bitune(RAGGED, ANSWERS)[0], bitune.twin(evaluate.CausalOnly)(RAGGED, ANSWERS)[0]
        assert not torch.allclose(forced, want) and torch.equal(bitune(RAGGED, ANSWERS)[0], want)
        bitune.theta_key.zero_(), bitune.theta_value.zero_()
        torch.testing.assert_close(bitune(RAGGED, ANSWERS)[0], forced)
    model, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    arc = write_rows(tmp_path / "arc.jsonl", PUBLISHED["arc"][0])
    argv = ["--model", model, "--task", "arc", "--data", arc, "--out", out]
    line = exits(2, evaluate.main, [*argv, "--forced-causal"], capsys)
    assert "method causal mixes nothing: there is no α to set to 0" in line
    seen, log_probs = [], evaluate.log_probs
    monkeypatch.setattr(evaluate, "log_probs", lambda b, prompts, choices:
                        seen.append(prompts) or log_probs(b, prompts, choices))
    call(evaluate, *argv)
    call(evaluate, *argv, "--twice")
    assert len([*out.glob("*.json")]) == 2
    once, twice = (bytes(i for i in ids[0] if i < 256).decode() for ids in (seen[0], seen[-1]))
    assert len(twice) > len(once) and twice.count("\n\n") > once.count("\n\n")
