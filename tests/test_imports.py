"""The core imports neither framework, and no vendor package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import tandem

ROOT = Path(tandem.__file__).parent
FOREIGN = ("torch", "mindspore", "transformers", "transformer_engine", "apex", "torch_npu", "safetensors")


def core_modules() -> list[str]:
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[:2] not in BACKENDS]
    names = [".".join(("tandem", *path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    return sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__"))


BACKENDS = {("backends", "torch"), ("backends", "mindspore")}


def test_core_imports_no_framework() -> None:
    """A1, A4: every module outside the two backend packages, imported in a process of its own."""
    modules = core_modules()
    assert "tandem.training.run" in modules
    script = (
        f"import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {FOREIGN!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# A room imports only from rooms that stand below it; rooms of one row do not import each other.
ROWS = (
    {"cli"},
    {"quickstart", "report"},
    {"training", "inference"},
    {"backends"},
    {"checkpoints", "data", "config", "planning"},
    {"parallel"},
    {"models"},
)


def test_dependencies_go_one_way() -> None:
    level = {room: number for number, row in enumerate(ROWS) for room in row}
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0]
        if room not in level:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tandem."):
                other = (node.module or "").split(".")[1]
                if other in level and other != room and level[other] <= level[room]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {node.module}")
    assert not wrong
    assert set(level) == {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}


def test_help_needs_no_framework() -> None:
    script = "import sys; from tandem.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
