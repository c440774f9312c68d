"""Which frameworks can be tested here."""

from __future__ import annotations

import importlib.util

import pytest


def require_framework(name: str) -> str:
    """`name`, or skip the test when that framework is not installed."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'tandem-llm[{name}]'")
    return name
