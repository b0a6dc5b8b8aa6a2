"""The README's "edits to try", applied to the source as a reader would."""

import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent


def edits():
    """name -> (file, [(old, new), ...]), from the README's diff blocks, each under a line that names it and
    its file."""
    found = {}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, file, block in re.findall(
        r"^\*\*(\w+)\*\* \(`(\w+\.py)`\).*?```diff\n(.*?)```", text, re.M | re.S
    ):
        hunks = []
        for hunk in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", block, re.M):
            hunks.append(tuple(re.sub(r"^[-+]", "", part, flags=re.M) for part in hunk))
        found[name] = (file, hunks)
    return found


def edited(name):
    """The edited file as a module of its own."""
    file, hunks = edits()[name]
    source = (ROOT / file).read_text(encoding="utf-8")
    for old, new in hunks:
        assert source.count(old) == 1, (
            f"edit {name!r}: these lines stand {source.count(old)} times in {file}:\n{old}"
        )
        source = source.replace(old, new)
    module = types.ModuleType(f"{file.removesuffix('.py')}_{name}")
    sys.modules[module.__name__] = module
    exec(compile(source, f"{file} edited by {name}", "exec"), module.__dict__)
    return module
