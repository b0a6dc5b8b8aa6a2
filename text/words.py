"""What the rooms share: JSON files, read with errors that say what is wrong, and lists in messages."""

import json


def read_json(path, *needs, kind=dict):
    """The contents of a JSON file. ValueError if it is absent, not of the kind, or lacks a key it needs."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        expected = "object" if kind is dict else "list"
        raise ValueError(f"{path} is not what it should be: expected a JSON {expected}")
    check_has(value, path, *needs)
    return value


def check_has(value, path, *needs):
    """ValueError if what a JSON file holds lacks a key it needs."""
    if lacking := [k for k in needs if value.get(k) is None]:
        raise ValueError(f"{path} lacks {', '.join(lacking)}")


def listed(names, between="; ", most=5):
    """Names or findings in words: the first few, and how many more there are."""
    more = f"{between}and {len(names) - most} more" if len(names) > most else ""
    return between.join(map(str, names[:most])) + more
