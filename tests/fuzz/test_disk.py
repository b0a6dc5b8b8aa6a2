"""Random files: damaged or edited, after which every command still ends in one line, and never in a
traceback; and random spellings of the same few folders and files, from anywhere, with others of their names
beside them, which mean the same settings and scores, or are refused in one line."""

import json
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import sample
import train
from cli.settings import check, new_parser, settings_of, typed
from cli.terminal import Progress
from experiments import evaluate, merge
from experiments.evaluate import SCORING, score
from files.disk import write_files
from fuzzing import edit_json, judge_all
from test_commands import at_step
from tiny import CASES, call, tiny_bitune, write_checkpoint, write_run


def edit_bytes(rng, data):
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data[:a], data[:a] + data[b:], data[:a] + data[a:b] * 2 + data[b:], b"", data + b"\0",
                       data[:a] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 9))) + data[a + 4:],
                       b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), b"[" * 100_000])


def edit_row(rng, data):
    rows = data.splitlines()
    i = rng.randrange(len(rows))
    rows[i] = json.dumps(edit_json(rng, json.loads(rows[i]))).encode()
    return b"\n".join(rows) + b"\n"


def edit_tensors(rng, data):
    """The header of a safetensors file edited, its tensors as they were."""
    n = int.from_bytes(data[:8], "little")
    header = json.dumps(edit_json(rng, json.loads(data[8:8 + n]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + n:]


EDITS = {".json": lambda rng, data: json.dumps(edit_json(rng, json.loads(data))).encode(),
         ".jsonl": edit_row, ".safetensors": edit_tensors}


def mutate(rng, file):
    data, how = file.read_bytes(), rng.random()
    if how < 0.05:
        file.unlink()
    else:
        edit = edit_bytes if how < 0.35 else EDITS.get(file.suffix, edit_bytes)
        file.write_bytes(edit(rng, data))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a tokenizer.json of each kind, a run half done, and data."""
    folder = tmp_path_factory.mktemp("world")
    for name, case in (("base", "tokenizer-bos-not-special"), ("bytes", "tokenizer-appended-merges")):
        base = write_checkpoint(folder / name)
        (base / "tokenizer.model").unlink()
        shutil.copytree(CASES / case, base, dirs_exist_ok=True, ignore=lambda *_: ["config.json"])
        (base / "generation_config.json").write_text('{"eos_token_id": [2], "bos_token_id": 1}')
    rows = [{"prompt": f"the {i}", "completion": "all"} for i in range(8)]
    for name, text in (("data.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
                       ("val.json", json.dumps(rows[:2])), ("dev-labels.lst", "0\n1\n"),
                       ("dev.jsonl", '{"goal": "the", "sol1": "a", "sol2": "all"}\n' * 2),
                       ("law_test.csv", "the,a,b,c,d,A\n" * 2)):
        (folder / name).write_text(text)
    with at_step(2), redirect_stdout(StringIO()), pytest.raises(SystemExit):
        call(train, *"--steps 3 --batch-size 2 --save-every 1 --eval-every 1 --rank 2".split(),
             "--targets", "q_proj", "--model", folder / "base", "--data", folder / "data.jsonl",
             "--val-data", folder / "val.json", "--out", folder / "run")
    return folder


def random_command(rng, folder, file):
    """A command that reads the file: its module, its flags."""
    own, base, run, new = folder / file.split("/")[0], folder / "base", folder / "run", folder / "new"
    few, again = ["--max-new-tokens", 2], (train, "--resume", run)
    task, data = {"law_test.csv": ("mmlu", own), "data.jsonl": ("rows", own), "val.json": ("rows", own)}.get(
        file, ("piqa", folder / "dev.jsonl"))
    ask = sample, "--prompt", "the", *few
    score = evaluate, "--model", base, "--task", task, "--data", data, "--out", folder / "scores", *few
    further = train, "--adapter", run, "--data", folder / "data.jsonl", "--steps", 1, "--out", new
    if own == run:
        return rng.choice([again, again, further, (*ask, "--adapter", run),
                           (merge, "--adapter", run, "--out", new)])
    if own.is_dir():
        return *ask, "--model", own
    return rng.choice([score, again]) if task == "rows" else score


def too_slow(*_):
    raise AssertionError("it takes longer than 30 seconds")


def test_no_file_brings_a_traceback(world, tmp_path, request):
    files = sorted(str(file.relative_to(world)) for file in world.rglob("*") if file.is_file())

    def judge(rng):
        folder, file, err = tmp_path / "copy", rng.choice(files), StringIO()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(world, folder)
        for name in ("settings.json", "bitune.json"):       # the run is on the copy's base and data
            there = folder / "run" / name
            there.write_text(there.read_text().replace(str(world), str(folder)))
        mutate(rng, folder / file)
        signal.alarm(30)
        try:
            with redirect_stdout(StringIO()), redirect_stderr(err):
                call(*random_command(rng, folder, file))
            return "read"
        except SystemExit as end:
            said = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
            assert end.code in (1, 2) and len(said) == 1, (file, err.getvalue())
            return f"exit {end.code}"
        finally:
            signal.alarm(0)

    signal.signal(signal.SIGALRM, too_slow)
    judge_all(request, judge)


GIVEN = [{"model": "base"}, {"model": "base", "adapter": "run"}, {"adapter": "run"}, {"model": "whole"},
         {"model": "whole", "adapter": "whole"}, {"adapter": "whole"}]
ROW = b'{"question": "x", "choices": ["a", "bc"], "answer": %d}'


def write_twins(folder, seed, links):
    base = write_checkpoint(folder / "base", seed=seed)
    for run, *kind in (("run", "bitune", "lora"), ("whole", "causal", "full")):
        write_run(folder / run, tiny_bitune(*kind, config={"seed": seed}), base)
    write_files(folder, {"q.jsonl": ROW % seed, **{f"out{n}/x": b"" for n in range(len(GIVEN))}})
    for file in (folder, *folder.iterdir()):
        (links / "-".join(file.parts[len(folder.parts) - 1:])).symlink_to(file)


def spelled(rng, path):
    root, (folder, name) = path.parent.parent, path.parts[-2:]
    way = rng.choice([path, path, root / "links" / folder / name, root / "links" / f"{folder}-{name}"])
    more = rng.choice(["", "/", "./", "links/../", f"{folder}/../"])
    way = os.path.relpath(way) if rng.random() < 0.5 else str(way).replace(f"{root}/", f"{root}/{more}")
    return way + rng.choice(["", "", "/"])


def test_every_spelling_means_the_same(tmp_path, request, monkeypatch):
    (tmp_path / "links").mkdir()
    for seed, name in enumerate(("a b", "other")):
        write_twins(tmp_path / name, seed, tmp_path / "links")
    found = {}

    def judge(rng):
        name, n = rng.choice(["a b", "other"]), rng.randrange(len(GIVEN))
        monkeypatch.chdir(rng.choice([tmp_path, tmp_path / name, tmp_path / "links"]))
        given = {"data": "q.jsonl"} | GIVEN[n]
        ways = {flag: spelled(rng, tmp_path / name / file) for flag, file in given.items()}
        wrong = rng.choice([*ways]) if rng.random() < 0.1 else None
        ways |= {wrong: ways[wrong].rstrip("/") + "x"} if wrong else {}
        own = n and rng.random() < 0.5      # its own place; else one that both share, as their data's name
        ways |= {} if own else {"out": spelled(rng, tmp_path / "a b" / f"out{n}")}
        argv = [f"--{flag}={way}" for flag, way in ways.items()]
        try:
            file, *_ = score(new_parser("", SCORING).parse_args(["--task=rows", *argv]), Progress())
            check(settings := settings_of(typed(["--out=new", *argv])))
        except (ValueError, OSError) as problem:
            assert wrong and "\n" not in str(problem), ways
            return "refused"
        file, means = file.resolve(), vars(settings) | {"out": None}
        means |= {key: means[key] and Path(means[key]).resolve() for key in ("model", "adapter", "data")}
        said = means, file, file.with_suffix(".jsonl").read_text()
        assert not wrong and found.setdefault((name, n, own), said) == said, ways
        if rng.random() < 0.03:
            file.unlink()                   # the next one asks the model again
        return "same"

    judge_all(request, judge)
