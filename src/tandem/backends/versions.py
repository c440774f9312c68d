"""Which versions of a framework this was written for. Others are refused by name, unless they are asked for."""

from __future__ import annotations

import importlib.metadata
import os
import re

# As in pyproject.toml: the first version that is known to do, and the first that nobody has tried.
VERSIONS = {"torch": ((2, 6), (3,)), "mindspore": ((2, 9), (2, 11))}
ANY_VERSION = "TANDEM_ANY_VERSION"  # environment variable


def requirement(package: str) -> str:
    """As pip takes it."""
    first, beyond = (".".join(map(str, version)) for version in VERSIONS[package])
    return f"{package}>={first},<{beyond}"


def untried(package: str) -> str | None:
    """Why the installed version of a framework is refused, and what to do; None when it is not."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # built from source, or under another name: nothing is known of it
    first, beyond = VERSIONS[package]
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if first <= found < beyond or os.environ.get(ANY_VERSION) == "1":
        return None
    return f"pip install '{requirement(package)}', or try {package} {version} with {ANY_VERSION}=1"
