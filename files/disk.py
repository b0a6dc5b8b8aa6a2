"""Bytes on disk: written all or none, by one process at a time; safetensors, read with clear errors."""

import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from text.words import listed, read_json


class InUse(ValueError):
    """Another process holds a folder."""


def lock_file(path, trouble):
    """Open a file for reading and writing, and lock it until it is closed; InUse, `trouble` in words, if
    another process has locked it. (Some file systems know no locks: there nothing is kept off.)"""
    file = open(path, "a+", encoding="utf-8")
    file.seek(0)
    with suppress(OSError):
        try:
            fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"{path.parent} {trouble}") from None
    return file


@contextmanager
def locked(folder):
    """Keep other processes from writing into a folder; InUse if another is at it. What a killed save has
    left undone is done first. Nothing is left of a folder in which nothing was written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trouble = "is in use: another process trains there. Wait for it, or take another folder"
    with lock_file(folder / ".lock", trouble):
        finish_renaming(folder)
        try:
            yield
        finally:
            if [f.name for f in folder.iterdir()] == [".lock"]:
                shutil.rmtree(folder)


def finish_saves(folder):
    """Before a folder is read: finish what a killed save has begun, unless a living process is at it."""
    if (Path(folder) / "renaming.json").exists():
        with suppress(InUse), locked(folder):
            pass


def write_files(folder, files):
    """Write files, name to bytes, into a folder, all or none: whenever the process dies, the folder holds
    either what it held before or, once it is settled, all of the new. A full disk leaves the old."""
    folder = Path(folder)
    drafts = [folder / f"{name}.part" for name in files]
    names = folder / "renaming.part"
    try:
        for draft, data in [*zip(drafts, files.values()), (names, json_bytes(list(files)))]:
            draft.parent.mkdir(parents=True, exist_ok=True)
            write_through(draft, data)
        os.replace(names, folder / "renaming.json")         # from here on, the new ones count
    except BaseException:
        if not (folder / "renaming.json").exists():
            for draft in [*drafts, names]:
                draft.unlink(missing_ok=True)
        raise
    finish_renaming(folder)


def finish_renaming(folder):
    """Give the files of a complete `write_files` their names."""
    if (folder / "renaming.json").exists():
        for name in read_json(folder / "renaming.json", kind=list):
            if (folder / f"{name}.part").exists():
                os.replace(folder / f"{name}.part", folder / name)
        (folder / "renaming.json").unlink()


def write_file(path, data):
    """Write one file whole or not at all, whoever else writes it at the same time."""
    if path.exists() and not path.is_file():        # a folder; or a pipe, which would become a file
        raise ValueError(f"{path} is there, and is no file: choose another name")
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write_through(draft, data)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_through(path, data):
    """Write bytes through to the disk, so that a rename that follows can never stand for half of them."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def json_bytes(value):
    return (json.dumps(value, indent=2) + "\n").encode()


def tensor_bytes(tensors):
    here = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    memory = lambda t: t.untyped_storage().data_ptr()
    owner = {memory(t): name for name, t in here.items()}
    own = {name: t if owner[memory(t)] == name else t.clone() for name, t in here.items()}      # none shared
    return save(own, {"format": "pt"})


def read_tensors(path):
    """The tensors of a safetensors file, by name. ValueError if it is absent, damaged, or holds NaN."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        pickle = path.with_suffix(".bin")
        beside = f", and {pickle.name}, a pickle, is not read: convert it" if pickle.exists() else ""
        raise ValueError(f"{path.parent} has no {path.name}{beside}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    for name, t in tensors.items():
        if not t.float().isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity: the file is damaged")
    return tensors


def fill(tensors, have, path):
    """Fill tensors with those of the same names that a file holds. ValueError, with nothing filled, unless
    these are just the ones that are wanted, and of their shapes."""
    shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (tensors, have)]
    if wrong := differences(*shapes):
        raise ValueError(f"{path} does not fit the model: {listed(wrong)}")
    for name, tensor in tensors.items():
        tensor.data.copy_(have[name])


def differences(want, have):
    """All that is wrong with tensors `have`, name -> shape, where `want` is expected, in words."""
    wrong = [f"missing {n} {want[n]}" for n in want.keys() - have.keys()]
    wrong += [f"unexpected {n} {have[n]}" for n in have.keys() - want.keys()]
    both = want.keys() & have.keys()
    return sorted(wrong + [f"{n} is {have[n]}, expected {want[n]}" for n in both if have[n] != want[n]])
