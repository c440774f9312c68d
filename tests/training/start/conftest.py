"""What a run begins with is checked against a toy that is deep enough to be laid out in many ways."""

from __future__ import annotations

import pytest

from workspace import Workspace, make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A toy job of four layers, which tests read and do not change."""
    return make_workspace(tmp_path_factory.mktemp("workspace"))
