"""Random spellings of the same few folders and files, from anywhere, with others of their names beside them:
they mean the same settings and scores, or are refused in one line."""

import os
from pathlib import Path

from cli.settings import check, new_parser, settings_of, typed
from cli.terminal import Progress
from experiments.evaluate import SCORING, score
from files.disk import write_files
from fuzzing import judge_all
from tiny import tiny_bitune, write_checkpoint, write_run

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
