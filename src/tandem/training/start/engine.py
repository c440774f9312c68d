"""The settings of an engine: the place of each process, and how it computes."""

from __future__ import annotations

from tandem.backends.interface import EngineSettings
from tandem.config.settings import OptimizerSettings, ParallelSettings, TrainingSettings
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
    config: ModelConfig,
    grid: Grid,
    rank: int,
) -> EngineSettings:
    """The settings of the engine of `rank`, as backends take them."""
    return EngineSettings(
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=training.bf16,
        fp16=training.fp16,
        recompute_layers=recomputed_layers(training, config.num_layers),
        device=training.device,
        grid=grid,
        rank=rank,
        sequence_parallel=parallel.sequence_parallel,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        use_torch_fsdp2=parallel.use_torch_fsdp2,
    )


def recomputed_layers(training: TrainingSettings, num_layers: int) -> int:
    """The number of layers that recompute their activations."""
    if training.recompute_granularity != "full":
        return 0
    if training.recompute_method == "block":
        return min(training.recompute_num_layers or 0, num_layers)
    return num_layers
