"""The core imports neither framework, and no vendor package."""

from __future__ import annotations

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


def test_help_needs_no_framework() -> None:
    script = "import sys; from tandem.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
