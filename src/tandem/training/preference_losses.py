"""Losses of pairs of answers, as functions of two scores: numbers in, numbers and derivatives out.

A score is what a loss compares answers by: the log-probability of an answer, or its mean per token, each less that of
the reference where there is one. All arrays are float64 [pairs].

Sources: DPO (arXiv 2305.18290), with hinge (SLiC, 2305.10425), IPO (2310.12036, over means per token as in TRL), robust
(2403.00409) and APO zero (2408.06266); ORPO (2403.07691); SimPO (2405.14734).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from tandem.config.settings import PreferenceSettings


class Slopes(NamedTuple):
    """The loss of each pair, and its derivatives by the scores of both answers."""

    loss: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


Function = Callable[[np.ndarray, np.ndarray], Slopes]  # of the scores of chosen and rejected answers


@dataclass(frozen=True, kw_only=True)
class PairLoss:
    """A loss of pairs.

    Attributes:
        of_scores: the loss as a function of the scores.
        beta: rewards are scores times this.
        per_token: scores are means per token. Otherwise they are sums.
        reference: scores are less those of the reference.
        rewards_per_token: rewards are of means per token.
        imitation: weight of the chosen answer's mean loss per token, which is added.
    """

    of_scores: Function
    beta: float
    per_token: bool = False
    reference: bool = False
    rewards_per_token: bool = False
    imitation: float = 0.0


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def _of_difference(function: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Function:
    """A loss that depends only on the difference of the scores. `function` returns it and its derivative."""

    def of_scores(chosen: np.ndarray, rejected: np.ndarray) -> Slopes:
        loss, slope = function(chosen - rejected)
        return Slopes(loss, slope, -slope)

    return of_scores


def _sigmoid_loss(
    difference: np.ndarray, beta: float, smoothing: float = 0.0, margin: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x), where e is the smoothing."""
    x = beta * (difference - margin)
    loss = (1 - smoothing) * np.logaddexp(0.0, -x) + smoothing * np.logaddexp(0.0, x)
    return loss, beta * (smoothing * sigmoid(x) - (1 - smoothing) * sigmoid(-x))


def _robust_loss(difference: np.ndarray, beta: float, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    x, rest = beta * difference, 1 - 2 * smoothing
    loss = ((1 - smoothing) * np.logaddexp(0.0, -x) - smoothing * np.logaddexp(0.0, x)) / rest
    return loss, -beta * ((1 - smoothing) * sigmoid(-x) + smoothing * sigmoid(x)) / rest


def _hinge_loss(difference: np.ndarray, beta: float, margin: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    x = beta * (difference - margin)
    return np.maximum(0.0, 1 - x), np.where(x < 1, -beta, 0.0)


def _squared_loss(difference: np.ndarray, beta: float, margin: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    error = difference - margin - 1 / (2 * beta)
    return error**2, 2 * error


def _apo_zero(chosen: np.ndarray, rejected: np.ndarray, beta: float) -> Slopes:
    high, low = sigmoid(beta * chosen), sigmoid(beta * rejected)
    return Slopes(1 - high + low, -beta * high * (1 - high), beta * low * (1 - low))


def _odds_ratio(chosen: np.ndarray, rejected: np.ndarray, beta: float) -> Slopes:
    """-beta * log sigmoid(log(odds of chosen / odds of rejected)), with odds p / (1 - p)."""
    log_odds = (chosen - np.log(-np.expm1(chosen))) - (rejected - np.log(-np.expm1(rejected)))
    slope = -beta * sigmoid(-log_odds)
    return Slopes(beta * np.logaddexp(0.0, -log_odds), slope / -np.expm1(chosen), -slope / -np.expm1(rejected))


def _dpo(settings: PreferenceSettings) -> PairLoss:
    beta, smoothing = settings.dpo_beta, settings.dpo_label_smoothing
    functions: dict[str, Function] = {
        "sigmoid": _of_difference(partial(_sigmoid_loss, beta=beta, smoothing=smoothing)),
        "hinge": _of_difference(partial(_hinge_loss, beta=beta)),
        "ipo": _of_difference(partial(_squared_loss, beta=beta)),
        "robust": _of_difference(partial(_robust_loss, beta=beta, smoothing=smoothing)),
        "apo_zero": partial(_apo_zero, beta=beta),
        "sigmoid_norm": _of_difference(partial(_sigmoid_loss, beta=beta)),
    }
    return PairLoss(
        of_scores=functions[settings.dpo_loss_type],
        beta=beta,
        per_token=settings.dpo_loss_type in ("ipo", "sigmoid_norm"),
        reference=True,
        imitation=settings.pref_ftx,
    )


def _orpo(settings: PreferenceSettings) -> PairLoss:
    beta = settings.orpo_beta
    return PairLoss(
        of_scores=partial(_odds_ratio, beta=beta), beta=beta, per_token=True, rewards_per_token=True, imitation=1.0
    )


def _simpo(settings: PreferenceSettings) -> PairLoss:
    beta, margin = settings.simpo_beta, settings.gamma_beta_ratio
    functions: dict[str, Function] = {
        "sigmoid": _of_difference(
            partial(_sigmoid_loss, beta=beta, smoothing=settings.simpo_label_smoothing, margin=margin)
        ),
        "hinge": _of_difference(partial(_hinge_loss, beta=beta, margin=margin)),
        "ipo": _of_difference(partial(_squared_loss, beta=beta, margin=margin)),
    }
    return PairLoss(of_scores=functions[settings.simpo_loss_type], beta=beta, per_token=True, rewards_per_token=True)


PAIR_LOSSES: dict[str, Callable[[PreferenceSettings], PairLoss]] = {"dpo": _dpo, "orpo": _orpo, "simpo": _simpo}
