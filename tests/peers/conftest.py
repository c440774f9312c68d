"""Megatron-core itself, where it is installed. It is imported when a test asks for it, for that takes seconds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

# the toys and the comparisons of tests/backends serve here, too
sys.path.append(str(Path(__file__).resolve().parents[1] / "backends"))
NOT_HERE = "megatron-core is not installed: pip install 'tandem-llm[dev]'"


@pytest.fixture
def megatron() -> ModuleType:
    """`megatron.core`, or skip the test."""
    return pytest.importorskip("megatron.core", reason=NOT_HERE)


@pytest.fixture(scope="module")
def mcore() -> Iterator[ModuleType]:
    """The helpers of `mcore_model`, in a group of one process."""
    pytest.importorskip("megatron.core", reason=NOT_HERE)
    mcore = importlib.import_module("mcore_model")
    with mcore.on_cpu(), mcore.alone():
        yield mcore
