"""Engines that run the train step: one package per framework, one protocol, imported lazily.

This is the one place where a backend is chosen.
"""

from __future__ import annotations

import importlib
import importlib.util

from tandem.backends.interface import Engine, EngineSettings
from tandem.errors import UserError, nearest
from tandem.models.config import ModelConfig

# Accepted spelling of --ai-framework -> package under tandem.backends
FRAMEWORKS = {"mindspore": "mindspore", "torch": "torch", "pytorch": "torch"}


def installed_frameworks() -> list[str]:
    """The packages of FRAMEWORKS that can be imported here, PyTorch first."""
    return [name for name in ("torch", "mindspore") if importlib.util.find_spec(name) is not None]


def check_framework(ai_framework: str) -> str:
    """The package under tandem.backends that `--ai-framework` names.

    Raises:
        UserError: the name is unknown, or the framework is not installed.
    """
    if ai_framework not in FRAMEWORKS:
        names = list(FRAMEWORKS)
        raise UserError(f"--ai-framework {ai_framework!r}: expected one of {names}{nearest(ai_framework, names)}")
    package = FRAMEWORKS[ai_framework]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--ai-framework {ai_framework}: {package} is not installed; pip install 'tandem-llm[{package}]'"
        )
    return package


def create_engine(ai_framework: str, config: ModelConfig, settings: EngineSettings) -> Engine:
    """Build an engine with undefined weights: load some before use.

    Raises:
        UserError: the name is unknown, the framework is not installed, or the device is not there.
    """
    package = check_framework(ai_framework)
    module = importlib.import_module(f"tandem.backends.{package}.engine")
    engine: Engine = module.create(config, settings)
    return engine
