"""Engines that run the train step: one package per framework, one protocol, imported lazily.

This is the one place where a backend is chosen.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tandem.backends import checks
from tandem.backends.folder_reading import FolderReading
from tandem.backends.interface import Engine, EngineSettings, Profiler
from tandem.data.batch import MicroBatch
from tandem.frameworks import check_framework, named_framework
from tandem.launch.member import JOINED, JOINING, tell_stage
from tandem.launch.supervisor import Launcher
from tandem.launch.world import Communicator, SingleProcess, World
from tandem.models.config import ModelConfig


def transformers_logits(folder: Path, dtype: str, batch: MicroBatch) -> np.ndarray:
    """The logits that Hugging Face's model computes in fp32 from its folder, fp32 [t, vocabulary].

    Args:
        dtype: `float32`, `bfloat16` or `float16`, to which the weights are rounded before.

    Raises:
        UserError: transformers cannot open the folder.
    """
    module = importlib.import_module("tandem.backends.torch.transformers_model")
    logits: np.ndarray = module.logits(folder, dtype, batch)
    return logits


def read_folder(
    folder: Path, prompts: Sequence[str | Sequence[Mapping[str, str]]], sequences: Sequence[Sequence[int]]
) -> FolderReading:
    """What transformers makes of a Hugging Face folder: of plain texts, conversations, and sequences of tokens.

    Raises:
        UserError: transformers cannot open the folder.
    """
    module = importlib.import_module("tandem.backends.torch.transformers_model")
    reading: FolderReading = module.read(folder, prompts, sequences)
    return reading


def connect(ai_framework: str, world: World, device: str | None, timeout_minutes: float) -> Communicator:
    """Join the framework's process group. Call it once, before an engine of several processes is built.

    Args:
        timeout_minutes: how long a collective waits for a process that is late.

    Raises:
        UserError: the framework is not installed, the device is missing, or other processes did not join.
    """
    name = check_framework(ai_framework).name
    if world.size == 1:
        return SingleProcess()
    module = importlib.import_module(f"tandem.backends.{name}.communication")
    tell_stage(JOINING)
    communicator: Communicator = module.connect(world, device, timeout_minutes)
    tell_stage(JOINED)
    return communicator


def serve_as_scheduler() -> None:
    """Be msrun's scheduler, the process through which ranks find each other. The process ends inside this call.

    Raises:
        UserError: its port is in use.
    """
    importlib.import_module("tandem.backends.mindspore.communication").serve()


def launcher_of(ai_framework: str) -> Launcher:
    """The function that tells how the framework's launcher is started.

    Raises:
        UserError: the framework is not installed.
    """
    name = check_framework(ai_framework).name
    launcher: Launcher = importlib.import_module(f"tandem.backends.{name}.launcher").launcher
    return launcher


def make_deterministic(ai_framework: str) -> None:
    """Ask a framework for the same bits each time. Call it before `connect` and before an engine is built."""
    name = check_framework(ai_framework).name
    importlib.import_module(f"tandem.backends.{name}.determinism").make_deterministic()


def start_profiler(ai_framework: str, folder: Path) -> Profiler:
    """Start the framework's profiler. Its files go into `folder`."""
    module = importlib.import_module(f"tandem.backends.{check_framework(ai_framework).name}.profiling")
    profiler: Profiler = module.start(folder)
    return profiler


def check_engine(ai_framework: str, config: ModelConfig, settings: EngineSettings) -> None:
    """Raise UserError for what `create_engine` would refuse wherever it is called. Imports no framework."""
    checks.check_engine(named_framework(ai_framework), config, settings)


def create_engine(ai_framework: str, config: ModelConfig, settings: EngineSettings) -> Engine:
    """Build an engine with undefined weights: load some before use.

    Raises:
        UserError: the name is unknown, the framework is not installed, or the device is missing.
    """
    name = check_framework(ai_framework).name
    module = importlib.import_module(f"tandem.backends.{name}.engine")
    engine: Engine = module.create(config, settings)
    return engine
