"""AdamW over fp32 tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from tandem.backends.interface import EngineSettings
from tandem.backends.mindspore.data_parallel import DataParallel
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.weight import Weight

_adam = ops.Adam()


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101), bias corrected; 1-D tensors do not decay.

    Args:
        data: weight's name -> the ranks that share its updates.

    Attributes:
        exp_avg, exp_avg_sq: first and second moments of the masters, by name, fp32.
    """

    def __init__(
        self,
        weights: dict[str, Weight],
        data: Callable[[str], DataParallel],
        settings: EngineSettings,
        kernels: Kernels,
    ) -> None:
        self.weights = {name: weight for name, weight in weights.items() if weight.master.shape[0]}
        self.data = data
        self.kernels = kernels
        # The kernel computes with fp32 betas. The bias corrections must use the same numbers.
        self.beta1, self.beta2 = float(np.float32(settings.adam_beta1)), float(np.float32(settings.adam_beta2))
        self.epsilon = settings.adam_eps
        self.exp_avg = {name: kernels.zeros(weight.master.shape) for name, weight in self.weights.items()}
        self.exp_avg_sq = {name: kernels.zeros(weight.master.shape) for name, weight in self.weights.items()}

    def update(self, step: int, lr: float, weight_decay: float, coefficient: float) -> None:
        """Apply update number `step`, counted from 1, with the gradients times `coefficient`, to the masters."""
        # ops.Adam adds epsilon to the uncorrected sqrt(exp_avg_sq), so both corrections go into lr and epsilon.
        correction = math.sqrt(1 - self.beta2**step)
        corrected_lr = lr * correction / (1 - self.beta1**step)
        scalars = (0.0, 0.0, corrected_lr, self.beta1, self.beta2, self.epsilon * correction)
        arguments = [Tensor(scalar, ms.float32) for scalar in scalars]
        for name, weight in self.weights.items():
            gradient = self.data(name).own_rows_of(weight.gradient)
            if coefficient != 1:
                self.kernels.scale(gradient, coefficient)
            if weight_decay and len(weight.value.shape) > 1:
                self.kernels.scale(weight.master, 1 - lr * weight_decay)
            _adam(weight.master, self.exp_avg[name], self.exp_avg_sq[name], *arguments, gradient)
