"""Bytes on disk: written all or none, by one process at a time; safetensors, read with clear errors."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from text.words import read_json

HELD = {}               # the folders that this process holds, and the open file that does it


class InUse(ValueError):
    """Another process holds a folder."""


def hold(folder, wait=False):
    """Keep other processes from writing into a folder as long as this one lives, or until `let_go`. InUse if
    another holds it, or wait for that one. (Where the file system knows no locks, nothing is kept off.)"""
    folder = Path(folder).resolve()
    if fcntl is None or folder in HELD:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise InUse(f"{folder} is in use: another process trains there. Wait for it, or take another "
                    "folder") from None
    except OSError:
        pass
    HELD[folder] = file


def let_go(folder):
    if file := HELD.pop(Path(folder).resolve(), None):
        file.close()


@contextmanager
def one_at_a_time(folder):
    """What several processes do in a folder, one after the other."""
    hold(folder, wait=True)
    try:
        yield
    finally:
        let_go(folder)


def write_files(folder, files):
    """Write files, name to bytes, into a folder, all or none: whenever the process dies, the folder holds
    either what it held before or, once `finish_writing` has looked at it, all of the new. A full disk
    leaves the old."""
    folder = Path(folder)
    finish_writing(folder)
    drafts = [folder / f"{name}.part" for name in files]
    try:
        names = folder / "renaming.part", json_bytes(list(files))
        for draft, data in [*zip(drafts, files.values()), names]:
            draft.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        os.replace(folder / "renaming.part", folder / "renaming.json")  # from here on, the new ones count
    except BaseException:
        if not (folder / "renaming.json").exists():
            for draft in [*drafts, folder / "renaming.part"]:
                draft.unlink(missing_ok=True)
        raise
    finish_writing(folder)


def finish_writing(folder):
    """Give the files of a complete `write_files` their names, if it died before it had."""
    folder = Path(folder)
    if (folder / "renaming.json").exists() and not held_elsewhere(folder):
        for name in read_json(folder / "renaming.json", kind=list):
            if (folder / f"{name}.part").exists():
                os.replace(folder / f"{name}.part", folder / name)
        (folder / "renaming.json").unlink()


def held_elsewhere(folder):
    """Whether another process holds a folder: then it is alive, and does its own renaming."""
    folder = Path(folder).resolve()
    if folder in HELD or not (folder / ".lock").exists():
        return False
    try:
        hold(folder)
    except ValueError:
        return True
    let_go(folder)
    return False


def json_bytes(value):
    return (json.dumps(value, indent=2) + "\n").encode()


def tensor_bytes(tensors):
    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"format": "pt"})


def check_types(value, where, **types):
    """ValueError for a field that is there and not of its type, or not of one of its types."""
    for name, kinds in types.items():
        if name in value and type(value[name]) not in (kinds if isinstance(kinds, tuple) else (kinds,)):
            raise ValueError(f"{where}: {name} is {value[name]!r:.60}, which it cannot be")


def read_tensors(path):
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
