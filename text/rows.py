"""Data files to rows, dicts in the forms that `examples.parse_row` knows.

Any file of such rows is read as it stands. The paper's datasets are read as they are published: a reader of
TASKS turns each row into

    {"prompt": ..., "choices": [...], "answer": 1}      multiple choice, the right one by its index
    {"prompt": ..., "completion": ...}                  free text

where the prompt has the words that the paper puts around the task's question and choices. The template
"paper" adds the rest: "Question: " before and "\n\nAnswer:" behind.
"""

import csv
import json
import re
from pathlib import Path

from text.words import listed


class Unusable(ValueError):
    """A row that is none of the known forms, or says nothing to learn."""


def with_choices(question, choices, answer):
    """The choices' own texts are the answers."""
    listed = "\n".join(choices)
    return {"prompt": f"{question}\n\nChoices:\n{listed}", "choices": choices, "answer": answer}


def piqa(row):              # goal, sol1, sol2; 0 or 1 in valid-labels.lst beside valid.jsonl
    return with_choices(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))


def lettered(row):          # ARC and CSQA: the original nesting, and the hub's
    question = row["question"]
    if isinstance(question, dict):
        question, row = question["stem"], row | question
    choices = row["choices"]
    if isinstance(choices, list):
        choices = {key: [choice[key] for choice in choices] for key in ("label", "text")}
    return with_choices(question, choices["text"], choices["label"].index(row["answerKey"]))


def siqa(row):              # context, question, answerA ...; 1, 2 or 3 in dev-labels.lst beside dev.jsonl,
                            # or, in other releases, "correct": "A"
    listed = "\n".join(f"({i}) {row['answer' + letter]}" for i, letter in enumerate("ABC"))
    question = f"Given the context, answer correctly the question.\nContext: {row['context']}\n" \
               f"Question: {row['question']}\n\nChoices:\n{listed}"
    answer = "ABC".index(row["correct"]) if "correct" in row else int(row["label"]) - 1
    return {"prompt": question, "choices": ["(0)", "(1)", "(2)"], "answer": answer}


def mmlu(row):              # question, choices, answer, subject; in the CSV files the answer is a letter
    listed = "\n".join(f"({i}). {choice}" for i, choice in enumerate(row["choices"]))
    numbers = [f"({i})" for i in range(len(row["choices"]))]
    prompt = f"{row['question']}\n{listed}"
    return {"prompt": prompt, "choices": numbers, "answer": row["answer"], "subject": row.get("subject")}


def gsm8k(row):
    return {"prompt": row["question"], "completion": row["answer"]}


def ultrafeedback(row):     # up to four models' completions, and what GPT-4 wrote is learned: many rows have
    written = {c["model"]: c["response"] for c in row["completions"]}                     # nothing by it
    return {"prompt": row["instruction"], "completion": written.get("gpt-4", "")}


TASKS = {"rows": lambda row: row, "piqa": piqa, "arc": lettered, "csqa": lettered, "siqa": siqa,
         "mmlu": mmlu, "gsm8k": gsm8k, "ultrafeedback": ultrafeedback}


# ----------------------------------------------------------------------------------------------------------
# Files

def read_rows(path, task="rows"):
    """The rows of a file, one by one, as (place, dict): its line or item, and the row as the task's reader
    makes it. ValueError names the place of one that is malformed."""
    path = Path(path)
    try:
        if path.suffix == ".csv" and task != "mmlu":
            raise ValueError(f"{path}: CSV is read of mmlu alone, expected JSON Lines or a JSON list")
        rows = zip_labels(path, csv_rows(path) if path.suffix == ".csv" else json_rows(path))
        for place, row in rows:
            try:
                if task != "rows" and not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                row = TASKS[task](row)
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(f"{path}, {place}: it has half of a character (a lone surrogate)") from None
            except KeyError as error:
                has = listed(list(row), ", ") or "nothing"
                lacks_labels = error.args[0] == "label"
                beside = f" and no {path.stem}-labels.lst lies beside it" if lacks_labels else ""
                raise ValueError(f"{path}, {place}: a row of {task} has {error}, this has {has}{beside}"
                                 ) from None
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, {place}: not a row of {task}: {error}") from None
            yield place, row
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: expected JSON Lines or a JSON list") from None


# What a file of another form begins with: what it is, and what makes rows of it.
OTHERS = {
    b"PAR1": 'a parquet file: python -c "import pandas; pandas.read_parquet({file!r}).to_json({new!r}, '
             'orient=\'records\', lines=True)"',
    b"ARROW1": "an Arrow file: write it as JSON Lines, such as by datasets' to_json",
    b"\x1f\x8b": "compressed: gunzip -c {file} > {new}",
    b"BZh": "compressed: bunzip2 -c {file} > {new}",
    b"\xfd7zXZ": "compressed: xz -dc {file} > {new}",
    b"\x28\xb5\x2f\xfd": "compressed: zstd -dc {file} > {new}",
    b"PK\x03\x04": "a ZIP archive (or a spreadsheet): take the file of rows out of it",
    b"\xff\xfe": "UTF-16 text: iconv -f UTF-16 -t UTF-8 {file} > {new}",
    b"\xfe\xff": "UTF-16 text: iconv -f UTF-16 -t UTF-8 {file} > {new}",
}
WRAPPERS = ("data", "rows", "examples", "instances", "train", "validation", "test")


def check_form(path):
    """ValueError for files that are no text of rows, by their first bytes."""
    with open(path, "rb") as file:
        head = file.read(8)
    for magic, what in OTHERS.items():
        if head.startswith(magic):
            what = what.format(file=str(path), new=f"{path.name.split('.')[0]}.jsonl")
            raise ValueError(f"{path} is not read, as it is {what}")


def wrapped(row, path):
    """What to do about a file that is one object with the rows in it; None for a row."""
    key = next((k for k in WRAPPERS if isinstance(row, dict) and isinstance(row.get(k), list)), None)
    if key is None or len(row) > 3:
        return None
    return f"its rows are a list under {key!r}: jq -c '.{key}[]' {path} > {path.stem}-rows.jsonl"


def several_lines(path):
    """What to do about a file that begins with an object over several lines; None if it does not."""
    try:
        whole, _ = json.JSONDecoder().raw_decode(path.read_text(encoding="utf-8-sig").lstrip())
    except (ValueError, RecursionError):
        return None
    return wrapped(whole, path) or ("its objects stand on several lines, expected one a line: "
                                    f"jq -c . {path} > {path.stem}-rows.jsonl")


def json_rows(path):
    """JSON Lines, or one JSON list."""
    check_form(path)
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        first = next((c for c in iter(lambda: file.read(1), "") if not c.isspace()), "")
        file.seek(0)
        if first == "[":
            try:
                rows = json.load(file)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}: not a JSON list: {error}") from None
            yield from ((f"item {n}", row) for n, row in enumerate(rows, 1))
            return
        begun = False
        for n, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = not begun and several_lines(path) or f"not JSON: {error}"
                raise ValueError(f"{path}, line {n}: {why}") from None
            if not begun and (why := wrapped(row, path)):
                raise ValueError(f"{path}, line {n}: {why}")
            begun = True
            yield f"line {n}", row


def csv_rows(path):
    """MMLU's, SUBJECT_test.csv: a question, its four choices and the right one's letter; no titles."""
    subject = re.sub("_(test|val|dev)$", "", path.stem)
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            rows = [fields for fields in csv.reader(file) if fields]
        except csv.Error as error:
            raise ValueError(f"{path}: not CSV: {error}") from None
        for n, fields in enumerate(rows, 1):
            if len(fields) != 6 or fields[5] not in list("ABCD"):
                raise ValueError(f"{path}, row {n}: expected a question, four choices and a letter A to D")
            yield f"row {n}", {"question": fields[0], "choices": fields[1:5],
                               "answer": "ABCD".index(fields[5]), "subject": subject}


def zip_labels(path, rows):
    """The rows, each with its line of `NAME-labels.lst` as its label, where that lies beside NAME.jsonl."""
    labels = path.with_name(f"{path.stem}-labels.lst")
    if not labels.is_file():
        yield from rows
        return
    lines, rows = labels.read_text().split(), list(rows)
    if len(lines) != len(rows):
        raise ValueError(f"{labels} has {len(lines)} labels for the {len(rows)} rows of {path.name}")
    for (place, row), label in zip(rows, lines):
        yield place, {**row, "label": label} if isinstance(row, dict) else row
