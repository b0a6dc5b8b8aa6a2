"""Random files, each read as its reference implementation reads it, or refused: what these tests share.

`python -m pytest tests/fuzz --fuzz 2000 -s` tries so many of each kind, and says what became of them.
"""

import json
import os
import random
import re
import warnings
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"


def verdict(folder, ours, reference):
    """What becomes of a folder, in one line that begins with "WRONG" if it may not be. ours() and
    reference(length) read it and give logits."""
    try:
        got, error = ours(), None
    except Exception as problem:
        error = problem
    message = re.sub(r"\d+", "#", str(error).replace(str(folder), "FOLDER"))
    if isinstance(error, ValueError):
        return f"refused: {message[:110]}" if "\n" not in message else f"WRONG: of two lines: {message}"
    try:
        want = reference(None if error else got.shape[1])
    except Exception as problem:
        which = f"reference: {type(problem).__name__}"
        return f"WRONG exception {error!r:.90} ({which})" if error else f"read, but not by the {which}"
    if error:
        return f"WRONG exception {error!r:.90} (the reference reads it)"
    if not want.isfinite().all():
        return "read, but not finite by the reference"
    same = got.shape == want.shape and (got - want).abs().max() < 1e-3 * want.abs().max()
    return "read" if same else "WRONG: read otherwise"


def kind(result):
    return result.split(" (")[0]


def minimal(case, needed, result, judge):
    """The case without what can be left out while the result stays; the fields `needed` have to stay."""
    for field in [*case]:
        less = {k: v for k, v in case.items() if k != field}
        if field not in needed and kind(judge(less)) == kind(result):
            case = less
    return case


def run(draw, needed, judge, n):
    """Judge n random cases; returns those that are wrong, one for each kind and set of fields."""
    warnings.simplefilter("ignore")
    counts, wrong = Counter(), {}
    for seed in range(n):
        case = draw(random.Random(seed))
        result = judge(case)
        counts[result] += 1
        if result.startswith("WRONG"):
            least = minimal(case, needed, result, judge)
            told = f"seed {seed}: {result}\n       {json.dumps(least)}"
            wrong.setdefault((kind(result), *sorted(set(least) - set(needed))), []).append(told)
    total = Counter(re.split("[:,(]| exc", result)[0] for result in counts.elements())
    print("", dict(total), *(f"{n:6} {what}" for what, n in counts.most_common()), sep="\n")
    print(*(f"{len(told):4} x {told[0]}" for told in wrong.values()), sep="\n")
    return wrong
