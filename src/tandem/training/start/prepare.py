"""What a run begins with: settings, weights and layout, checked before a device or another process is needed."""

from __future__ import annotations

import dataclasses

from tandem.backends.interface import EngineSettings
from tandem.checkpoints.hf.companions import companions_of
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.random_init import RandomSource
from tandem.config.checks import check_grid, check_settings
from tandem.config.settings import Settings
from tandem.data.datasets.blend import plain_paths
from tandem.errors import UserError
from tandem.files.publish import check_writable
from tandem.frameworks import check_framework
from tandem.launch.world import World
from tandem.models.config import ModelConfig
from tandem.models.hf_config import from_hf
from tandem.parallel.grid import Grid
from tandem.training.schedule import Schedule, schedule_from
from tandem.training.start.data import check_epochs, with_epochs
from tandem.training.start.raw_data import check_ready, with_preprocessed
from tandem.training.start.resume import check_same_data, continued, open_initial
from tandem.training.start.state import TrainerState

# Model flags that must equal what the weights' config.json says.
COMPARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "norm_epsilon",
    "rotary_base",
)


@dataclasses.dataclass(frozen=True)
class Ground:
    """What a run stands on before its data are looked at."""

    framework: str
    grid: Grid
    source: TensorSource
    loading: Settings  # by which `source` is loaded: the run's own newest checkpoint goes before `--load`


@dataclasses.dataclass(frozen=True)
class Start(Ground):
    """What a run begins with, checked as far as one can without a device and without the other processes."""

    settings: Settings
    schedule: Schedule


def prepare(settings: Settings, processes: int, leader: bool = True) -> Start:
    """Check all but the data first: raw data are then preprocessed by the `leader` of each machine, which may take
    hours and must not end in an error that could have been told before (I2).

    Raises:
        UserError: something is missing or contradictory.
    """
    return with_data(settings, check_ground(settings, processes), leader)


def check_ground(settings: Settings, processes: int) -> Ground:
    """Check the settings against each other, the number of processes and the weights' config."""
    framework = check_framework(settings.training.ai_framework).name
    check_settings(settings)
    check_epochs(settings)
    check_ready(settings)
    check_grid(settings, Grid(settings.layout, processes))
    if settings.checkpoint.save is not None:
        check_writable(settings.checkpoint.save)
    loading = continued(settings)
    source = open_weights(loading)
    check_model_flags(settings, source.config)
    return Ground(framework, laid_out(settings, source.config, processes), source, loading)


def with_data(settings: Settings, ground: Ground, leader: bool = True) -> Start:
    """Preprocess raw data, and settle what depends on the data."""
    resumed = None if ground.loading.checkpoint.finetune else TrainerState.from_source(ground.source)
    data = dataclasses.replace(settings.data, data_path=plain_paths(settings.data.data_path))
    settings = with_epochs(with_preprocessed(dataclasses.replace(settings, data=data), leader), resumed)
    check_same_data(settings, ground.loading)
    schedule = schedule_from(settings)
    seeded = settings if ground.loading.checkpoint.no_load_rng else with_checkpoint_seed(settings, resumed)
    return Start(**vars(ground), settings=seeded, schedule=schedule)


def laid_out(settings: Settings, config: ModelConfig, processes: int) -> Grid:
    """Which process does what.

    Raises:
        UserError: the model or the processes do not divide so.
    """
    layout = settings.layout.balanced(config.num_layers)
    layout.check(config)
    chunk = layout.num_layers_per_virtual_pipeline_stage
    if chunk is not None and layout.pipeline_model_parallel_size == 1:
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage {chunk} interleaves the layers of several stages: leave it out, "
            f"or give --pipeline-model-parallel-size 2 or more"
        )
    if layout != settings.layout:
        report(f"{config.num_layers} layers over {layout.pipeline_model_parallel_size} stages: {layout.num_layer_list}")
    return Grid(layout, processes)


def open_weights(settings: Settings) -> TensorSource:
    """The source of the initial weights: `--load`, or random when asked for."""
    checkpoint = settings.checkpoint
    if checkpoint.load is not None:
        return open_initial(checkpoint.load, checkpoint.ckpt_step, report)
    folder = settings.model.hf_cfg_dir or settings.data.tokenizer_name_or_path
    if folder is None:
        raise UserError("--init random needs the model's config.json: give its folder with --hf-cfg-dir")
    companions = companions_of(folder)
    config = from_hf(companions.hf_config or {}, where=f"{folder}/config.json")
    if settings.model.init_method_std is not None:
        config = dataclasses.replace(config, init_method_std=settings.model.init_method_std)
    return RandomSource(config, settings.training.seed, companions=companions)


def check_model_flags(settings: Settings, config: ModelConfig) -> None:
    """Raise UserError, with both values, when a model flag contradicts the weights' config."""
    model = settings.model
    for name in COMPARED:
        given, actual = getattr(model, name), getattr(config, name)
        if given is not None and given != actual:
            raise UserError(f"--{name.replace('_', '-')} {given} contradicts the weights' config, which has {actual}")
    if model.untie_embeddings_and_output_weights and config.tied:
        raise UserError(
            "--untie-embeddings-and-output-weights contradicts the weights' config: its embeddings are tied"
        )
    if model.padded_vocab_size is not None and model.padded_vocab_size < config.vocab_size:
        raise UserError(f"--padded-vocab-size {model.padded_vocab_size} is below the vocabulary of {config.vocab_size}")
    bound = model.max_position_embeddings or config.max_position_embeddings
    if settings.data.seq_length > bound:
        given = f"--seq-length {settings.data.seq_length} is above max_position_embeddings {bound}"
        raise UserError(f"{given}: give --seq-length {bound}, or less")


def with_checkpoint_seed(settings: Settings, state: TrainerState | None) -> Settings:
    """A run resumed from `state` keeps the seed of its data order."""
    if state is None or state.seed == settings.training.seed:
        return settings
    kept = f"seed {state.seed} from the checkpoint replaces --seed {settings.training.seed}"
    report(f"{kept} (--no-load-rng keeps yours)")
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, seed=state.seed))


def engine_settings(settings: Settings, config: ModelConfig, grid: Grid, rank: int) -> EngineSettings:
    optimizer, training = settings.optimizer, settings.training
    recompute = 0
    if training.recompute_granularity == "full":
        block = training.recompute_method == "block"
        recompute = min(training.recompute_num_layers or 0, config.num_layers) if block else config.num_layers
    return EngineSettings(
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=training.bf16,
        fp16=training.fp16,
        recompute_layers=recompute,
        device=training.device,
        grid=grid,
        rank=rank,
        sequence_parallel=settings.parallel.sequence_parallel,
        use_distributed_optimizer=settings.parallel.use_distributed_optimizer,
        use_torch_fsdp2=settings.parallel.use_torch_fsdp2,
    )


def report(text: str) -> None:
    """What the user must know, said by the first rank."""
    if World.from_environment().rank == 0:
        print(f"> {text}", flush=True)
