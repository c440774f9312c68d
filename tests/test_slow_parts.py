"""`make test-slow PART=...`: every slow test is in exactly one part."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slow_parts import PARTS, misplaced


def test_every_slow_test_is_in_one_part(misplaced_slow_tests: list[str]) -> None:
    assert misplaced_slow_tests == []


@pytest.mark.parametrize(
    ("marks", "told"),
    [
        ([], []),
        ([pytest.mark.slow("kills")], []),
        ([pytest.mark.slow], ["test: no part"]),
        ([pytest.mark.slow("kils")], ["test: kils"]),
        ([pytest.mark.slow("signals"), pytest.mark.slow("kills")], ["test: signals, kills"]),
    ],
)
def test_a_slow_test_elsewhere_is_found(marks: list[pytest.MarkDecorator], told: list[str]) -> None:
    item: Any = SimpleNamespace(nodeid="test", iter_markers=lambda name: [mark.mark for mark in marks])
    assert misplaced([item]) == told


def test_the_parts_are_listed_for_contributors() -> None:
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sentence = re.search(r"The slow tests have parts: (.*?)\.", page, re.DOTALL)
    assert sentence
    assert re.findall(r"`([\w-]+)`", sentence[1]) == list(PARTS)
