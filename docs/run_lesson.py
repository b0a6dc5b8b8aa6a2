"""Run the cells of docs/lesson.ipynb in order, without Jupyter, and store what they print and draw in it:

    python docs/run_lesson.py
"""

import ast
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

NOTEBOOK = Path(__file__).with_name("lesson.ipynb")


def run(source, names, n=None):
    """Run a cell, whose variables live in the dict `names`: its outputs in the notebook's form."""
    body = ast.parse(source).body
    shown = body.pop() if isinstance(body[-1], ast.Expr) and not source.endswith(";") else None
    with redirect_stdout(io.StringIO()) as said:
        exec(compile(ast.Module(body, []), f"cell {n}", "exec"), names)
        value = eval(compile(ast.Expression(shown.value), f"cell {n}", "eval"), names) if shown else None
    text = said.getvalue().splitlines(keepends=True)
    outputs = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
    if value is not None:
        kind, form = ("image/svg+xml", value._repr_svg_()) if hasattr(value, "_repr_svg_") else \
            ("text/plain", repr(value))
        outputs.append({"data": {kind: form.splitlines(keepends=True)}, "execution_count": n,
                        "metadata": {}, "output_type": "execute_result"})
    return outputs


if __name__ == "__main__":
    notebook, names = json.loads(NOTEBOOK.read_text(encoding="utf-8")), {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for n, cell in enumerate(code, 1):
        cell["outputs"], cell["execution_count"] = run("".join(cell["source"]), names, n), n
    NOTEBOOK.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
