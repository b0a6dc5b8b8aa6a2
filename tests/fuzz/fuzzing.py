"""Random files, each read as its reference implementation reads it, or refused: what these tests share.

`python -m pytest tests/fuzz --fuzz 2000 -s` tries so many of each kind, and says what became of them.
"""

import copy
import random
import traceback
import warnings
from collections import Counter

JUNK = [None, True, False, 0, -1, 3, 1.5, float("nan"), 1e300, "", "x", "answer", [], [1], ["x"], {},
        {"a": 1}, [[]], [None], [{}], [["causal", "answer"]]]


def judge_all(request, judge):
    """Call judge(rng), which draws a case, looks at it and says in words what became of it; tell how often
    it said what, and fail with the rounds in which it failed."""
    warnings.simplefilter("ignore")
    counts, wrong = Counter(), []
    for seed in range(request.config.getoption("--fuzz")):
        try:
            counts[judge(random.Random(seed))] += 1
        except Exception:
            wrong.append(f"seed {seed}: {traceback.format_exc()}")
    total = Counter(what.split(":")[0] for what in counts.elements())
    print("", dict(total), *(f"{n:6} {what}" for what, n in counts.most_common()), sep="\n")
    assert not wrong, f"{len(wrong)} are wrong\n" + "\n".join(wrong[:5])


def one(*forms):
    """In a form, see `fill`: any of these stands there."""
    return lambda rng: fill(rng, rng.choice(forms))


def fill(rng, form):
    """A form of JSON, in which functions of rng stand for what they draw."""
    if callable(form):
        return form(rng)
    if isinstance(form, dict):
        return {key: fill(rng, value) for key, value in form.items()}
    return [fill(rng, part) for part in form] if isinstance(form, list) else form


def some(rng, table, share):
    """So large a share of a table's fields, each with one of its values."""
    return {field: fill(rng, one(*values)) for field, values in table.items() if rng.random() < share}


def edit_json(rng, value, junk=JUNK):
    """A JSON value with one place of it replaced, left out, wrapped or added to."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return rng.choice([*junk, [value], {"a": value}])
    value, how = copy.copy(value), rng.random()
    key = rng.choice([*value] if isinstance(value, dict) else range(len(value)))
    if how < 0.1:
        del value[key]
    elif how < 0.2 and isinstance(value, dict):
        value[rng.choice(["new", "type", "content", *value])] = rng.choice(junk)
    elif how < 0.2:
        value.insert(key, rng.choice([*junk, value[key]]))
    else:
        value[key] = edit_json(rng, value[key], junk)
    return value
