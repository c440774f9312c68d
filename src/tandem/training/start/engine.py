"""The settings of an engine: the place of each process, and how it computes."""

from __future__ import annotations

import dataclasses

from tandem.backends.interface import EngineSettings
from tandem.config.settings import ExpertSettings, OptimizerSettings, ParallelSettings, TrainingSettings
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.parallel.grid import Grid
from tandem.training.logs.log import log_notice


def make_grid(parallel: ParallelSettings, config: ModelConfig, processes: int) -> Grid:
    """The place of each process in the layout.

    Raises:
        UserError: the layout does not divide the model or the processes evenly.
    """
    layout = parallel.layout.balanced(config.num_layers)
    layout.check(config)
    chunk = layout.num_layers_per_virtual_pipeline_stage
    if chunk is not None and layout.pipeline_model_parallel_size == 1:
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage {chunk} needs several pipeline stages: leave it out, or give "
            f"--pipeline-model-parallel-size 2 or more"
        )
    if layout != parallel.layout:
        stages = layout.pipeline_model_parallel_size
        log_notice(f"{config.num_layers} layers over {stages} stages: {layout.num_layer_list}")
    return Grid(layout, processes)


def engine_settings(
    training: TrainingSettings,
    optimizer: OptimizerSettings,
    parallel: ParallelSettings,
    experts: ExpertSettings,
    config: ModelConfig,
    grid: Grid,
    rank: int,
) -> EngineSettings:
    """The settings of the engine of `rank`, as backends take them."""
    names = {field.name for field in dataclasses.fields(EngineSettings)}
    groups = (vars(optimizer), vars(training), vars(parallel), vars(experts))
    shared = {name: value for group in groups for name, value in group.items() if name in names}
    recompute_layers = recomputed_layers(training, config.num_layers)
    return EngineSettings(**shared, recompute_layers=recompute_layers, grid=grid, rank=rank)


def recomputed_layers(training: TrainingSettings, num_layers: int) -> int:
    """The number of layers that recompute their activations."""
    if training.recompute_granularity != "full":
        return 0
    if training.recompute_method == "block":
        return min(training.recompute_num_layers or 0, num_layers)
    return num_layers
