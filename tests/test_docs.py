"""What README and docs/ say exists, and the house is as they say."""

import ast
import re
from importlib import import_module

import pytest

from edits import ROOT

PAGES = [ROOT / "README.md", ROOT / "docs/lesson.ipynb", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ["train", "sample", *(f"experiments.{name}" for name in (
    "evaluate", "merge", "cost", "ablate", "benchmark", "demo.__main__", "demo.depth", "demo.pretrain",
    "real.alphas"))]
CODE = sorted(f for f in ROOT.rglob("*.py") if not any(p.startswith(".") for p in f.relative_to(ROOT).parts))


def anchors(page):
    """The anchors of a page's headings, as they are made on the web: lower case, spaces to hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(((?!http)[^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}#{anchor}"


def test_flags_exist(capsys):
    """Every flag that a page names is one of a command's."""
    known = {"--reference", "--fuzz", "--edits", "--local-dir"}
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            import_module(name).main(["--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.name}: {named - known}"


def test_commands_and_files_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for module in re.findall(r"python -m (experiments[\w.]*)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
        for file in re.findall(r"python ([\w/]+\.py)", text):
            assert (ROOT / file).exists(), file


# Each room imports of the project only what stands here, but for a function that hands over to files.
ROOMS = {
    "model": [], "lora": ["model"], "bitune": ["model"], "text": ["text"],
    "files": ["model", "lora", "bitune", "text", "files"],
    "cli": ["model", "lora", "bitune", "text", "files", "cli"],
    "train": ["lora", "bitune", "text", "files", "cli"], "sample": ["text", "files", "cli"],
}


def test_imports_go_one_way():
    for file in CODE:
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in ROOMS:
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) else []
                own = {n.split(".")[0] for n in names} & {*ROOMS, "experiments"}
                assert own <= set(ROOMS[room]), f"{file.relative_to(ROOT)} imports {own - set(ROOMS[room])}"
