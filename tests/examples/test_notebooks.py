"""The notebooks run from top to bottom, and end with what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from frameworks import require_framework
from scripts import EXAMPLES

NOTEBOOKS = EXAMPLES / "notebooks"
PROMISED = {
    "pretrain": "assert after.perplexity < before.perplexity / 10, (before, after)",
    "finetune": "assert sum(map(str.__eq__, answers, capitals.values())) >= 5, answers",
}


def cells(notebook: Path) -> list[str]:
    """The code of a notebook, cell by cell."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        ("torch", "pretrain"),
        *(
            pytest.param(*case, marks=pytest.mark.slow("users"))
            for case in (("torch", "finetune"), ("mindspore", "pretrain"), ("mindspore", "finetune"))
        ),
    ],
)
def test_a_notebook_runs(name: str, tmp_path: Path, framework: str) -> None:
    require_framework(framework)
    script = "\n".join(
        [
            "import matplotlib; matplotlib.use('agg')",
            f"import tandem.frameworks; tandem.frameworks.FRAMEWORKS = (tandem.frameworks.{framework.upper()},)",
            *cells(NOTEBOOKS / f"{name}.ipynb"),
            PROMISED[name],
        ]
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}_notebook"]
    assert "iteration       60/      60" in done.stderr


def test_notebooks_hold_no_output() -> None:
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        content = json.loads(notebook.read_text(encoding="utf-8"))
        assert all(not cell.get("outputs") for cell in content["cells"])
    assert {notebook.stem for notebook in NOTEBOOKS.glob("*.ipynb")} == PROMISED.keys()
