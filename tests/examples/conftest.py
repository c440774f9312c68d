"""A folder to run the scripts in, and launchers that only print what they are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import Site


@pytest.fixture
def launchers(tmp_path: Path) -> Path:
    """A folder with a python that prints its arguments, one a line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    (folder / "python").chmod(0o755)
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)
