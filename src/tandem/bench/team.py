"""The processes that run a stage together, and the engines that they build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tandem.backends import connect, create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.bench.layouts import ONE_PROCESS, Spread
from tandem.bench.options import BenchOptions
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.random_init import RandomSource
from tandem.launch.world import Communicator, SingleProcess, World
from tandem.models.config import ModelConfig
from tandem.parallel.grid import Grid, Place


@dataclass(frozen=True)
class Team:
    """This process among those of a stage. Every method is collective."""

    spread: Spread = field(default_factory=lambda: Spread.named(ONE_PROCESS))
    communicator: Communicator = field(default_factory=SingleProcess)

    @property
    def rank(self) -> int:
        return self.communicator.world.rank

    def grid(self, config: ModelConfig) -> Grid:
        return Grid(self.spread.layout.balanced(config.num_layers), self.spread.processes)

    def place(self, config: ModelConfig) -> Place:
        return self.grid(config).place(self.rank)

    def engine(
        self,
        options: BenchOptions,
        config: ModelConfig,
        *,
        device: str | None,
        bf16: bool,
        source: TensorSource | None = None,
        **settings: Any,
    ) -> Engine:
        """This rank's share of a model.

        Args:
            source: of the weights; default: random ones.
            settings: more fields of `EngineSettings`.
        """
        spread = self.spread
        made = EngineSettings(
            device=device,
            bf16=bf16,
            grid=self.grid(config),
            rank=self.rank,
            **spread.sharding,
            **spread.overlaps,
            **settings,
        )
        engine = create_engine(options.ai_framework, config, made)
        engine.load_weights(source or RandomSource(config, seed=0))
        return engine

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        return float(max(self.communicator.all_gather(value)))


ALONE = Team()


@contextmanager
def joined(options: BenchOptions, spread: Spread) -> Iterator[Team]:
    """Inside, this process is one of a stage's, alone or in the job that started it."""
    world = World.from_environment() if spread.processes > 1 else World()
    communicator = connect(options.ai_framework, world, options.device, options.stage_seconds / 60)
    yield Team(spread, communicator)
    communicator.close()
