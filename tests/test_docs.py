"""What README and docs/ say exists, the house is as they say, the one page is the project's method, and the
lesson shows what it says it shows."""


import json
import random
import re
import runpy
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import bitune as method_of
from bitune import Bitune
from edits import ROOT
from lora import add_adapter
from model import Config, Llama

NAMES = [ROOT / "README.md", ROOT / "docs/lesson.ipynb", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {page: page.read_text(encoding="utf-8") for page in NAMES}
CODE = sorted(f for f in ROOT.rglob("*.py") if not any(p.startswith(".") for p in f.relative_to(ROOT).parts))
COMMANDS = [f for f in CODE if "\n@command\ndef main(" in f.read_text(encoding="utf-8")]


def anchors(page):
    """The anchors of a page's headings, as they are made on the web: lower case, spaces to hyphens."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_are_there(page):
    for target, anchor in re.findall(r"\]\(((?!http)[^)#]*)#?([^)]*)\)", PAGES[page]):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}#{anchor}"
    for module, file in re.findall(r"python (?:-m (experiments[\w.]*)|([\w/]+\.py))", PAGES[page]):
        path = ROOT / (file or module.replace(".", "/"))
        assert any(p.is_file() for p in (path, path.with_suffix(".py"), path / "__main__.py")), path


def test_flags_exist(capsys):
    """Every flag that a page names is one of a command's."""
    known = {"--reference", "--fuzz", "--edits", "--local-dir"}
    for file in COMMANDS:
        with pytest.raises(SystemExit):
            import_module(".".join(file.relative_to(ROOT).with_suffix("").parts)).main(["--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for page, text in PAGES.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
        assert named <= known, f"{page.name}: {named - known}"


# ---- the teaching room -----------------------------------------------------------------------------------

PLACES = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
          "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
          "input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@torch.no_grad()
def copied(page, small, method):
    """The page's decoder with all that it holds, as the project's classes."""
    rope = {"rope_type": "default", "rope_theta": page.TURN}
    model = Llama(Config("llama", len(page.WORDS), page.C, page.WIDE, page.LAYERS, 1, 1, page.C, 64, rope,
                         page.C, "silu", "rms", 1e-5, tie_word_embeddings=True))
    model.model.embed_tokens.weight.copy_(small.embed)
    model.model.norm.weight.copy_(small.norm.weight)
    for name in page.SETS:
        add_adapter(model, name, rank=page.RANK, lora_alpha=page.RANK)          # of scale 1
    for path, place in PLACES.items():
        for block, layer in zip(small.blocks, model.model.layers):
            theirs, ours = getattr(block, place), layer.get_submodule(path)
            ours.weight.copy_(theirs.W if hasattr(theirs, "W") else theirs.weight)
            for name in page.SETS * hasattr(theirs, "W"):
                ours.sets[name].lora_A.copy_(theirs.A[name])
                ours.sets[name].lora_B.copy_(theirs.B[name])
    bitune = Bitune(model, method, page.c)
    for theta, column in zip([bitune.theta_key, bitune.theta_value] if bitune.mixes else [], small.theta.T):
        theta.copy_(column)
    return bitune


@pytest.mark.reference
@pytest.mark.parametrize("method", ["bitune", "causal"])
def test_the_page_computes_what_the_project_does(method):
    page = SimpleNamespace(**runpy.run_path(str(ROOT / "docs/one_page.py")))
    torch.manual_seed(1), random.seed(1)
    small, both = page.Decoder(), method == "bitune"
    with torch.no_grad():
        for p in small.parameters():
            p.add_(0.1 * torch.randn_like(p))                   # B and the norms are no longer as they start
    ids = page.rows(3, True, 1)
    prompts, answers = ids[:, :-5], ids[:, -5:]
    bitune = copied(page, small, method)
    with torch.inference_mode():
        logits, _ = bitune(prompts.tolist(), answers.tolist())
        stream = torch.cat((prompts[:, -1:], answers[:, :-1]), dim=1)
        theirs, _ = small(stream, "answer", small.read(prompts[:, :-1], both))
        torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=1e-5)
        loss = bitune.losses(prompts.tolist(), answers.tolist()).mean()
        torch.testing.assert_close(small.loss(prompts, answers, both), loss, atol=1e-5, rtol=0)
    for prompt, said in zip(prompts, bitune.generate(prompts.tolist(), 5)):
        greedy = small.generate(prompt[None], both)
        assert greedy == said[:len(greedy)]


@pytest.mark.reference
def test_the_lesson_shows_what_it_has_stored_and_the_solutions_solve_it(monkeypatch):
    """Once something has been trained, its numbers differ from machine to machine; its words do not."""
    lesson = SimpleNamespace(**runpy.run_path(str(ROOT / "docs/run_lesson.py")))
    monkeypatch.chdir(ROOT / "docs")                            # where Jupyter starts
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(method_of, "METHODS", {**method_of.METHODS})
    names, of = {}, lambda output: output.get("data") or {"text/plain": output["text"]}
    for cell in json.loads(lesson.NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        shown = lesson.run(source, names) if cell["cell_type"] == "code" else []
        for form, stored in zip(map(of, shown), map(of, cell.get("outputs", [])), strict=True):
            one, other = ("".join(f.get("text/plain", "")) for f in (form, stored))
            assert form.keys() == stored.keys() and NUMBER.sub("#", one) == NUMBER.sub("#", other)
            one, other = ([float(n) for n in NUMBER.findall(text)] for text in (one, other))
            assert "history" in names or one == pytest.approx(other, rel=5e-3, abs=5e-3), source
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/solutions.md").read_text("utf-8"), re.S):
        lesson.run(code, names)
    assert names["history"][-1][1] > 0.85 and names["lora"][-1][1] < 0.5


# ---- the rooms -------------------------------------------------------------------------------------------

# Each room imports of the project only what stands here, but for a function that hands over to files.
ROOMS = {"model": "", "lora": "model", "bitune": "model", "text": "text", "sample": "text files cli",
         "files": "model lora bitune text files", "cli": "model lora bitune text files cli",
         "train": "lora bitune text files cli"}


def test_imports_go_one_way():
    for file in CODE:
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        names = re.findall(r"^(?:import|from) (\w+)", file.read_text(encoding="utf-8"), re.M)
        wrong = {*ROOMS, "experiments"} & {*names} - {*ROOMS.get(room, " ".join(names)).split()}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"
