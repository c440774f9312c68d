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
    """Every module outside the two backend packages, imported in a process of its own."""
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
    {"bench"},
    {"quickstart", "report", "server"},
    {"training"},
    {"harness"},
    {"inference"},
    {"conversion"},
    {"backends"},
    {"checkpoints", "data", "config", "planning"},
    {"launch", "parallel"},
    {"models"},
    {"files"},
)
MOST_LINES = 450
TABLES = {"config/settings.py"}  # every setting, one after the other


def imported(path: Path) -> set[str]:
    """The modules of tandem that a file imports anywhere in it, each by its full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tandem":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in FILES else node.module or "")
    return names


def module_name(path: Path) -> str:
    return ".".join(("tandem", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


FILES = {module_name(path): path for path in ROOT.rglob("*.py")}


def test_dependencies_go_one_way() -> None:
    level = {room: number for number, row in enumerate(ROWS) for room in row}
    wrong = []
    for path in FILES.values():
        room = path.relative_to(ROOT).parts[0]
        if room not in level:
            continue
        for module in imported(path):
            other = [*module.split("."), ""][1]
            if other in level and other != room and level[other] <= level[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong
    assert set(level) == {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}


def test_no_module_imports_itself_through_others() -> None:
    """A circle would be named here, whether its imports stand at the top of files or inside functions."""
    arrows = {module: imported(path) & FILES.keys() for module, path in FILES.items()}
    while leaves := [module for module, targets in arrows.items() if not targets]:
        for module in leaves:
            del arrows[module]
        for targets in arrows.values():
            targets.difference_update(leaves)
    assert not arrows, f"these modules import each other: {sorted(arrows)}"


def test_no_file_is_long() -> None:
    tests = Path(__file__).parent
    files = [(ROOT, path) for path in FILES.values()] + [(tests, path) for path in tests.rglob("*.py")]
    lengths = {str(path.relative_to(of)): len(path.read_text(encoding="utf-8").splitlines()) for of, path in files}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES and name not in TABLES}


def test_help_needs_no_framework() -> None:
    script = "import sys; from tandem.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
