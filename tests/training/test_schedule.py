"""Learning rates as Megatron's `OptimizerParamScheduler` gives them."""

from __future__ import annotations

import math

import pytest

from tandem.config.checks import check_settings
from tandem.config.parsing import from_dict
from tandem.errors import UserError
from tandem.training.schedule import schedule_from


def rates(steps: int, **values: object) -> list[float]:
    settings = from_dict({"lr": 1.0, "train_iters": 10, "global_batch_size": 4, **values}, "test")
    schedule = schedule_from(settings.optimizer, settings.training)
    return [schedule.lr(step * 4) for step in range(steps)]


def test_warm_up_begins_at_zero_and_reaches_the_peak() -> None:
    assert rates(4, lr_warmup_iters=3, lr_decay_style="constant") == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_warm_up_by_fraction_and_initial_rate() -> None:
    actual = rates(6, lr_warmup_fraction=0.5, lr_warmup_init=0.5, lr_decay_style="constant")
    assert actual == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def test_linear_reaches_the_floor_at_the_last_step_and_stays() -> None:
    actual = rates(13, min_lr=0.1, lr_decay_style="linear")
    assert actual == pytest.approx([0.1 + 0.9 * (1 - min(step, 10) / 10) for step in range(13)])


def test_cosine() -> None:
    actual = rates(10, min_lr=0.1, lr_decay_style="cosine", lr_warmup_iters=2)
    expected = [0, 0.5, 1] + [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 2) / 8)) for s in range(3, 10)]
    assert actual == pytest.approx(expected)


def test_inverse_square_root() -> None:
    actual = rates(10, lr_decay_style="inverse-square-root", lr_warmup_iters=4)
    assert actual[4:] == pytest.approx([math.sqrt(16) / math.sqrt(4 * step) for step in range(4, 10)])


def test_decay_iterations_of_their_own() -> None:
    assert rates(8, lr_decay_iters=5)[5:] == [0, 0, 0]


@pytest.mark.parametrize("values", [{"lr_warmup_iters": 10}, {"lr_warmup_fraction": 1.0}])
def test_a_warm_up_without_end_is_refused(values: dict) -> None:
    with pytest.raises(
        UserError, match=r"warm-up of .* expected less than the decay|--lr-warmup-fraction 1\.0: expected"
    ):
        rates(1, **values)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
        ("exponential", [1, 2 * 0.5**0.25 - 1, 2 * 0.5**0.5 - 1, 2 * 0.5**0.75 - 1, 0]),
        ("minus_sqrt", [1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0]),
    ],
)
def test_wsd_warms_up_stays_and_anneals(style: str, expected: list[float]) -> None:
    actual = rates(11, lr_decay_style="WSD", lr_wsd_decay_iters=4, lr_wsd_decay_style=style, lr_warmup_iters=2)
    assert actual[:7] == pytest.approx([0, 0.5, 1, 1, 1, 1, 1])
    assert actual[6:] == pytest.approx(expected)


def test_lengths_in_samples() -> None:
    actual = rates(
        6,
        train_iters=None,
        train_samples=30,
        lr_decay_samples=24,
        lr_warmup_samples=6,
        lr_decay_style="linear",
    )
    assert actual == pytest.approx([0, 4 / 6, 1 - 2 / 18, 1 - 6 / 18, 1 - 10 / 18, 1 - 14 / 18])


@pytest.mark.parametrize(
    ("style", "middle"), [("linear", 0.2), ("cosine", 0.1 + 0.2 * 0.5 * (math.cos(math.pi * 0.5) + 1))]
)
def test_weight_decay_grows_over_the_run(style: str, middle: float) -> None:
    values = {"weight_decay_incr_style": style, "start_weight_decay": 0.1, "end_weight_decay": 0.3}
    settings = from_dict({"lr": 1.0, "train_iters": 10, "global_batch_size": 4, **values}, "test")
    schedule = schedule_from(settings.optimizer, settings.training)
    decays = [schedule.weight_decay(samples) for samples in (0, 20, 40, 44)]
    assert decays == pytest.approx([0.1, middle, 0.3, 0.3])


def test_the_batch_ramps_up_as_megatrons() -> None:
    """Sizes 2, 4, 6 over 12 samples, then 8; the step that begins at sample 12 still belongs to the ramp."""
    settings = from_dict(
        {"train_samples": 50, "global_batch_size": 8, "micro_batch_size": 2, "rampup_batch_size": [2, 2, 12]}, "test"
    )
    sizes, consumed = [], 0
    while consumed < settings.training.length.samples:
        sizes.append(settings.training.length.batch_sizes.at(consumed))
        consumed += sizes[-1]
    assert sizes == [2, 2, 4, 6, 8, 8, 8, 8]
    assert (settings.training.length.iterations, settings.training.length.samples) == (len(sizes), consumed)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"train_iters": 5, "train_samples": 20}, "--train-samples"),
        ({"train_iters": 5, "lr_warmup_samples": 2}, "--lr-warmup-samples"),
        ({"train_iters": 5, "rampup_batch_size": [1, 1, 2]}, "--rampup-batch-size"),
        ({"train_samples": 20, "lr_decay_iters": 2}, "--lr-decay-iters"),
        ({"train_samples": 20, "rampup_batch_size": [3, 2, 2]}, "whole increments"),
        ({"train_samples": 20, "rampup_batch_size": [1, 1, 2], "micro_batch_size": 2}, "--micro-batch-size"),
        ({"train_iters": 5, "lr_decay_style": "WSD"}, "--lr-wsd-decay-iters"),
        ({"train_iters": 5, "start_weight_decay": 0.1}, "--weight-decay-incr-style"),
        ({"train_iters": 5, "weight_decay_incr_style": "linear", "start_weight_decay": 0.1}, "end-weight-decay"),
    ],
)
def test_settings_that_contradict_each_other(values: dict, named: str) -> None:
    settings = from_dict({"lr": 1.0, "global_batch_size": 4, "data_path": "x", "init": "random", **values}, "test")
    with pytest.raises(UserError, match=named):
        check_settings(settings)
