"""What the rooms share: JSON from outside, with errors that say what is wrong, and words for messages."""

import hashlib
import json
import os
import shlex
import sys
from pathlib import Path

OTHER_FILES = {         # by what they begin with
    b"PAR1": "a parquet file", b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "compressed by gzip",
    b"\xff\xfe": "UTF-16 text", b"version https://git-lfs": "a Git LFS pointer, not the file that it is for",
}

TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list",
         dict: "an object"}


def check_kind(path, begins):
    """ValueError for a file that begins with these bytes, if it is of another kind than text."""
    if kinds := [kind for magic, kind in OTHER_FILES.items() if begins.startswith(magic)]:
        raise ValueError(f"{path} is {kinds[0]}")


def read_json(path, kind=dict, absent=None):
    """The contents of a JSON file, or what stands for one that is `absent`. ValueError if there is nothing,
    or nothing of the kind."""
    if absent is not None and not path.is_file():
        return absent
    if not path.exists():
        raise ValueError(f"{path.parent} has no {path.name}")
    check_kind(path, path.read_bytes())
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} is not what it should be: expected {TYPES[kind]}")
    return value


def check_fields(part, where, table, neutral=(), nothing=()):
    """The fields of a JSON object from outside, by a table: name -> (form, default). A form is a type, a
    value, a function that says whether a value fits (its docstring: what it expects), or a tuple of these,
    of which one must fit. (true is no 1.) The default stands for a field that is left out; where it is ...,
    the field must be there. A field that is not in the table is refused, unless it is `neutral`, which may
    hold anything, or holds what is of the form `nothing`. ValueError for what is refused, lacking or of
    another form."""
    if not isinstance(part, dict):
        raise ValueError(f"{where} is {part!r:.60}, expected an object")
    others = part.keys() - table.keys() - set(neutral)
    if odd := [name for name in part if name in others and not fits(part[name], nothing)]:
        raise ValueError(f"{where} has {listed(odd, ', ')}, which is not known here")
    if lacking := [name for name in table if table[name][1] is ... and part.get(name) is None]:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    for name, (form, _) in table.items():
        if name in part and not fits(part[name], form):
            raise ValueError(f"{where} has the {name} {part[name]!r:.60}, expected {form_in_words(form)}")
    return {name: part.get(name, default) for name, (_, default) in table.items()}


def number_within(kind, low=0, high=sys.float_info.max):
    """A form of `check_fields`: a number of a kind, int or float, from low to high."""
    def within(value):
        return type(value) in (int, kind) and low <= value <= high

    limit = f"of at least {low}" if high == sys.float_info.max else f"from {low} to {high}"
    within.__doc__ = f"{'a whole' if kind is int else 'a'} number {limit}"
    return within


def fits(value, form):
    """Whether a value is of a form of `check_fields`."""
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if callable(form) and not isinstance(form, type):
        return form(value)
    return form is object or type(value) is form or type(value) is type(form) and value == form


def form_in_words(form):
    if isinstance(form, tuple):
        return " or ".join(map(form_in_words, form))
    if isinstance(form, type):
        return TYPES[form]
    return form.__doc__ if callable(form) else json.dumps(form)


def digest(value):
    """Letters that stand for a value: another value, as it is written down, has others."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def listed(names, between="; ", most=5):
    """Names or findings in words: the first few, and how many more there are."""
    more = f"{between}and {len(names) - most} more" if len(names) > most else ""
    return between.join(map(str, names[:most])) + more


def to_type(script, *words):
    """A command of ours as it is typed, in whatever folder: `to_type("sample.py", "--adapter", run)`."""
    here = os.path.relpath(Path(__file__).parents[1] / script)
    return shlex.join(["python", here, *map(str, words)])
