"""Examples in docstrings are true: each `>>>` gives the result below it."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from frameworks import require_framework

SOURCE = Path(__file__).parent.parent / "src"
NEED_A_MODEL = {SOURCE / "tandem" / name for name in ("api.py", "inference/chat.py")}
WITH_EXAMPLES = sorted(
    {path for path in SOURCE.rglob("*.py") if re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE)} - NEED_A_MODEL
)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_examples_give_the_result_that_is_written(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if parts[1] == "backends" and len(parts) > 3:
        require_framework(parts[2])
    module = importlib.import_module(".".join(parts))
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed
