"""`tandem evaluate`: evaluates weights on data, with one result for each set. Nothing is trained or written."""

from __future__ import annotations

from tandem.backends.interface import Engine
from tandem.config.settings import DataSettings, Settings, TaskSettings, TrainingSettings
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.questions import Question, holds_questions, read_questions
from tandem.data.kinds import TEXT, kind_of
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.options import flag_of
from tandem.training.evaluation import Choices, Share, evaluate, evaluate_choices
from tandem.training.objectives import Evaluation
from tandem.training.out_of_memory import naming_less_memory
from tandem.training.start.data_checks import check_data
from tandem.training.start.data_paths import named_sets
from tandem.training.start.datasets import KIND_OF_STAGE, Datasets
from tandem.training.start.for_evaluation import Weights

Result = Evaluation | Choices


def evaluate_weights(settings: Settings) -> tuple[dict[str, Result], list[str]]:
    """Evaluate the weights of `--load` on each set of `--valid-data-path`, on the processes that were started.

    The files of a set show whether it holds text or conversations. In conversations only the answers count.
    `--eval-iters` limits the batches of a set. A `.jsonl` file holds questions with choices
    (`tandem.data.datasets.questions`); all of its questions are asked.

    Returns:
        A result for each set, in order, and notices for the user.

    Raises:
        UserError: weights, data or layout do not fit together.
    """
    with naming_less_memory(settings):
        return _evaluate_weights(settings)


def _evaluate_weights(settings: Settings) -> tuple[dict[str, Result], list[str]]:
    data, training = settings.data, settings.training
    if settings.checkpoint.load is None:
        raise UserError("no weights: give a checkpoint or a Hugging Face folder")
    defaults = TaskSettings()
    of_tasks = [flag_of(name) for name, value in vars(settings.evaluation).items() if value != getattr(defaults, name)]
    if of_tasks:
        raise UserError(f"{' '.join(of_tasks)}: belongs to --tasks or --task, which are not given")
    places = named_sets(data.valid_data_path)
    if not places:
        raise UserError("no data: give PREFIX, or NAME=PREFIX for each of several sets; or --tasks NAMES")
    weights = Weights.of(settings, data.seq_length)
    sets = {name: _open(place, data, training, weights.tokenizer) for name, place in places.items()}
    communicator, engine = weights.load()
    grid = weights.grid
    share = Share(training.micro_batch_size, grid.data_size, grid.place(weights.world.rank).data)
    results = {name: _evaluate(engine, name, samples, share, training) for name, (samples, _) in sets.items()}
    communicator.close()
    return results, [*engine.notices, *(notice for _, notices in sets.values() for notice in notices)]


def _open(
    place: str, data: DataSettings, training: TrainingSettings, tokenizer: Tokenizer | None
) -> tuple[Dataset | list[Question], list[str]]:
    """The samples or questions of a set, and notices for the user."""
    if holds_questions(place):
        if tokenizer is None:
            raise UserError(f"{place}: questions need a tokenizer: give its folder with --tokenizer-name-or-path")
        return read_questions(place, tokenizer, data.seq_length), []
    kind = kind_of(place) or TEXT
    if kind in KIND_OF_STAGE.values():
        raise UserError(
            f"{place}: these data are {kind.in_words}. They are evaluated while a model is trained, when its reference "
            f"is known: give them with --valid-data-path there"
        )
    notices, _ = check_data(place, kind, data, tokenizer)
    return Datasets.of(kind, data, training, tokenizer).whole(place), notices


def _evaluate(
    engine: Engine, name: str, data: Dataset | list[Question], share: Share, training: TrainingSettings
) -> Result:
    if isinstance(data, list):
        return evaluate_choices(engine, data, share)
    batch = max(training.final_batch_size, training.micro_batch_size * share.data_size)
    return evaluate(engine, data, name, share, batch, training.eval_batches)
