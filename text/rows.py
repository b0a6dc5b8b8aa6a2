"""Data files to rows, dicts in the forms that text/turns.py knows.

Any file of such rows is read as it stands. The paper's datasets are read as they are published: a reader of
TASKS puts the paper's words around a row's question and choices. (The template "paper" adds the rest.)
"""

import csv
import io
import json
from pathlib import Path

from text.words import check_kind, listed


def which(label, labels, choices):
    """The place of a row's right choice, which has one of the labels; each choice has one."""
    fits = type(labels) is type(choices) is list and len(choices) == len(labels) == len({*labels})
    if not fits or str(label) not in labels:
        raise ValueError(f"its right choice is {label!r:.40}: expected one of {labels!r:.60}, one a choice")
    return labels.index(str(label))


# Texts are joined by a +, which takes nothing else: no null becomes a word.

def with_choices(question, choices, label, labels):
    """The choices' own texts are the answers."""
    return {"prompt": question + "\n\nChoices:\n" + "\n".join(choices), "choices": choices,
            "answer": which(label, labels, choices)}


def piqa(row):              # goal, sol1, sol2; 0 or 1 in valid-labels.lst beside valid.jsonl
    return with_choices(row["goal"], [row["sol1"], row["sol2"]], row["label"], ["0", "1"])


def lettered(row):          # ARC and CSQA: the original nesting, and the hub's
    question = row["question"]
    if isinstance(question, dict):
        question, row = question["stem"], row | question
    choices = row["choices"]
    if isinstance(choices, list):
        choices = {key: [choice[key] for choice in choices] for key in ("label", "text")}
    return with_choices(question, choices["text"], row["answerKey"], choices["label"])


def numbered(question, choices, label, labels, mark=""):
    """The choices' numbers are the answers."""
    numbers = [f"({i})" for i in range(len(choices))]
    lines = "".join(f"\n{number}{mark} " + choice for number, choice in zip(numbers, choices))
    return {"prompt": question + lines, "choices": numbers, "answer": which(label, labels, choices)}


def siqa(row):              # context, question, answerA ...; 1, 2 or 3 in dev-labels.lst beside dev.jsonl,
                            # or, in other releases, "correct": "A"
    question = "Given the context, answer correctly the question.\nContext: " + row["context"] + \
               "\nQuestion: " + row["question"] + "\n\nChoices:"
    label, labels = (row["correct"], "ABC") if "correct" in row else (row["label"], "123")
    return numbered(question, [row[f"answer{letter}"] for letter in "ABC"], label, [*labels])


def mmlu(row):              # question, choices, answer; in the CSV files the answer is a letter
    return numbered(row["question"], row["choices"], row["answer"], [*"0123"], ".")


def ultrafeedback(row):     # up to four models' completions, and what GPT-4 wrote is learned: many rows have
    written = {c["model"]: c["response"] for c in row["completions"]}                     # nothing by it
    return {"prompt": row["instruction"], "completion": written.get("gpt-4", "")}


TASKS = {"rows": lambda row: row, "piqa": piqa, "arc": lettered, "csqa": lettered, "siqa": siqa,
         "mmlu": mmlu, "gsm8k": lambda row: {"prompt": row["question"], "completion": row["answer"]},
         "ultrafeedback": ultrafeedback}


def read_rows(path, task="rows"):
    """The rows of a file, one by one, as (place, dict): its line or item, and the row as the task's reader
    makes it. ValueError names the place of one that is malformed."""
    path = Path(path)
    in_csv = path.suffix.lower() == ".csv"
    if in_csv and task != "mmlu":
        raise ValueError(f"{path}: CSV is read of mmlu alone, expected JSON Lines or a JSON list")
    try:
        rows = csv_rows(path) if in_csv else json_rows(path)
        for place, row in zip_labels(path, rows) if task in ("piqa", "siqa") else rows:
            try:
                if task != "rows" and not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                row = TASKS[task](row)
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(f"{path}, {place}: it has half of a character (a lone surrogate)") from None
            except KeyError as error:
                beside = f" and no {path.stem}-labels.lst lies beside it" if error.args == ("label",) else ""
                raise ValueError(f"{path}, {place}: a row of {task} has {error}, this has "
                                 f"{listed(list(row), ', ') or 'nothing'}{beside}") from None
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, {place}: not a row of {task}: {error}") from None
            yield place, row
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: expected JSON Lines or a JSON list") from None
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV: {error}") from None


def json_rows(path):
    """JSON Lines, or one JSON list. The file may be a pipe: it is read once."""
    with open(path, "rb") as file:
        check_kind(path, file.peek(64))
        lines, begun = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n"), False
        for n, line in enumerate(lines, 1):
            try:
                if not begun and line.lstrip().startswith("["):
                    rows = json.loads("\n" * (n - 1) + line + lines.read(), object_pairs_hook=each_once)
                    yield from ((f"item {i}", row) for i, row in enumerate(rows, 1))
                elif line.strip():
                    begun = True
                    yield f"line {n}", json.loads(line, object_pairs_hook=each_once)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {n}: not JSON, an object a line or a list: "
                                 f"{error}") from None


def each_once(pairs):
    """A JSON object of these pairs; ValueError for a key that is there twice, of which one would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key is there twice, of {listed([*row], ', ')}")
    return row


def csv_rows(path):
    """MMLU's: a question, its four choices and the right one's letter; no titles."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        for n, fields in enumerate(filter(None, csv.reader(file)), 1):
            if len(fields) != 6 or fields[5] not in list("ABCD"):
                raise ValueError(f"{path}, row {n}: expected a question, four choices and a letter A to D")
            answer = "ABCD".index(fields[5])
            yield f"row {n}", {"question": fields[0], "choices": fields[1:5], "answer": answer}


def zip_labels(path, rows):
    """The rows, each with its line of `NAME-labels.lst` as its label, where that lies beside NAME.jsonl."""
    labels = path.with_name(f"{path.stem}-labels.lst")
    if not labels.is_file():
        return rows
    lines, rows = labels.read_text().split(), list(rows)
    if len(lines) != len(rows):
        raise ValueError(f"{labels} has {len(lines)} labels for the {len(rows)} rows of {path.name}")
    return [(place, row | {"label": label} if isinstance(row, dict) else row)
            for (place, row), label in zip(rows, lines)]
