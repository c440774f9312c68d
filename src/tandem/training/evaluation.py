"""The loss on validation data: a mean over tokens, or pairs. It does not depend on the layout or the batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.backends.interface import Engine
from tandem.data.batch import MicroBatch, collate
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.questions import Question
from tandem.errors import UserError
from tandem.training.feed import Feed, Share
from tandem.training.objectives import MEAN_LOSS, Evaluation, Objective, Total, UntrainedError, on_one_rank


@dataclass(frozen=True)
class Validation:
    """What a run is evaluated on: sets by name, and the number of batches of each set; None for all batches."""

    sets: Mapping[str, Dataset]
    batch_size: int
    batches: int | None


def evaluate(
    engine: Engine,
    dataset: Dataset,
    name: str,
    share: Share,
    batch_size: int,
    batches: int | None,
    before_batch: Callable[[], None] = lambda: None,
    objective: Objective = MEAN_LOSS,
    total: Total = on_one_rank,
) -> Evaluation:
    """Evaluate the first `batches` batches of a set, or the whole set if it is smaller. Collective.

    Args:
        name: of the set, for errors.
        batches: None for the whole set.
        before_batch: called before each batch, at the same time on all ranks. An error in it ends the evaluation.
        total: the sums of numbers over all data ranks.

    Raises:
        UserError: no token counts.
    """
    count = samples_to_evaluate(dataset, batch_size, batches)

    def each_batch(feed: Feed) -> Iterator[list[MicroBatch]]:
        parts = [(first, min(batch_size, count - first)) for first in range(0, count, batch_size)]
        for part, following in zip(parts, [*parts[1:], None]):
            before_batch()
            batch = feed.take(*part)
            if following is not None:
                feed.begin(*following)
            yield batch

    try:
        with Feed(dataset, share, ahead=engine.reads_ahead) as feed:
            return objective.evaluate(engine, each_batch(feed), total)
    except UntrainedError:
        raise UserError(f"{name}: no token of the first {count} samples is trained, so there is no loss") from None


def samples_to_evaluate(dataset: Dataset, batch_size: int, batches: int | None) -> int:
    """How many samples of a set an evaluation takes."""
    return len(dataset) if batches is None else min(len(dataset), batches * batch_size)


@dataclass(frozen=True)
class Choices:
    """The result of questions with choices. The accuracies are `acc` and `acc_norm` of lm-evaluation-harness.

    Attributes:
        questions: number of questions.
        accuracy: share of questions whose right choice is the most likely one.
        accuracy_per_character: the same, with the log-likelihood divided by the length of the choice. This does not
            put long choices at a disadvantage.
        log_likelihood: mean log-likelihood of the right choices.
    """

    questions: int
    accuracy: float
    accuracy_per_character: float
    log_likelihood: float


def evaluate_choices(engine: Engine, questions: Sequence[Question], share: Share) -> Choices:
    """Find the most likely choice of each question. Collective; the first data rank computes one choice at a time."""
    right = right_per_character = 0
    total = 0.0
    for question in questions:
        samples = [collate([sample]) for sample in question.samples]
        batches = [[sample] if share.data_rank == 0 else [] for sample in samples]
        likelihoods = np.array([-engine.evaluate(micro_batches)[0] for micro_batches in batches])
        lengths = [len(choice) for choice in question.choices]
        right += int(likelihoods.argmax()) == question.answer
        right_per_character += int((likelihoods / lengths).argmax()) == question.answer
        total += float(likelihoods[question.answer])
    count = len(questions)
    return Choices(count, right / count, right_per_character / count, total / count)
