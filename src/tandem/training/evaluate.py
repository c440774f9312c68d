"""`tandem evaluate`: weights and data in, one result per set out. Nothing is trained, nothing is written."""

from __future__ import annotations

import dataclasses

from tandem.backends import connect, create_engine
from tandem.backends.interface import Engine
from tandem.config.checks import check_implemented
from tandem.config.settings import Settings
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.questions import Question, holds_questions, read_questions
from tandem.data.kinds import TEXT, kind_of
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.frameworks import check_framework
from tandem.launch.world import World
from tandem.training.evaluation import Choices, Evaluation, Share, evaluate, evaluate_choices
from tandem.training.start.data import named_sets, open_tokenizer
from tandem.training.start.data_checks import check_data
from tandem.training.start.datasets import Datasets
from tandem.training.start.prepare import check_model_flags, engine_settings, laid_out, open_weights

Result = Evaluation | Choices


def evaluate_weights(settings: Settings) -> tuple[dict[str, Result], list[str]]:
    """The loss of `--load` on each set of `--valid-data-path`, at the layout and on as many processes as were started.

    Conversations are known by their files; only their answers count then. `--eval-iters` bounds each set of either
    kind. A `.jsonl` file holds questions with choices (`tandem.data.datasets.questions`), all of which are asked.

    Returns:
        A result per set, in order, and what the user should be told.

    Raises:
        UserError: weights, data or layout do not fit together.
    """
    world = World.from_environment()
    framework = check_framework(settings.training.ai_framework).name
    if settings.checkpoint.load is None:
        raise UserError("which weights? Give a checkpoint or a Hugging Face folder")
    places = named_sets(settings.data.valid_data_path)
    if not places:
        raise UserError("which data? Give PREFIX, or NAME=PREFIX ...")
    check_implemented(settings)
    source = open_weights(settings)
    check_model_flags(settings, source.config)
    grid = laid_out(settings, source.config, world.size)
    tokenizer = open_tokenizer(settings, source)
    opened = {name: _open(place, settings, tokenizer) for name, place in places.items()}

    timeout = settings.parallel.distributed_timeout_minutes
    communicator = connect(framework, world, settings.training.device, timeout)
    forward_only = dataclasses.replace(engine_settings(settings, source.config, grid, world.rank), training=False)
    engine = create_engine(framework, source.config, forward_only)
    engine.load_weights(source)
    share = Share(settings.training.micro_batch_size, grid.data_size, grid.place(world.rank).data)
    found = {name: _evaluate(engine, name, data, share, settings) for name, (data, _) in opened.items()}
    communicator.close()
    return found, [*engine.notices, *(notice for _, notices in opened.values() for notice in notices)]


def _open(place: str, settings: Settings, tokenizer: Tokenizer | None) -> tuple[Dataset | list[Question], list[str]]:
    """A set, and what the user should be told of it."""
    if holds_questions(place):
        if tokenizer is None:
            raise UserError(f"{place}: questions need the tokenizer's folder: --tokenizer-name-or-path")
        return read_questions(place, tokenizer, settings.data.seq_length), []
    kind = kind_of(place) or TEXT
    notices, _ = check_data(place, kind, settings.data, tokenizer)
    return Datasets.of(kind, settings, tokenizer).whole(place), notices


def _evaluate(engine: Engine, name: str, data: Dataset | list[Question], share: Share, settings: Settings) -> Result:
    if isinstance(data, list):
        return evaluate_choices(engine, data, share)
    batch = max(settings.global_batch_size, settings.training.micro_batch_size * share.data_size)
    batches = None if settings.training.eval_iters == "full" else settings.training.eval_iters
    return evaluate(engine, data, name, share, batch, batches)
