"""A finished step, as the logs get it."""

from __future__ import annotations

from tandem.training.logs.log import StepRecord


def step_record(iteration: int = 1, **changes: object) -> StepRecord:
    values: dict[str, object] = {
        "iteration": iteration,
        "train_iters": 100,
        "consumed_samples": 8 * iteration,
        "batch_size": 8,
        "loss": 5.0 / iteration,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "next_lr": 9e-4,
        "epoch": 0.25,
        "tokens": 1000,
        "trained_tokens": 600,
        "seconds": 0.5,
        "flops": 4e12,
        "devices": 2,
        "peak_flops": 8e12,
        "memory": 1 << 30,
        **changes,
    }
    return StepRecord(**values)  # type: ignore[arg-type]
