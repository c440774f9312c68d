"""Learning rates as Megatron's `OptimizerParamScheduler` gives them."""

from __future__ import annotations

import math

import pytest

from tandem.config.sources import from_dict
from tandem.errors import UserError
from tandem.training.schedule import schedule_from


def rates(steps: int, **values: object) -> list[float]:
    settings = from_dict({"lr": 1.0, "train_iters": 10, "global_batch_size": 4, **values}, "test")
    schedule = schedule_from(settings)
    return [schedule.lr(step * 4) for step in range(steps)]


def test_warm_up_begins_at_zero_and_reaches_the_peak() -> None:
    assert rates(4, lr_warmup_iters=3, lr_decay_style="constant") == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_warm_up_by_fraction_and_initial_rate() -> None:
    found = rates(6, lr_warmup_fraction=0.5, lr_warmup_init=0.5, lr_decay_style="constant")
    assert found == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def test_linear_reaches_the_floor_at_the_last_step_and_stays() -> None:
    found = rates(13, min_lr=0.1, lr_decay_style="linear")
    assert found == pytest.approx([0.1 + 0.9 * (1 - min(step, 10) / 10) for step in range(13)])


def test_cosine() -> None:
    found = rates(10, min_lr=0.1, lr_decay_style="cosine", lr_warmup_iters=2)
    expected = [0, 0.5, 1] + [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 2) / 8)) for s in range(3, 10)]
    assert found == pytest.approx(expected)


def test_inverse_square_root() -> None:
    found = rates(10, lr_decay_style="inverse-square-root", lr_warmup_iters=4)
    assert found[4:] == pytest.approx([math.sqrt(16) / math.sqrt(4 * step) for step in range(4, 10)])


def test_decay_iterations_of_their_own() -> None:
    assert rates(8, lr_decay_iters=5)[5:] == [0, 0, 0]


@pytest.mark.parametrize("values", [{"lr_warmup_iters": 10}, {"lr_warmup_fraction": 1.0}])
def test_a_warm_up_without_end_is_refused(values: dict) -> None:
    with pytest.raises(UserError, match="warm-up"):
        rates(1, **values)
