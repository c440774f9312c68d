"""Opens weights to evaluate them, on the processes that were started. Nothing is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tandem.backends import connect, create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.checkpoints.interface import TensorSource
from tandem.config.checks import check_implemented
from tandem.config.settings import Settings
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.frameworks import check_framework
from tandem.launch.world import Communicator, World
from tandem.options import as_typed
from tandem.parallel.grid import Grid
from tandem.training.start.agreement import agree_on_start, agree_on_weights
from tandem.training.start.data import open_tokenizer
from tandem.training.start.engine import engine_settings, make_grid
from tandem.training.start.lora import has_fresh_adapters
from tandem.training.start.weights import check_model_flags, open_weights


@dataclass(frozen=True)
class Weights:
    """The weights of `--load`, not yet in an engine."""

    settings: Settings
    world: World
    framework: str
    source: TensorSource
    grid: Grid
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, settings: Settings, longest: int) -> Weights:
        """
        Args:
            longest: number of tokens in the longest sample.

        Raises:
            UserError: there are no weights, or they do not fit the flags or the layout.
        """
        checkpoint, model, data = settings.checkpoint, settings.model, settings.data
        world = World.from_environment()
        framework = check_framework(settings.training.ai_framework).name
        if checkpoint.load is None:
            raise UserError("no weights: give a checkpoint or a Hugging Face folder")
        check_implemented(model, settings.parallel, data)
        seed = settings.training.seed
        source = open_weights(checkpoint, settings.lora, model, data.tokenizer_name_or_path, seed)
        if has_fresh_adapters(source):
            raise UserError(
                f"{as_typed('lora_target_modules', settings.lora.lora_target_modules)}: {checkpoint.load} has no "
                f"adapters: give theirs with --lora-load"
            )
        noop_layers = settings.parallel.layout.noop_layers
        check_model_flags(model, settings.experts, longest, source.config, noop_layers)
        grid = make_grid(settings.parallel, source.config, world.size)
        tokenizer = open_tokenizer(data.tokenizer_name_or_path, source)
        return cls(settings, world, framework, source, grid, tokenizer)

    @property
    def engine_settings(self) -> EngineSettings:
        settings = self.settings
        for_training = engine_settings(
            settings.training,
            settings.optimizer,
            settings.parallel,
            settings.experts,
            self.source.config,
            self.grid,
            self.world.rank,
        )
        return dataclasses.replace(for_training, training=False)

    def load(self) -> tuple[Communicator, Engine]:
        """Join the other processes, and load the weights. Collective."""
        settings, config = self.settings, self.source.config
        training, parallel = settings.training, settings.parallel
        communicator = connect(self.framework, self.world, training.device, parallel.distributed_timeout_minutes)
        agree_on_start(communicator, settings, self.framework, config, self.tokenizer)
        engine = create_engine(self.framework, config, self.engine_settings)
        engine.load_weights(self.source)
        agree_on_weights(communicator, engine, self.source)
        return communicator, engine
