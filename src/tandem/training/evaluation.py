"""The loss on data that is not trained: a mean over tokens, whatever the layout and the batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.backends.interface import Engine
from tandem.data.batch import MicroBatch, collate
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.questions import Question
from tandem.errors import UserError
from tandem.training.logs.log import perplexity


@dataclass(frozen=True)
class Share:
    """What one data rank takes of every batch: each n-th micro-batch, as Megatron deals them."""

    micro_batch_size: int
    data_size: int = 1
    data_rank: int = 0

    def micro_batches(self, dataset: Dataset, start: int, count: int) -> Iterator[MicroBatch]:
        """Of the samples from `start`, `count` in all; the last micro-batch may be smaller."""
        for samples in self.samples(start, count):
            yield collate([dataset[index] for index in samples])

    def samples(self, start: int, count: int) -> Iterator[range]:
        """The numbers of each micro-batch's samples."""
        size = self.micro_batch_size
        for first in range(start + self.data_rank * size, start + count, self.data_size * size):
            yield range(first, min(first + size, start + count))


@dataclass(frozen=True)
class Validation:
    """What a run is evaluated with: sets by name, and how many batches of each; None for all."""

    sets: Mapping[str, Dataset]
    batch_size: int
    batches: int | None


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean over the `tokens` that count."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


def evaluate(
    engine: Engine,
    dataset: Dataset,
    name: str,
    share: Share,
    batch_size: int,
    batches: int | None,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Sum over the first `batches` batches (None: the whole set), at most the whole set. Collective.

    Args:
        before_batch: called at the same time on all ranks; what it raises ends the evaluation.

    Raises:
        UserError: none of these tokens counts; `name` says of which set.
    """
    count = len(dataset) if batches is None else min(len(dataset), batches * batch_size)
    total, tokens = 0.0, 0
    for first in range(0, count, batch_size):
        before_batch()
        micro_batches = list(share.micro_batches(dataset, first, min(batch_size, count - first)))
        loss, trained = engine.evaluate(micro_batches)
        total, tokens = total + loss, tokens + trained
    if not tokens:
        raise UserError(f"{name}: no token of its first {count} samples is trained, so there is no loss to report")
    return Evaluation(total / tokens, tokens)


@dataclass(frozen=True)
class Choices:
    """Of so many `questions`, the share whose right choice is the likeliest, and the likeliest per character, which is
    fair to long ones (lm-evaluation-harness's `acc` and `acc_norm`); the mean log-likelihood of the right choices."""

    questions: int
    accuracy: float
    accuracy_per_character: float
    log_likelihood: float


def evaluate_choices(engine: Engine, questions: Sequence[Question], share: Share) -> Choices:
    """Which choice of each question is the likeliest. Collective; one choice at a time, on the first data rank."""
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
