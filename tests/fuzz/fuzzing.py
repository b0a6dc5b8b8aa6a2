"""Random files, each read as its reference implementation reads it, or refused: what these tests share.

`python -m pytest tests/fuzz --fuzz 2000 -s` tries so many of each kind, and says what became of them.
"""

import copy
import random
import warnings

JUNK = [None, True, False, 0, -1, 3, 1.5, float("nan"), 1e300, "", "x", "answer", [], [1], ["x"], {},
        {"a": 1}, [[]], [None], [{}], [["causal", "answer"]]]


def draws(request):
    """The number of each round, and its source of random numbers."""
    warnings.simplefilter("ignore")
    for seed in range(request.config.getoption("--fuzz")):
        yield seed, random.Random(seed)


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
