"""Files that were damaged or edited: every command still ends in one line, and never in a traceback."""

import copy
import json
import random
import shutil
import signal
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import sample
import train
from experiments import evaluate, merge
from tiny import write_checkpoint

CASES = Path(__file__).parent.parent / "cases"
JUNK = [None, True, False, 0, -1, 3, 1.5, float("nan"), 1e300, "", "x", "answer", [], [1], ["x"], {},
        {"a": 1}, [[]], [None], [["causal", "answer"]]]
BASE = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json")
RUN = ("bitune.json", "adapter_config.json", "adapter_model.safetensors", "mixing.safetensors", "log.jsonl",
       "settings.json", "state.safetensors", "bidirectional/adapter_config.json",
       "bidirectional/adapter_model.safetensors")
DATA = ("data.jsonl", "val.json", "dev.jsonl", "dev-labels.lst", "law_test.csv")


def nodes(value, at=()):
    """The places in a JSON value, as tuples of keys."""
    yield at
    inside = value.items() if isinstance(value, dict) else ()
    for key, one in list(enumerate(value) if isinstance(value, list) else inside)[:40]:
        yield from nodes(one, (*at, key))


def edit_json(rng, value):
    """A JSON value with one place of it replaced, left out, doubled, renamed or wrapped."""
    value = copy.deepcopy(value)
    at = rng.choice([*nodes(value)])
    if not at:
        return rng.choice([*JUNK, [value], {"a": value}])
    *above, key = at
    parent = value
    for step in above:
        parent = parent[step]
    how = rng.choice(["replace", "replace", "replace", "drop", "wrap", "add"])
    if how == "replace":
        parent[key] = rng.choice(JUNK)
    if how == "drop":
        del parent[key]
    if how == "wrap":
        parent[key] = rng.choice([[parent[key]], {"a": parent[key]}])
    if how == "add" and isinstance(parent, dict):
        parent[rng.choice(["new", "type", "content", *parent])] = rng.choice(JUNK)
    if how == "add" and isinstance(parent, list):
        parent.insert(key, rng.choice([*JUNK, parent[key]]))
    return value


def edit_bytes(rng, data):
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data[:a], data[:a] + data[b:], data[:a] + data[a:b] * 2 + data[b:], b"", data + b"\0",
                       data[:a] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 9))) + data[a + 4:],
                       b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), b"[" * 100_000])


def edit_tensors(rng, data):
    """The header of a safetensors file edited, its tensors as they were."""
    n = int.from_bytes(data[:8], "little")
    header = json.dumps(edit_json(rng, json.loads(data[8:8 + n]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + n:]


def mutate(rng, file):
    data, how = file.read_bytes(), rng.random()
    if how < 0.05:
        file.unlink()
    elif how < 0.35:
        file.write_bytes(edit_bytes(rng, data))
    elif file.suffix == ".safetensors":
        file.write_bytes(edit_tensors(rng, data))
    elif file.suffix == ".json":
        file.write_text(json.dumps(edit_json(rng, json.loads(data))))
    elif file.suffix == ".jsonl":
        rows = data.decode().splitlines()
        i = rng.randrange(len(rows))
        rows[i] = json.dumps(edit_json(rng, json.loads(rows[i])))
        file.write_text("\n".join(rows) + "\n")
    else:
        file.write_bytes(edit_bytes(rng, data))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a tokenizer.json of each kind, a run half done, and data."""
    folder = tmp_path_factory.mktemp("world")
    for name, case in (("base", "tokenizer-bos-not-special"), ("bytes", "tokenizer-appended-merges")):
        base = write_checkpoint(folder / name)
        (base / "tokenizer.model").unlink()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            if (CASES / case / file).exists():
                shutil.copy(CASES / case / file, base / file)
        (base / "generation_config.json").write_text('{"eos_token_id": [2], "bos_token_id": 1}')
    rows = [{"prompt": f"the {i}", "completion": "all"} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "val.json").write_text(json.dumps(rows[:2]))
    (folder / "dev.jsonl").write_text('{"goal": "the", "sol1": "a", "sol2": "all"}\n' * 2)
    (folder / "dev-labels.lst").write_text("0\n1\n")
    (folder / "law_test.csv").write_text("the,a,b,c,d,A\n" * 2)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(train, "train_step", stopping(train.train_step))
        with pytest.raises(SystemExit):
            train.main(as_text("--model", folder / "base", "--data", folder / "data.jsonl", "--val-data",
                               folder / "val.json", "--out", folder / "run", "--steps", 3, "--batch-size", 2,
                               "--save-every", 1, "--eval-every", 1, "--rank", 2, "--targets", "q_proj"))
    return folder


def stopping(train_step):
    calls = []

    def wrapped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_step(*args)
    return wrapped


def as_text(*argv):
    return [str(a) for a in argv]


def command(rng, folder, file):
    """A command that reads the file: its main, its flags."""
    ask = sample.main, ["--prompt", "the", "--max-new-tokens", 2]
    score = evaluate.main, ["--out", folder / "scores"]
    base = folder / file.split("/")[0]
    if file.startswith(("base/", "bytes/")):
        return ask[0], [*ask[1], "--model", base]
    if file.startswith("run/"):
        return rng.choice([(ask[0], [*ask[1], "--adapter", base]), (train.main, ["--resume", base]),
                           (train.main, ["--resume", base]),
                           (merge.main, ["--adapter", base, "--out", folder / "merged"]),
                           (train.main, ["--adapter", base, "--data", folder / "data.jsonl", "--steps", 1,
                                         "--out", folder / "new"])])
    if file in ("data.jsonl", "val.json"):
        return rng.choice([(train.main, ["--resume", folder / "run"]),
                           (score[0], [*score[1], "--model", folder / "base", "--task", "rows", "--data",
                                       folder / file])])
    task, data = ("mmlu", "law_test.csv") if file == "law_test.csv" else ("piqa", "dev.jsonl")
    return score[0], [*score[1], "--model", folder / "base", "--task", task, "--data", folder / data]


def too_slow(*_):
    raise AssertionError("it takes longer than 30 seconds")


def test_no_file_brings_a_traceback(world, tmp_path, request):
    warnings.simplefilter("ignore")
    old, outcomes, wrong = signal.signal(signal.SIGALRM, too_slow), Counter(), []
    bases = [*(f"base/{f}" for f in BASE), *(f"bytes/{f}" for f in BASE[1:4])]
    files = [*bases, *(f"run/{f}" for f in RUN), *DATA]
    for seed in range(request.config.getoption("--fuzz")):
        rng, folder = random.Random(seed), tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(world, folder)
        for name in ("settings.json", "bitune.json"):       # the run is on the copy's base and data
            file = folder / "run" / name
            file.write_text(file.read_text().replace(str(world), str(folder)))
        file = rng.choice(files)
        mutate(rng, folder / file)
        main, argv = command(rng, folder, file)
        out, err = StringIO(), StringIO()
        signal.alarm(30)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main(as_text(*argv))
            outcomes["read"] += 1
        except SystemExit as end:
            lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
            outcomes[f"exit {end.code}"] += 1
            if end.code not in (1, 2) or len(lines) != 1:
                wrong.append(f"seed {seed}, {file}: exit {end.code}, {err.getvalue()!r:.300}")
        except BaseException as problem:
            wrong.append(f"seed {seed}, {file}, {main.__module__}: {problem!r:.200}")
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
    print(dict(outcomes))
    assert not wrong, "\n".join(wrong)
