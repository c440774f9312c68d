"""The `gguf` package of llama.cpp, imported where it is needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from tandem.errors import UserError


def gguf() -> ModuleType:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(f"--gguf needs the package gguf ({error}): pip install 'tandem-llm[gguf]'") from None
