"""The edits of docs/edits.md, made in a copy of the project:

    python tests/edits.py NAME [NAME ...] FOLDER

An edit's definitions replace those of the same name, or are added, so that it survives changes around them.
"""

import ast
import re
import shutil
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "files", "text", "experiments", "tests", "docs")
BLOCK = re.compile(r"In\s+`([\w/]+\.py)`(?:,\s+class\s+`(\w+)`)?:\n\n```python\n(.*?)```", re.S)


def edits():
    """name -> [(file, class or "", source), ...]: each section of docs/edits.md, its blocks of code."""
    sections = re.split(r"^## (\w+)$", (ROOT / "docs/edits.md").read_text(encoding="utf-8"), flags=re.M)
    return {name: BLOCK.findall(text) for name, text in zip(sections[1::2], sections[2::2])}


def defines(node):
    """What a statement gives a name to."""
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    if isinstance(node, ast.ImportFrom):
        return f"from {node.module}"
    return getattr(node, "name", None)


def change(source, scope, block):
    """`source` with the definitions of `block` in place of its own, at its top level or in a class."""
    for node in ast.parse(block).body:
        tree = ast.parse(source)
        body = next(n for n in tree.body if defines(n) == scope).body if scope else tree.body
        new = textwrap.indent(ast.get_source_segment(block, node), "    " if scope else "")
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            raise ValueError("decorators are not copied")
        lines, old = source.splitlines(), next((n for n in body if defines(n) == defines(node)), None)
        if old:
            lines[old.lineno - 1:old.end_lineno] = [new]
        else:
            lines[body[-1].end_lineno:body[-1].end_lineno] = ["", new]
        source = "\n".join(lines) + "\n"
    return source


def subclass(name, of):
    """The class `of` with an edit of its methods."""
    ((_, scope, block),) = edits()[name]
    assert scope == of.__name__
    own = {}
    exec(block, vars(sys.modules[of.__module__]) | {}, own)
    return type(scope, (of,), own)


def copy_project(folder, *names, slips=()):
    """A copy of the project in `folder`, with the edits `names`, and then slips, (file, old, new), in it."""
    folder = Path(folder)
    shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=lambda at, names: [
        n for n in names if n.startswith((".", "__pycache__", "runs", "reference")) or
        Path(at) == ROOT and n not in FOLDERS and not n.endswith((".py", ".ini"))])
    for file, scope, block in (block for name in filter(None, names) for block in edits()[name]):
        path = folder / file
        path.write_text(change(path.read_text(encoding="utf-8"), scope, block), encoding="utf-8")
    for file, old, new in slips:
        source = (folder / file).read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {file}"
        (folder / file).write_text(source.replace(old, new), encoding="utf-8")
    return folder


if __name__ == "__main__":
    *names, folder = sys.argv[1:] or [""]
    if not names or not edits().keys() >= {*names}:
        sys.exit(f"error: expected names and a folder; the names are {', '.join(edits())}")
    if Path(folder).exists():
        sys.exit(f"error: {folder} exists: expected a new name")
    print(f"wrote {copy_project(folder, *names)}")
