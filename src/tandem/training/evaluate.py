"""`tandem evaluate`: evaluates weights on data, with one result for each set. Nothing is trained.

Of preferences, the log-probabilities of the reference are kept next to the data, as in training.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tandem.backends.interface import Engine
from tandem.config.checks import wrong_preferences
from tandem.config.settings import DataSettings, Settings, TaskSettings
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.questions import Question, holds_questions, read_questions
from tandem.data.kinds import TEXT, Kind, kind_of
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError, raise_all
from tandem.launch.world import Communicator
from tandem.options import flag_of
from tandem.training.evaluation import Choices, evaluate, evaluate_choices, samples_to_evaluate
from tandem.training.feed import Share
from tandem.training.objectives import Evaluation, Objective, over_data_ranks
from tandem.training.out_of_memory import naming_less_memory
from tandem.training.preferences import objective_of
from tandem.training.start.data_checks import check_data
from tandem.training.start.data_paths import named_sets
from tandem.training.start.datasets import Datasets, stages_of_kind
from tandem.training.start.for_evaluation import Weights
from tandem.training.start.reference import reference_to_evaluate
from tandem.training.start.reference_tables import ReferenceTables
from tandem.training.start.weights import open_reference

Result = Evaluation | Choices


@dataclass(frozen=True)
class DataToEvaluate:
    """A set of samples.

    Attributes:
        objective: whose loss is computed.
        references: of preferences: see `AnswersDataset`.
        notices: for the user.
    """

    samples: Dataset
    kind: Kind
    objective: Objective
    notices: list[str]
    references: dict[str, np.ndarray] = field(default_factory=dict)


def evaluate_weights(settings: Settings) -> tuple[dict[str, Result], list[str]]:
    """Evaluate the weights of `--load` on each set of `--valid-data-path`, on the processes that were started.

    The files of a set show what it holds. In conversations only the answers count. Of preferences, the loss is that of
    `--stage`, as in training. `--eval-iters` limits the batches of a set. A `.jsonl` file holds questions with choices
    (`tandem.data.datasets.questions`); all of its questions are asked.

    Returns:
        A result for each set, in order, and notices for the user.

    Raises:
        UserError: weights, data or layout do not fit together.
    """
    with naming_less_memory(settings):
        return _evaluate_weights(settings)


def _evaluate_weights(settings: Settings) -> tuple[dict[str, Result], list[str]]:
    data = settings.data
    if settings.checkpoint.load is None:
        raise UserError("no weights: give a checkpoint or a Hugging Face folder")
    defaults = TaskSettings()
    of_tasks = [flag_of(name) for name, value in vars(settings.evaluation).items() if value != getattr(defaults, name)]
    if settings.evaluation.eval_tasks:
        raise UserError("--eval-tasks belongs to training: give --tasks")
    if of_tasks:
        raise UserError(f"{' '.join(of_tasks)}: belongs to --tasks or --task, which are not given")
    places = named_sets(data.valid_data_path)
    if not places:
        raise UserError("no data: give PREFIX, or NAME=PREFIX for each of several sets; or --tasks NAMES")
    stages = {place: _stage_of(place, data) for place in places.values()}
    raise_all(list(wrong_preferences(settings, tuple(stages.values()))))
    weights = Weights.of(settings, data.seq_length)
    open_reference(settings.preferences, weights.source.config)  # its checks, before weights are loaded
    sets = {name: _open(place, stages[place], settings, weights.tokenizer) for name, place in places.items()}
    communicator, engine = weights.load()
    _fill_references(sets, weights, engine, communicator)
    results = {name: _evaluate(name, opened, weights, engine, communicator) for name, opened in sets.items()}
    communicator.close()
    notices = [notice for opened in sets.values() if isinstance(opened, DataToEvaluate) for notice in opened.notices]
    return results, [*engine.notices, *notices]


def _stage_of(place: str, data: DataSettings) -> str | None:
    """The stage of training whose loss a set is evaluated with: `--stage`, or the first one for its preferences.

    None for other data than preferences.

    Raises:
        UserError: `--stage` is for other data.
    """
    kind = None if holds_questions(place) else kind_of(place)
    stages = stages_of_kind(kind)
    if not stages or data.stage in stages:
        return data.stage if stages else None
    if data.stage is None:
        return stages[0]
    assert kind is not None
    raise UserError(
        f"{place}: these data are {kind.name}, and --stage {data.stage} is for others: give --stage "
        f"{' or '.join(stages)}, or leave it out"
    )


def _open(
    place: str, stage: str | None, settings: Settings, tokenizer: Tokenizer | None
) -> DataToEvaluate | list[Question]:
    """The samples or questions of a set."""
    data, training = settings.data, settings.training
    if holds_questions(place):
        if tokenizer is None:
            raise UserError(f"{place}: questions need a tokenizer: give its folder with --tokenizer-name-or-path")
        return read_questions(place, tokenizer, data.seq_length)
    kind = kind_of(place) or TEXT
    notices, _ = check_data(place, kind, data, tokenizer)
    datasets = Datasets.of(kind, data, training, tokenizer)
    objective = objective_of(stage, settings.preferences)
    if stages_of_kind(kind) == () and data.stage is not None:
        notices = [*notices, f"{place}: {kind.name}, on which --stage {data.stage} has no effect"]
    return DataToEvaluate(datasets.whole(place), kind, objective, notices, datasets.references)


def _fill_references(
    sets: dict[str, DataToEvaluate | list[Question]], weights: Weights, engine: Engine, communicator: Communicator
) -> None:
    """Fill the reference of all samples that need one. Collective."""
    settings = weights.settings
    referred = [
        opened for opened in sets.values() if isinstance(opened, DataToEvaluate) and opened.objective.needs_reference
    ]
    if not referred:
        return
    reference = reference_to_evaluate(settings, weights.source, engine, communicator)
    training = settings.training
    for opened in referred:
        tables = ReferenceTables(
            *(engine, communicator, weights.grid, training.micro_batch_size, opened.kind, settings.data.seq_length),
            opened.references,
        )
        count = samples_to_evaluate(opened.samples, _batch_size(weights), training.eval_batches)
        tables.fill(reference, [(opened.samples, range(count))])


def _batch_size(weights: Weights) -> int:
    training = weights.settings.training
    return max(training.final_batch_size, training.micro_batch_size * weights.grid.data_size)


def _evaluate(
    name: str,
    opened: DataToEvaluate | list[Question],
    weights: Weights,
    engine: Engine,
    communicator: Communicator,
) -> Result:
    grid, training = weights.grid, weights.settings.training
    share = Share(training.micro_batch_size, grid.data_size, grid.place(weights.world.rank).data)
    if isinstance(opened, list):
        return evaluate_choices(engine, opened, share)
    return evaluate(
        engine,
        opened.samples,
        name,
        share,
        _batch_size(weights),
        training.eval_batches,
        objective=opened.objective,
        total=over_data_ranks(communicator, grid),
    )
