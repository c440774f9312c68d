"""Objectives of preferences: pairs of answers, and single answers that are desirable or not.

A loss is a function of each answer's sum of log-probabilities. So its derivative by a sum is that by every token of the
answer. The loss is the mean over the pairs, or the answers, of the global batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.backends.interface import Engine
from tandem.config.settings import PreferenceSettings
from tandem.data.batch import CHOSEN, IGNORE, MISMATCHED, REJECTED, MicroBatch, documents_of
from tandem.errors import UserError
from tandem.training.objectives import Evaluation, MeanLoss, Objective, RankBatch, Total, Weighed
from tandem.training.preference_losses import PAIR_LOSSES, PairLoss, sigmoid


@dataclass(frozen=True)
class Documents:
    """The documents of some micro-batches, in order. Arrays [documents].

    Attributes:
        policy, reference: sums of log p(label), float64.
        tokens: number of labels that count.
        roles: as in `Answers`.
    """

    policy: np.ndarray
    reference: np.ndarray
    tokens: np.ndarray
    roles: np.ndarray

    @classmethod
    def of(cls, batch: MicroBatch, log_probabilities: np.ndarray) -> Documents:
        if batch.answers is None:
            raise UserError("the data are no preferences: no answer says whether it is wanted")
        starts = batch.cu_seqlens[:-1]
        trained = (batch.labels != IGNORE).astype(np.int64)
        return cls(
            np.add.reduceat(log_probabilities, starts),
            batch.answers.reference,
            np.add.reduceat(trained, starts),
            batch.answers.roles,
        )

    @classmethod
    def joined(cls, parts: Sequence[Documents]) -> Documents:
        empty = cls(np.empty(0), np.empty(0), np.empty(0, np.int64), np.empty(0, np.int8))
        names = ("policy", "reference", "tokens", "roles")
        return cls(*(np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in names))

    def take(self, which: np.ndarray) -> Documents:
        return Documents(self.policy[which], self.reference[which], self.tokens[which], self.roles[which])

    def scores(self, *, per_token: bool, reference: bool) -> np.ndarray:
        sums = self.policy - self.reference if reference else self.policy
        return sums / self.tokens if per_token else sums


@dataclass(frozen=True)
class Compared:
    """The loss and metrics of all ranks' documents, and the derivative of the loss by each of this rank's sums."""

    loss: float
    slopes: np.ndarray
    metrics: Mapping[str, float]


class PreferenceObjective(Objective, ABC):
    """Base of the objectives of preferences."""

    @property
    def needs_log_probabilities(self) -> bool:
        return True

    def __call__(self, log_probabilities: Sequence[np.ndarray] | None, batch: RankBatch) -> Weighed:
        assert log_probabilities is not None
        parts = [Documents.of(*pair) for pair in zip(batch.micro_batches, log_probabilities, strict=True)]
        compared = self.compare(Documents.joined(parts), batch.total)
        slopes = np.split(compared.slopes, np.cumsum([len(part.policy) for part in parts])[:-1]) if parts else []
        weights = [
            np.where(micro_batch.labels == IGNORE, 0.0, -np.repeat(of_documents, micro_batch.lengths))
            for micro_batch, of_documents in zip(batch.micro_batches, slopes)
        ]
        return Weighed(weights, compared.loss, compared.metrics)

    def evaluate(self, engine: Engine, batches: Iterable[Sequence[MicroBatch]], total: Total) -> Evaluation:
        parts = []
        for micro_batches in batches:
            log_probabilities = engine.log_probabilities(micro_batches)
            parts += [Documents.of(*pair) for pair in zip(micro_batches, log_probabilities, strict=True)]
        documents = Documents.joined(parts)
        compared = self.compare(documents, total)
        answers = documents.tokens[documents.roles != MISMATCHED]
        return Evaluation(compared.loss, int(total([float(answers.sum())])[0]), compared.metrics)

    @abstractmethod
    def compare(self, documents: Documents, total: Total) -> Compared:
        """Collective over data ranks."""


@dataclass(frozen=True)
class Pairs(PreferenceObjective):
    """Pairs of answers: documents are chosen and rejected answers in turn."""

    loss: PairLoss

    @property
    def needs_reference(self) -> bool:
        return self.loss.reference

    def compare(self, documents: Documents, total: Total) -> Compared:
        loss = self.loss
        chosen, rejected = (documents.take(np.flatnonzero(documents.roles == role)) for role in (CHOSEN, REJECTED))
        kind = {"per_token": loss.per_token, "reference": loss.reference}
        of_pairs = loss.of_scores(chosen.scores(**kind), rejected.scores(**kind))
        imitated = -chosen.policy / chosen.tokens
        of_rewards = {"per_token": loss.rewards_per_token, "reference": loss.reference}
        rewards = [loss.beta * answers.scores(**of_rewards) for answers in (chosen, rejected)]
        sums = {
            "loss": of_pairs.loss + loss.imitation * imitated,
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).astype(np.float64),
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": chosen.policy,
            "logps/rejected": rejected.policy,
        }
        if loss.imitation:
            sums["nll_loss"] = imitated
        pairs, *totals = total([float(len(chosen.policy)), *(float(values.sum()) for values in sums.values())])
        means = {name: value / pairs for name, value in zip(sums, totals)}
        slopes = np.zeros(len(documents.policy))
        for role, slope, answers in ((CHOSEN, of_pairs.chosen, chosen), (REJECTED, of_pairs.rejected, rejected)):
            slopes[documents.roles == role] = (slope / answers.tokens if loss.per_token else slope) / pairs
        slopes[documents.roles == CHOSEN] -= loss.imitation / chosen.tokens / pairs
        return Compared(means.pop("loss"), slopes, means)


@dataclass(frozen=True)
class Kto(PreferenceObjective):
    """KTO (arXiv 2402.01306), as in TRL: answers that are desirable or not, against a divergence from the reference.

    The divergence is the mean over the mismatched answers of the global batch, and no gradient follows it.
    """

    beta: float
    desirable_weight: float
    undesirable_weight: float

    @property
    def needs_reference(self) -> bool:
        return True

    def compare(self, documents: Documents, total: Total) -> Compared:
        ratios = documents.policy - documents.reference
        wanted, unwanted, other = (documents.roles == role for role in (CHOSEN, REJECTED, MISMATCHED))
        counts = [float(np.count_nonzero(which)) for which in (wanted, unwanted, other)]
        *totals, divergence = total([*counts, float(ratios[other].sum())])
        kl = max(0.0, divergence / max(1.0, totals[2]))
        signs = np.where(wanted, 1.0, -1.0)
        weights = np.where(wanted, self.desirable_weight, self.undesirable_weight) * ~other
        success = sigmoid(self.beta * signs * (ratios - kl))
        answers = totals[0] + totals[1]
        slopes = -weights * signs * self.beta * success * (1 - success) / answers
        sums = [float((weights * (1 - success)).sum())]
        for which in (wanted, unwanted):
            sums += [float(self.beta * ratios[which].sum()), float(documents.policy[which].sum())]
        loss, *of_sides = total(sums)
        metrics = {"kl": kl}
        for name, count, (rewards, logps) in zip(("chosen", "rejected"), totals, (of_sides[:2], of_sides[2:])):
            if count:
                metrics |= {f"rewards/{name}": rewards / count, f"logps/{name}": logps / count}
        if totals[0] and totals[1]:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return Compared(loss / answers, slopes, metrics)


def _kto(settings: PreferenceSettings) -> Kto:
    return Kto(settings.kto_beta, settings.desirable_weight, settings.undesirable_weight)


def objective_of(stage: str | None, settings: PreferenceSettings) -> Objective:
    """What a stage of training minimises; None and "sft" are pretraining and fine-tuning."""
    if stage in PAIR_LOSSES:
        return Pairs(PAIR_LOSSES[stage](settings))
    return _kto(settings) if stage == "kto" else MeanLoss()


def without_unweighted(
    micro_batches: Sequence[MicroBatch], weights: Sequence[np.ndarray]
) -> tuple[list[MicroBatch], list[np.ndarray]]:
    """The documents that have a weight: the others have no gradient. A micro-batch without any stays as it is."""
    batches, of_batches = [], []
    for batch, values in zip(micro_batches, weights, strict=True):
        kept = np.add.reduceat(np.abs(values), batch.cu_seqlens[:-1]) != 0
        if kept.any() and not kept.all():
            batch, tokens = documents_of(batch, kept)
            values = values[tokens]
        batches.append(batch)
        of_batches.append(values)
    return batches, of_batches
