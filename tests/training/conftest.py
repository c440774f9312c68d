"""Whole runs have a shallower toy: what is shown of them does not depend on its depth, and their time does."""

from __future__ import annotations

import pytest

from workspace import Workspace, make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A toy job of two layers, which tests read and do not change."""
    return make_workspace(tmp_path_factory.mktemp("shallow"), num_layers=2)
