"""The published files of the paper's tasks, and the scores on them."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from bitune import METHODS, Bitune
from experiments import evaluate
from test_commands import exits
from text.examples import load_examples
from text.rows import read_rows
from text.tokenizer import Tokenizer
from tiny import ANSWERS, RAGGED, tiny_bitune, write_checkpoint

ARC = {"text": ["red", "blue"], "label": ["A", "B"]}
PUBLISHED = {  # task, rows as they are published, the prompt in the paper's template, the right choice
    "arc": (
        [
            {"id": 1, "question": "Sky?", "choices": ARC, "answerKey": "B"},
            {
                "id": 1,
                "question": {
                    "stem": "Sky?",
                    "choices": [{"text": "red", "label": "1"}, {"text": "blue", "label": "2"}],
                },
                "answerKey": "2",
            },
        ],
        "Question: Sky?\n\nChoices:\nred\nblue\n\nAnswer:",
        " blue",
    ),
    "siqa": (
        [
            {
                "context": "Jo ran.", "question": "Why?", "answerA": "late", "answerB": "fun",
                "answerC": "fear", "label": label,
            }
            for label in ("3", 3)
        ]
        + [
            {
                "context": "Jo ran.", "question": "Why?", "answerA": "late", "answerB": "fun",
                "answerC": "fear", "correct": "C",
            }
        ],
        "Question: Given the context, answer correctly the question.\nContext: Jo ran.\nQuestion: Why?\n\n"
        "Choices:\n(0) late\n(1) fun\n(2) fear\n\nAnswer:",
        " (2)",
    ),
    "mmlu": (
        [{"question": "1 + 1?", "subject": "sums", "choices": ["0", "1", "2", "3"], "answer": 2}],
        "Question: 1 + 1?\n(0). 0\n(1). 1\n(2). 2\n(3). 3\n\nAnswer:", " (2)",
    ),
    "rows": (
        [
            {"prompt": "Sky?", "choices": ["red", "blue"], "answer": 1},
            {"question": "Sky?", "choices": ["red", "blue"], "answer": "blue"},
        ],
        "Question: Sky?\n\nAnswer:",
        " blue",
    ),
    "gsm8k": (
        [{"question": "1 + 1?", "answer": "It is\n#### 2"}],
        "Question: 1 + 1?\n\nAnswer:",
        " It is\n#### 2",
    ),
    "ultrafeedback": (
        [
            {
                "instruction": "Sing!", "source": "x",
                "completions": [{"model": "llama", "response": "no"}, {"model": "gpt-4", "response": "La."}],
            }
        ],
        "Question: Sing!\n\nAnswer:",
        " La.",
    ),
}
PUBLISHED["csqa"] = PUBLISHED["arc"]


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.from_pretrained(write_checkpoint(tmp_path / "base"))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_rows_make_the_paper_s_prompts(task, tokenizer, tmp_path):
    rows, prompt, answer = PUBLISHED[task]
    file = write_rows(tmp_path / "published.jsonl", rows)
    examples, _ = load_examples(file, tokenizer, "paper", 512, task)
    assert len(examples) == len(rows)
    for example in examples:
        assert tokenizer.decode(example.prompt) == "<s>" + prompt
        assert tokenizer.decode(example.answer) == answer + "</s>"


@pytest.mark.parametrize("task, first", [("piqa", 0), ("siqa", 1)])
def test_labels_lie_in_a_file_beside(task, first, tmp_path):
    piqa = {"goal": "Cut.", "sol1": "a knife", "sol2": "a spoon"}
    siqa = PUBLISHED["siqa"][0][0] | {"label": None}
    file = write_rows(tmp_path / "dev.jsonl", [{"piqa": piqa, "siqa": siqa}[task]] * 2)
    labels = tmp_path / "dev-labels.lst"
    labels.write_text(f"{first}\n{first + 1}\n")
    rows = [row for _, row in read_rows(file, task)]
    assert [row["answer"] for row in rows] == [0, 1]
    if task == "piqa":
        assert rows[0]["prompt"] == "Cut.\n\nChoices:\na knife\na spoon"
    for n in ("0\n", "1\n1\n1\n"):
        labels.write_text(n)
        with pytest.raises(ValueError, match=f"{len(n) // 2} labels for the 2 rows"):
            list(read_rows(file, task))
    labels.unlink()
    with pytest.raises(ValueError, match="line 1: "):
        list(read_rows(file, task))


def test_mmlu_s_csv_is_its_json(tmp_path):
    rows, prompt, _ = PUBLISHED["mmlu"]
    with open(tmp_path / "sums_test.csv", "w", newline="") as file:
        csv.writer(file).writerow(["1 + 1?", "0", "1", "2", "3", "C"])
        csv.writer(file).writerow(['a "b",\nc', *"0123", "A"])
    one, two = read_rows(tmp_path / "sums_test.csv", "mmlu")
    assert one[1] == next(read_rows(write_rows(tmp_path / "mmlu.jsonl", rows), "mmlu"))[1]
    for task, text, message in (
        ("rows", "", "CSV is read of mmlu alone"), ("mmlu", 'a,"' + "b" * 200_000, "not CSV"),
        ("mmlu", "a,0,1,2,3,E", "row 1: expected a question, four choices and a letter"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            list(read_rows(tmp_path / "bad.csv", task))
    assert two[1]["prompt"].startswith('a "b",\nc\n(0). 0') and two[1]["answer"] == 0


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("piqa", {"goal": "x", "sol1": "y"}, "a row of piqa has 'sol2', this has goal, sol1"),
        ("piqa", {"goal": "x", "sol1": "y", "sol2": "z", "label": -1}, "expected one of its 2 choices"),
        ("arc", {"question": "x", "choices": ARC, "answerKey": ""}, "not a row of arc"),
        ("arc", {"question": "x", "answer": "y"}, "a row of arc has 'choices', this has question, answer"),
        ("piqa", {"goal": "x", "sol1": "y", "sol2": "z"}, "and no data-labels.lst lies beside it"),
        ("rows", {"goal": "x", "sol1": "y", "sol2": "z"}, "(or a --task)"),
        ("mmlu", "1 + 1", "expected an object, got str"),
        ("rows", {"prompt": "x", "choices": ["y"], "answer": "z"}, "'answer' is 'z'"),
        ("rows", {"prompt": "x", "choices": "y", "answer": 0}, "'choices' is str, expected a list"),
    ],
)
def test_a_malformed_row_is_named(task, row, message, tokenizer, tmp_path):
    file = write_rows(tmp_path / "data.jsonl", [row])
    with pytest.raises(ValueError, match="data.jsonl, line 1: ") as error:
        evaluate.load_questions(file, task, tokenizer, "paper", 512)
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
    scorers = {
        "choices": lambda row: evaluate.score_choices(question(row), row["log_probs"]),
        "gsm8k": lambda row: evaluate.score_gsm8k(question(row), row["said"]),
    }
    for kind, score in scorers.items():
        rows = harness[kind]["rows"]
        for row in rows:
            assert score(row).items() <= row.items(), row
        for metric, expected in harness[kind]["scores"].items():
            assert evaluate.mean_and_error([row[metric] for row in rows]) == pytest.approx(tuple(expected))
    accented = question({"choices": ["éééé", "abcdef"], "answer": 1})       # it counts characters, not bytes
    assert evaluate.score_choices(accented, [-6.0, -7.0]) == {"acc": 0.0, "acc_norm": 1.0}


def test_an_answer_ends_before_the_next_question(tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path / "base"))
    texts = ["Yes. Question: 1", "#### 2", "Never ends ... and on"]
    said = [tokenizer.encode(t) for t in texts]

    def answer(prompts, max_new_tokens, stop_ids):
        for i in range(max_new_tokens):
            asked.append(i)
            yield [ids[i] if i < len(ids) else None for ids in said]

    asked, bitune = [], tiny_bitune()
    monkeypatch.setattr(bitune, "answer", answer)
    assert evaluate.write_answers(bitune, tokenizer, said, {257}, 14) == ["Yes. ", "#### 2", "Never ends ..."]
    said.pop()
    asked.clear()
    assert evaluate.write_answers(bitune, tokenizer, said, {257}, 99) == ["Yes. ", "#### 2"]
    assert len(asked) == len("Yes. Question:")


def test_the_command_scores_a_run_and_the_bare_model(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base")
    row = PUBLISHED["arc"][0][0]
    rows = [row | {"question": "Sky" + "?" * (i * 5 % 14)} for i in range(14)]  # of all lengths
    data = write_rows(tmp_path / "arc.jsonl", rows)
    flags = ["--model", str(base), "--data", str(data), "--task", "arc", "--steps", "2", "--val-size", "0"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    common = ["--task", "arc", "--data", str(data), "--batch-size", "3"]
    run, bare = ["--adapter", str(tmp_path / "run")], ["--model", str(base), "--out", str(tmp_path / "own")]
    for argv in (run, bare):
        capsys.readouterr()
        evaluate.main([*common, *argv])
        said = capsys.readouterr().out.splitlines()
        assert said[-2].startswith("arc: acc ") and "(14 questions, 0:00:0" in said[-2]
        out = Path(argv[-1])
        rows = [json.loads(line) for line in (out / "arc-arc.jsonl").read_text().splitlines()]
        summary = json.loads((out / "arc-arc.json").read_text())
        assert [r["prompt"].split("\n")[0] for r in rows] == ["Sky" + "?" * (i * 5 % 14) for i in range(14)]
        assert summary["scores"]["acc"]["mean"] == sum(r["acc"] for r in rows) / 14
        assert summary["method"] == ("bitune" if "--adapter" in argv else None)


def test_written_answers_make_a_page(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base")
    rows = [{"question": f"{i} + 1?", "answer": f"It is\n#### {i + 1}"} for i in range(5)] + [
        {"question": "x" * n, "answer": "#### 1"} for n in (230, 240)
    ]
    data = write_rows(tmp_path / "test.jsonl", rows)
    argv = ["--model", base, "--data", data, "--task", "gsm8k", "--out", tmp_path, "--samples", "2"]
    evaluate.main([str(a) for a in [*argv, "--max-new-tokens", "9"]])
    assert "(6 questions, 1 too long left out, first: line 7, " in capsys.readouterr().out
    page = (tmp_path / "gsm8k-test.md").read_text()
    assert page.count("\n## ") == 2 and "strict-match ✗, flexible-extract ✗" in page and "#### 2" in page
    alone = [*argv, "--max-new-tokens", "9", "--batch-size", "1", "--out", tmp_path / "alone"]
    evaluate.main([str(a) for a in alone])  # the sixth answer ends at the model's limit: its own
    assert (tmp_path / "alone/gsm8k-test.jsonl").read_text() == (tmp_path / "gsm8k-test.jsonl").read_text()
    kept = (tmp_path / "gsm8k-test.jsonl").read_text()
    evaluate.main([str(a) for a in [*argv[:-2], "--limit", "1", "--max-new-tokens", "5"]])
    assert (tmp_path / "gsm8k-test.jsonl").read_text() == kept  # a shorter look does not write over it
    rows = [*argv[:4], "--task", "rows", *argv[6:8], "--limit", "1", "--max-new-tokens", "9"]
    evaluate.main([str(a) for a in rows])
    assert "rows: exact_match 0.00% ± 0.00% (1 questions" in capsys.readouterr().out


@pytest.mark.parametrize("torn", [False, True])
def test_a_stopped_evaluation_goes_on_and_ends_in_the_same_file(torn, tmp_path, monkeypatch, capsys):
    base = write_checkpoint(tmp_path / "base")
    rows = [{"question": "x" * n, "choices": ["a", "bc"], "answer": 1} for n in (5, 9, 2, 7, 7, 30, 1)]
    data = write_rows(tmp_path / "q.jsonl", rows)
    argv = ["--model", base, "--data", data, "--task", "rows", "--batch-size", "2"]
    evaluate.main([str(a) for a in [*argv, "--out", tmp_path / "whole"]])
    real, asked = evaluate.log_probs, []

    def log_probs(bitune, prompts, choices):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(bitune, prompts, choices)

    monkeypatch.setattr(evaluate, "log_probs", log_probs)
    out, part = tmp_path / "out", tmp_path / "out/rows-q.part"
    line = exits(130, evaluate.main, [*argv, "--out", out], capsys)
    assert line == "error: 4 of 7 questions: stopped by SIGINT. The same command goes on there."
    if torn:
        part.write_text(part.read_text()[:-20])
    evaluate.main([str(a) for a in [*argv, "--out", out]])
    assert len(asked) == (6 if torn else 5)
    assert f"{4 - torn} of 7 questions are from an earlier try" in capsys.readouterr().out
    assert (out / "rows-q.jsonl").read_bytes() == (tmp_path / "whole/rows-q.jsonl").read_bytes()
    assert not part.exists()
    asked.clear()
    (out / "rows-q.json").unlink()
    exits(130, evaluate.main, [*argv, "--out", out], capsys)
    monkeypatch.setattr(evaluate, "log_probs", real)        # another model, other questions: all anew
    evaluate.main([str(a) for a in [*argv, "--out", out, "--limit", "3"]])
    (base / "model.safetensors").touch()
    evaluate.main([str(a) for a in [*argv, "--out", out]])
    assert "earlier try" not in capsys.readouterr().out


def test_mmlu_has_a_line_for_each_subject_and_both_means(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base")
    (tmp_path / "test").mkdir()
    for subject, n in (("law", 1), ("logic", 3)):
        (tmp_path / f"test/{subject}_test.csv").write_text("Why?,a,b,c,d,B\n" * n)
    hub = [PUBLISHED["mmlu"][0][0] | {"subject": subject} for subject in ("law", "logic", "logic")]
    write_rows(tmp_path / "hub.jsonl", hub)
    for data, n in (("test", 4), ("hub.jsonl", 3)):
        argv = ["--model", base, "--task", "mmlu", "--data", tmp_path / data, "--out", tmp_path / "out"]
        evaluate.main([str(a) for a in argv])
        said = capsys.readouterr().out.splitlines()
        assert [line.split(": acc")[0] for line in said[-5:-1]] == [
            "mmlu law", "mmlu logic", "mmlu, mean of 2 subjects", "mmlu"]
        summary = json.loads((tmp_path / f"out/mmlu-{data.split('.')[0]}.json").read_text())
        assert summary["questions"] == n and summary["subjects"].keys() == {"law", "logic"}
        acc = [summary["subjects"][subject]["acc"]["mean"] for subject in ("law", "logic")]
        assert summary["mean_of_subjects"]["acc"] == sum(acc) / 2
        assert summary["scores"]["acc"]["mean"] == pytest.approx((acc[0] + (n - 1) * acc[1]) / n)


def test_a_model_that_gives_no_numbers_gets_no_score(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38          # finite, but what it is multiplied with is not
    save_file(weights, base / "model.safetensors")
    data = write_rows(tmp_path / "arc.jsonl", PUBLISHED["arc"][0])
    line = exits(1, evaluate.main, ["--model", base, "--task", "arc", "--data", data], capsys)
    assert "the log-probability of a choice is nan" in line


def test_wrong_input_to_evaluate_is_one_line_and_exit_status_2(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base")
    data = write_rows(tmp_path / "arc.jsonl", PUBLISHED["arc"][0])
    wrong = {
        "neither --model nor --adapter": ["--task", "arc", "--data", data],
        "No such file": ["--model", base, "--task", "arc", "--data", tmp_path / "none"],
        "a row of piqa has 'goal'": ["--model", base, "--task", "piqa", "--data", data],
        "are chosen, not written": ["--model", base, "--task", "arc", "--data", data, "--samples", "1"],
        "invalid choice: 'ultrafeedback'": ["--task", "ultrafeedback"],
        "holds no run and no adapter": ["--adapter", base, "--task", "arc", "--data", data],
    }
    for message, argv in wrong.items():
        assert message in exits(2, evaluate.main, argv, capsys), message
    assert not list(tmp_path.rglob("arc-arc*"))


def test_ids_of_choices_are_those_of_training(tokenizer, tmp_path):
    file = write_rows(tmp_path / "arc.jsonl", PUBLISHED["arc"][0])
    questions, left_out = evaluate.load_questions(file, "arc", tokenizer, "paper", 512)
    examples, _ = load_examples(file, tokenizer, "paper", 512, "arc")
    assert left_out == []
    for question, example in zip(questions, examples):
        assert question.prompt == example.prompt
        assert question.choices[question.shown["answer"]] == example.answer[:-1]  # the stop token is not scored
