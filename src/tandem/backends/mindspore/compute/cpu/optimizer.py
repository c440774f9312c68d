"""Norm and AdamW on CPU: MindSpore's kernel for the update, and NumPy for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.compute.cpu.threads import split_work
from tandem.backends.mindspore.optimizer import Hyper, Update

_adam = ops.Adam()


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """The sum over all elements of all tensors, a number or a tensor: fp32 over short runs, and fp64 over the runs."""
    return sum(map(_squares, tensors))


def _squares(tensor: Tensor) -> float:
    values = tensor.asnumpy().reshape(-1)

    def run(part: slice) -> float:
        starts = range(part.start, part.stop, 2**16)
        runs = (values[start : min(start + 2**16, part.stop)] for start in starts)
        return sum(float(np.einsum("n,n->", run, run)) for run in runs)

    return sum(split_work(run, len(values), values.size))


def totals(ranks: Ranks, values: Sequence[Any]) -> list[float]:
    """The sums over the ranks of numbers or tensors of one number."""
    return ranks.sum_values(*values)


def adamw(updates: Sequence[Update], hyper: Hyper) -> None:
    """Update masters and moments in place."""
    # ops.Adam adds epsilon to the uncorrected sqrt(exp_avg_sq), so both corrections go into lr and epsilon.
    correction = math.sqrt(1 - hyper.beta2**hyper.step)
    corrected_lr = hyper.lr * correction / (1 - hyper.beta1**hyper.step)
    scalars = (0.0, 0.0, corrected_lr, hyper.beta1, hyper.beta2, hyper.eps * correction)
    arguments = [Tensor(scalar, ms.float32) for scalar in scalars]
    for update in updates:
        if hyper.coefficient != 1:
            scale(update.gradient, hyper.coefficient)
        if hyper.weight_decay and update.decays:
            scale(update.master, 1 - hyper.lr * hyper.weight_decay)
        _adam(update.master, update.exp_avg, update.exp_avg_sq, *arguments, update.gradient)


def scale(tensor: Tensor, factor: float) -> None:
    """Multiply in place."""
    values = tensor.asnumpy()
    split_work(lambda part: np.multiply(values[part], np.float32(factor), out=values[part]), len(values), values.size)
