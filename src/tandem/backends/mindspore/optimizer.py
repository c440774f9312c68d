"""AdamW over fp32 tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from tandem.backends.interface import EngineSettings
from tandem.backends.mindspore.data_parallel import DataParallel
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.weight import Weight


@dataclass(frozen=True)
class Hyper:
    """The numbers of one update.

    Attributes:
        step: of the update, counted from 1.
        coefficient: what gradients are multiplied by.
    """

    step: int
    lr: float
    weight_decay: float
    coefficient: float
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class Update:
    """The tensors of one weight, all fp32. The gradient may change. `decays`: whether weight decay acts on it."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor
    decays: bool


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
        # The kernels compute with fp32 betas. The bias corrections must use the same numbers.
        self.beta1, self.beta2 = float(np.float32(settings.adam_beta1)), float(np.float32(settings.adam_beta2))
        self.epsilon = settings.adam_eps
        self.exp_avg = {name: kernels.zeros(weight.master.shape) for name, weight in self.weights.items()}
        self.exp_avg_sq = {name: kernels.zeros(weight.master.shape) for name, weight in self.weights.items()}

    def update(self, step: int, lr: float, weight_decay: float, coefficient: float) -> None:
        """Apply update number `step`, counted from 1, with the gradients times `coefficient`, to the masters."""
        updates = [
            Update(
                weight.master,
                self.exp_avg[name],
                self.exp_avg_sq[name],
                self.data(name).own_gradient(weight),
                decays=len(weight.value.shape) > 1,
            )
            for name, weight in self.weights.items()
        ]
        hyper = Hyper(step, lr, weight_decay, coefficient, self.beta1, self.beta2, self.epsilon)
        self.kernels.adamw(updates, hyper)
