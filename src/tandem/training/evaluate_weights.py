"""`tandem evaluate`: weights and data in, one loss per set out. Nothing is trained, nothing is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tandem.backends import check_framework, connect, create_engine
from tandem.config.settings import Settings
from tandem.data.naming import sft_prefix
from tandem.errors import UserError
from tandem.parallel.grid import Grid
from tandem.parallel.world import World
from tandem.training.evaluation import Evaluation, Share, evaluate
from tandem.training.inputs import check_data, named_sets, open_tokenizer, whole_set
from tandem.training.start import check_model_flags, engine_settings, open_weights


def evaluate_weights(settings: Settings) -> tuple[dict[str, Evaluation], list[str]]:
    """The loss of `--load` on each set of `--valid-data-path`, at the layout and on as many processes as were started.

    Instruction data are known by their files; only their answers count then. `--eval-iters` bounds each set.

    Returns:
        A loss per set, in order, and what the user should be told.

    Raises:
        UserError: weights, data or layout do not fit together.
    """
    world = World.from_environment()
    framework = check_framework(settings.training.ai_framework)
    if settings.checkpoint.load is None:
        raise UserError("which weights? Give a checkpoint or a Hugging Face folder")
    sets = named_sets(settings.data.valid_data_path)
    if not sets:
        raise UserError("which data? Give PREFIX, or NAME=PREFIX ...")
    grid = Grid(settings.layout, world.size)
    source = open_weights(settings)
    check_model_flags(settings, source.config)
    grid.layout.check(source.config)
    tokenizer = open_tokenizer(settings, source)
    notices, datasets = [], {}
    for name, prefix in sets.items():
        own = dataclasses.replace(
            settings, data=dataclasses.replace(settings.data, is_instruction_dataset=_holds_instructions(prefix))
        )
        notices += check_data(prefix, own, tokenizer)[0]
        datasets[name] = whole_set(own, tokenizer, prefix)

    timeout = settings.parallel.distributed_timeout_minutes
    communicator = connect(framework, world, settings.training.device, timeout)
    forward_only = dataclasses.replace(engine_settings(settings, source.config, grid, world.rank), training=False)
    engine = create_engine(framework, source.config, forward_only)
    engine.load_weights(source)
    share = Share(settings.training.micro_batch_size, grid.data_size, grid.place(world.rank).data)
    batch = max(settings.global_batch_size, settings.training.micro_batch_size * grid.data_size)
    batches = None if settings.training.eval_iters == "full" else settings.training.eval_iters
    found = {name: evaluate(engine, dataset, name, share, batch, batches) for name, dataset in datasets.items()}
    communicator.close()
    return found, [*engine.notices, *notices]


def _holds_instructions(prefix: str) -> bool:
    return Path(sft_prefix(prefix, "input_ids") + ".idx").exists()
