"""Both frameworks at once, for tests that compare them."""

from __future__ import annotations

import pytest

from frameworks import require_framework


@pytest.fixture
def both_frameworks() -> tuple[str, str]:
    return require_framework("torch"), require_framework("mindspore")
