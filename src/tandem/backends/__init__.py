"""Engines that run the train step: one package per framework, one protocol, imported lazily.

This is the one place where a backend is chosen.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import numpy as np

from tandem.backends.interface import Engine, EngineSettings, Profiler
from tandem.backends.versions import untried
from tandem.data.batch import MicroBatch
from tandem.errors import UserError, nearest
from tandem.models.config import ModelConfig
from tandem.parallel.launch import Launcher
from tandem.parallel.world import Communicator, SingleProcess, World

# Accepted spelling of --ai-framework -> package under tandem.backends
FRAMEWORKS = {"mindspore": "mindspore", "torch": "torch", "pytorch": "torch"}


def installed_frameworks() -> list[str]:
    """The packages of FRAMEWORKS that can be imported here, PyTorch first."""
    return [name for name in ("torch", "mindspore") if importlib.util.find_spec(name) is not None]


def has_transformers() -> bool:
    """Whether Hugging Face's own models can be run here."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def transformers_logits(folder: Path, batch: MicroBatch) -> np.ndarray:
    """What Hugging Face's own model computes from its folder, in fp32: [t, vocabulary]."""
    logits: np.ndarray = importlib.import_module("tandem.backends.torch.transformers_model").logits(folder, batch)
    return logits


def check_framework(ai_framework: str) -> str:
    """The package under tandem.backends that `--ai-framework` names.

    Raises:
        UserError: the name is unknown, or the framework is not installed, or in a version that was never tried.
    """
    if ai_framework not in FRAMEWORKS:
        names = list(FRAMEWORKS)
        raise UserError(f"--ai-framework {ai_framework!r}: expected one of {names}{nearest(ai_framework, names)}")
    package = FRAMEWORKS[ai_framework]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--ai-framework {ai_framework}: {package} is not installed; pip install 'tandem-llm[{package}]'"
        )
    if remedy := untried(package):
        raise UserError(f"--ai-framework {ai_framework}: this version of {package} was never tried here: {remedy}")
    return package


def connect(ai_framework: str, world: World, device: str | None, timeout_minutes: float) -> Communicator:
    """Join the framework's own process group: before an engine of several processes is built, and once.

    Args:
        timeout_minutes: how long a collective waits for a process that is late.

    Raises:
        UserError: the framework is not installed, the device is not there, or the others did not come.
    """
    package = check_framework(ai_framework)
    if world.size == 1:
        return SingleProcess()
    module = importlib.import_module(f"tandem.backends.{package}.communication")
    communicator: Communicator = module.connect(world, device, timeout_minutes)
    return communicator


def serve_as_scheduler() -> None:
    """What msrun's process beside the ranks does: let them find each other. It ends with the job, inside this call."""
    importlib.import_module("tandem.backends.mindspore.communication").serve()


def launcher_of(ai_framework: str) -> Launcher:
    """How the framework's own launcher is started.

    Raises:
        UserError: the framework is not installed.
    """
    launcher: Launcher = importlib.import_module(f"tandem.backends.{check_framework(ai_framework)}.launcher").launcher
    return launcher


def make_deterministic(package: str) -> None:
    """Ask a framework for the same bits each time; before `connect` and before an engine is built."""
    importlib.import_module(f"tandem.backends.{package}.determinism").make_deterministic()


def start_profiler(ai_framework: str, folder: Path) -> Profiler:
    """Start the framework's profiler; its own files go into `folder`."""
    module = importlib.import_module(f"tandem.backends.{check_framework(ai_framework)}.profiling")
    profiler: Profiler = module.start(folder)
    return profiler


def create_engine(ai_framework: str, config: ModelConfig, settings: EngineSettings) -> Engine:
    """Build an engine with undefined weights: load some before use.

    Raises:
        UserError: the name is unknown, the framework is not installed, or the device is not there.
    """
    package = check_framework(ai_framework)
    module = importlib.import_module(f"tandem.backends.{package}.engine")
    engine: Engine = module.create(config, settings)
    return engine
