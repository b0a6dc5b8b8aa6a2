"""The published files of the paper's tasks, and the scores on them."""

import json

from pathlib import Path

import pytest
import torch

from bitune import METHODS, Bitune
from experiments import evaluate
from text.examples import load_examples
from text.rows import read_rows
from tiny import ANSWERS, CASES, RAGGED, call, tiny_bitune, write_checkpoint, write_rows, write_run

ARC = {"text": ["red", "blue"], "label": ["A", "B"]}
SIQA = {"context": "Jo ran.", "question": "Why?", "answerA": "late", "answerB": "fun", "answerC": "fear"}
EXPECTED = json.loads((CASES / "expected.json").read_text(encoding="utf-8"))["published"]


@pytest.mark.parametrize("task", EXPECTED)
def test_published_rows_make_the_paper_s_prompts(task, tokenizer):
    """Evaluation asks as training does."""
    file, (prompt, answer) = CASES / f"published/{task}.jsonl", EXPECTED[task]
    examples, _ = load_examples(file, tokenizer, "paper", 512, task)
    questions, left_out = evaluate.load_questions(file, task, tokenizer, "paper", 512)
    assert len(examples) == len(questions) == len(file.read_text().splitlines()) and left_out == []
    for example, question in zip(examples, questions):
        assert tokenizer.decode(example.prompt) == "<s>" + prompt and question.prompt == example.prompt
        assert tokenizer.decode(example.answer) == answer + "</s>"
        if question.choices:                            # the stop token is not scored
            assert question.choices[question.shown["answer"]] == example.answer[:-1]


@pytest.mark.parametrize("task, row, first", [
    ("piqa", {"goal": "Cut.", "sol1": "a knife", "sol2": "a spoon"}, 0),
    ("siqa", SIQA | {"label": None}, 1)])
def test_labels_lie_in_a_file_beside(task, row, first, tmp_path):
    file, labels = write_rows(tmp_path / "dev.jsonl", [row] * 2), tmp_path / "dev-labels.lst"
    labels.write_text(f"{first}\n{first + 1}\n")
    rows = [row for _, row in read_rows(file, task)]
    assert [row["answer"] for row in rows] == [0, 1]
    if task == "piqa":
        assert rows[0]["prompt"] == "Cut.\n\nChoices:\na knife\na spoon"
    for n in (1, 3):
        labels.write_text("1\n" * n)
        with pytest.raises(ValueError, match=f"{n} labels for the 2 rows"):
            list(read_rows(file, task))
    labels.unlink()
    with pytest.raises(ValueError, match="line 1: "):
        list(read_rows(file, task))


def test_mmlu_s_csv_is_its_json(tmp_path):
    file = tmp_path / "sums_test.csv"
    file.write_text('1 + 1?,0,1,2,3,C\n"a ""b"",\nc",0,1,2,3,A\n')
    (_, one), (_, two) = read_rows(file, "mmlu")
    assert [one] == [row for _, row in read_rows(CASES / "published/mmlu.jsonl", "mmlu")]
    assert two["prompt"].startswith('a "b",\nc\n(0). 0') and two["answer"] == 0
    for task, text, message in (
            ("rows", "", "CSV is read of mmlu alone"), ("mmlu", 'a,"' + "b" * 200_000, "not CSV"),
            ("mmlu", "a,0,1,2,3,E", "row 1: expected a question, four choices and a letter")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(read_rows(file, task))


PIQA = {"goal": "x", "sol1": "y", "sol2": "z"}


@pytest.mark.parametrize("task, row, message", [
    ("piqa", {"goal": "x", "sol1": "y"}, "a row of piqa has 'sol2', this has goal, sol1"),
    ("piqa", PIQA | {"label": -1}, "its right choice is -1: expected one of ['0', '1'], one"),
    ("piqa", PIQA | {"label": 0.9}, "its right choice is 0.9"),
    ("piqa", PIQA | {"label": 0, "goal": None}, "'NoneType'"),
    ("piqa", PIQA, "and no data-labels.lst lies beside it"), ("rows", PIQA, "(or a --task)"),
    ("arc", {"question": "x", "choices": ARC, "answerKey": ""}, "not a row of arc: its right choice is ''"),
    ("siqa", SIQA | {"correct": ""}, "its right choice is ''"),
    ("siqa", SIQA | {"label": 1, "context": None}, "NoneType"),
    ("mmlu", "1 + 1", "expected an object, got str"),
    ("mmlu", {"question": "x", "choices": [*"7891"], "answer": "(1)"}, "its right choice is '(1)'"),
    ("mmlu", {"question": "x", "choices": "abcd", "answer": 1}, "'3'], one a choice"),
    *(("arc", {"question": "x", "choices": {"text": [*"abc"], "label": [*labels]}, "answerKey": "A"},
       "'B'], one a choice") for labels in ("AAB", "AABB")),
    ("rows", {"prompt": "x", "choices": ["y"], "answer": "z"}, "none of its choices, nor"),
    ("rows", {"prompt": "x", "choices": "y", "answer": 0}, "'choices' is str, expected a list"),
    ("rows", {"prompt": "x", "choices": ["y", "\udc00"], "answer": 0}, "(a lone surrogate)"),
    ("rows", {"prompt": "x", "choices": ["y", ""], "answer": 0}, "choice 2 has no tokens")])
def test_a_malformed_row_is_named(task, row, message, tokenizer, tmp_path):
    file = write_rows(tmp_path / "data.jsonl", [row])
    with pytest.raises(ValueError, match="data.jsonl, line 1: ") as error:
        evaluate.load_questions(file, task, tokenizer, "alpaca", 512)       # no space before an answer
    assert message in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_choice_s_log_probability_is_that_of_the_training_loss(method):
    """The prompt read once for all its choices, in a batch, as against each choice alone."""
    bitune = tiny_bitune(method)
    prompts, choices = RAGGED, [ANSWERS[:2], ANSWERS, [[8]], ANSWERS[2:]]
    score = lambda p, c: -bitune.losses([p], [c]).item() * len(c)
    alone = [[score(p, c) for c in group] for p, group in zip(prompts, choices)]
    for one, other in zip(evaluate.log_probs(bitune, prompts, choices), alone):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=2e-5, rtol=1e-5)
    assert bitune.passes == Bitune(bitune.model, method).passes
    one_token = evaluate.log_probs(bitune, [[5], [6]], [[[7], [8, 9]], [[7]]])  # no context at all
    assert one_token[1][0] == pytest.approx(-bitune.losses([[6]], [[7]]).item(), abs=1e-5)


def test_the_arithmetic_is_the_evaluation_harness_s():
    """On its own verdicts (harness.json says which version's): choices with made-up log-probabilities, and
    answers to GSM8K in every form that a number can take."""
    harness = json.loads((Path(__file__).parent / "harness.json").read_text())
    question = lambda row: evaluate.Question(row, [], [])
    scorers = {"choices": lambda row: evaluate.score_choices(question(row), row["log_probs"]),
               "gsm8k": lambda row: evaluate.score_gsm8k(question(row), row["said"])}
    for kind, score in scorers.items():
        rows = harness[kind]["rows"]
        for row in rows:
            assert score(row).items() <= row.items(), row
        for metric, expected in harness[kind]["scores"].items():
            assert [*evaluate.mean_scores(rows)[metric].values()] == pytest.approx([*expected])
    accented = question({"choices": ["éééé", "abcdef"], "answer": 1})       # it counts characters, not bytes
    assert evaluate.score_choices(accented, [-6.0, -7.0]) == {"acc": 0.0, "acc_norm": 1.0}


def test_an_answer_ends_before_the_next_question(tokenizer, monkeypatch):
    said = [tokenizer.encode(t) for t in ("Yes. Question: 1", "#### 2", "Never ends ... and on")]

    def answer(prompts, max_new_tokens, stop_ids):
        for i in range(max_new_tokens):
            asked.append(i)
            yield [ids[i] if i < len(ids) else None for ids in said]

    asked, bitune = [], tiny_bitune()
    monkeypatch.setattr(bitune, "answer", answer)
    written = lambda *more: evaluate.write_answers(bitune, tokenizer, said, {257}, *more)
    assert written(99)[0] == "Yes. Question: 1"
    assert written(14, "Question:") == ["Yes. ", "#### 2", "Never ends ..."]
    said.pop()
    asked.clear()
    assert written(99, "Question:") == ["Yes. ", "#### 2"]
    assert len(asked) == len("Yes. Question:")


def results(folder):
    """The rows of the one file of results in a folder, and its summary."""
    (file,) = folder.glob("*-*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return rows, json.loads(file.with_suffix(".json").read_text())


def test_the_command_scores_a_run_and_the_bare_model(tmp_path, monkeypatch, says):
    base, asked = write_checkpoint(tmp_path / "base"), ["Sky" + "?" * (i * 5 % 14) for i in range(14)]
    rows = [{"question": q, "choices": ARC, "answerKey": "B"} for q in asked]
    data = write_rows(tmp_path / "arc.jsonl", rows)
    run, bare = write_run(tmp_path / "run", tiny_bitune(), base), tmp_path / "runs/base/base"
    monkeypatch.chdir(tmp_path)
    for method, folder, *argv in (("bitune", run, "--adapter", run), (None, bare, "--model", base)):
        said = says(evaluate, "--task", "arc", "--data", data, "--batch-size", 3, *argv).out.splitlines()
        assert said[-2].startswith("arc: acc ") and "(14 questions, 0:00:0" in said[-2]
        rows, summary = results(folder)
        assert [r["prompt"].split("\n")[0] for r in rows] == asked and summary["method"] == method
        assert summary["scores"]["acc"]["mean"] == sum(r["acc"] for r in rows) / 14


def test_written_answers_are_scored_and_make_a_page(tmp_path, says):
    rows = [{"question": f"{i} + 1?", "answer": f"It is\n#### {i + 1}"} for i in range(5)]
    rows += [{"question": "x" * n, "answer": "#### 1"} for n in (230, 240)]
    base, data = write_checkpoint(tmp_path / "base"), write_rows(tmp_path / "test.jsonl", rows)
    argv = ["--model", base, "--data", data, "--max-new-tokens", 9, "--out"]
    sums = ["--task", "gsm8k", *argv]
    said = says(evaluate, *sums, tmp_path / "together", "--samples", 2).out
    assert "(6 questions, 1 too long left out, first: line 7, " in said
    (page,) = (tmp_path / "together").glob("*.md")
    assert page.read_text().count("strict-match ✗, flexible-extract ✗") == 2 and "#### 2" in page.read_text()
    call(evaluate, *sums, tmp_path / "alone", "--batch-size", 1)    # the sixth ends at its own limit
    assert results(tmp_path / "together")[0] == results(tmp_path / "alone")[0]
    said = says(evaluate, *argv, tmp_path, "--task", "rows", "--limit", 1).out
    assert "rows: exact_match 0.00% ± 0.00% (1 questions" in said


@pytest.mark.parametrize("torn", [False, True])
def test_a_stopped_evaluation_goes_on_and_ends_in_the_same_file(torn, tmp_path, monkeypatch, exits, says):
    rows = [{"question": "x" * n, "choices": ["a", "bc"], "answer": 1} for n in (5, 9, 2, 7, 7, 30, 1)]
    base, data = write_checkpoint(tmp_path / "base"), write_rows(tmp_path / "q.jsonl", rows)
    argv = ["--model", base, "--data", data, "--task", "rows", "--batch-size", 2, "--out"]
    out, real, asked = tmp_path / "out", evaluate.log_probs, []
    call(evaluate, *argv, tmp_path / "whole")

    def log_probs(bitune, prompts, choices):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(bitune, prompts, choices)

    monkeypatch.setattr(evaluate, "log_probs", log_probs)
    line = exits(130, evaluate, *argv, out)
    assert line == "error: 4 of 7 questions: stopped by SIGINT. The same command goes on there."
    (part,) = out.iterdir()
    if torn:
        part.write_text(part.read_text()[:-20])
    assert f"{4 - torn} of 7 questions are from an earlier try" in says(evaluate, *argv, out).out
    assert len(asked) == (6 if torn else 5)
    assert results(out)[0] == results(tmp_path / "whole")[0] and not part.exists()


def test_scores_of_other_flags_rows_weights_or_code_lie_beside(tmp_path, monkeypatch, says):
    base, data = write_checkpoint(tmp_path / "base"), tmp_path / "q.jsonl"
    argv = ["--model", base, "--data", data, "--task", "rows", "--out", tmp_path / "out"]
    chosen, said = {"question": "x", "choices": ["a", "bc"], "answer": 1}, {"question": "y", "answer": "a"}
    for n, row, *more in ((1, chosen), (1, chosen, "--batch-size", 1), (2, chosen, "--limit", 1),
                          (3, chosen, "--twice"), (4, chosen, "--dtype", "bfloat16"), (5, said),
                          (6, said, "--max-new-tokens", 2), (6, said, "--max-new-tokens", 2),
                          (7, said), (8, said)):
        write_rows(data, [row] * 2)
        if n == 8:
            monkeypatch.setattr(evaluate, "getsourcefile", lambda of: __file__)
        if n == 7:
            (base / "model.safetensors").touch()
        assert len({line for line in says(evaluate, *argv, *more).out.splitlines() if "wrote" in line}) == 1
        assert len([*(tmp_path / "out").glob("*.json")]) == len([*(tmp_path / "out").glob("*.jsonl")]) == n
