"""The demonstration: its base, its data, and that its short form shows what the long one does."""

import io
import json
import os
from pathlib import Path

import pytest

import sample
import train
from cli.settings import DEMO
from edits import ROOT
from experiments.demo import __main__ as demo
from experiments.demo import depth, language, pretrain
from files.checkpoint import load_model
from test_commands import call, exits, log
from text.examples import encode_prompt
from text.tokenizer import Tokenizer

BASE = DEMO["model"]


@pytest.fixture
def tokenizer():
    return Tokenizer.from_pretrained(BASE)


def test_the_language_is_one_token_a_word(tokenizer):
    row = language.splits("behind", test=1)["test"][0]
    ids = encode_prompt(tokenizer, "paper", [("user", row["prompt"])])
    pieces = [tokenizer.decode([i]) for i in ids]
    assert pieces[:3] == ["<s>", "Question", ":"] and pieces[-3:] == ["?\n\n", "Answer", ":"]
    assert all(p[0] == " " or p in ",;:." for p in pieces[2:-3])
    assert tokenizer.decode(ids) == f"<s>Question: {row['prompt']}\n\nAnswer:"


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


def test_the_base_answers_its_own_questions_and_not_the_one_it_has_to_learn(tokenizer):
    scores = pretrain.scores(load_model(BASE), tokenizer, n=60)
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
def test_without_arguments_train_learns_what_lora_does_not_and_sample_asks_it(anywhere, monkeypatch, capsys):
    """The demonstration, cut short."""
    few = open(DEMO["val_data"], encoding="utf-8").readlines()[:40]
    for name in ("val", "test"):
        (anywhere / f"{name}.jsonl").write_text("".join(few), encoding="utf-8")
    monkeypatch.setitem(DEMO, "val_data", str(anywhere / "val.jsonl"))
    for steps, argv in ((46, []), (16, ["--method", "causal"])):
        monkeypatch.setitem(DEMO, "steps", steps), monkeypatch.setitem(DEMO, "eval_every", steps)
        train.main(argv)
    assert "saved runs/demo-2 after" in capsys.readouterr().out
    learned, plain = (log(anywhere / run, "val_exact_match")[-1] for run in ("runs/demo", "runs/demo-2"))
    assert learned > 0.9 and plain < 0.35

    os.utime("runs/demo/bitune.json")                       # the last run is the one that is asked
    row = json.loads(few[0])
    monkeypatch.setattr("sys.stdin", io.StringIO(row["prompt"] + "\n"))
    sample.main([])
    said = capsys.readouterr()
    assert said.out == f" {row['completion']}\n"
    assert "loaded runs/demo:" in said.err and "Unseen questions:" in said.err


@pytest.mark.reference          # of today's method
def test_the_command_compares_the_models(anywhere, monkeypatch, capsys):
    monkeypatch.setitem(DEMO, "batch_size", 4)
    monkeypatch.setattr(language, "SIZES", {"train": 40, "val": 5, "test": 5})
    monkeypatch.setattr(demo, "ABLATIONS", [])
    argv = "--all --tasks front --seeds 2 --steps 2 --out runs/all".split()
    demo.main(argv)
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    names = [row.split("|")[1].strip() for row in rows]
    assert names[2:] == ["one of the sayings", "LoRA rank 8", "LoRA rank 16", "Bitune"]
    assert "±" in rows[3] and "the truth" in said and "α key" in said
    svg = (anywhere / "runs/all/front/curves.svg").read_text()
    assert svg.count("<polyline") == 3 and svg.rstrip().endswith("</svg>")
    assert " and is 5" in exits(2, demo.main, [*argv, "--steps", "5"], capsys)
