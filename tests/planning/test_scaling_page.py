"""docs/lab/layouts.md holds what the plan says today."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/scaling_tables.py"


@pytest.fixture(scope="module")
def scaling_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_tables", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("hardware", ["h100", "910b"])
def test_tables_of_sizes(scaling_tables: ModuleType, hardware: str) -> None:
    """All of them: `python benchmarks/scaling_tables.py --write` changes nothing."""
    page = scaling_tables.PAGE.read_text(encoding="utf-8")
    (table,) = re.findall(rf"<!-- table: sizes {hardware} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert table == scaling_tables.markdown(scaling_tables.sizes(hardware))


def test_every_table_is_made_by_the_script(scaling_tables: ModuleType) -> None:
    page = scaling_tables.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == len(scaling_tables.TABLE.findall(page)) == 7
    assert {name for _, name, _, _ in scaling_tables.TABLE.findall(page)} == set(scaling_tables.TABLES)
