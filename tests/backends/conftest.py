"""Which backends can be tested here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import tandem.backends

BACKENDS = Path(tandem.backends.__file__).parent


def require_backend(framework: str) -> str:
    """`framework`, or skip the test when its package or its engine is not here."""
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    if not (BACKENDS / framework / "engine.py").is_file():
        pytest.skip(f"tandem.backends.{framework} has no engine yet")
    return framework


@pytest.fixture(params=["torch", "mindspore"])
def framework(request: pytest.FixtureRequest) -> str:
    return require_backend(request.param)


@pytest.fixture
def both_frameworks() -> tuple[str, str]:
    return require_backend("torch"), require_backend("mindspore")
