"""AdamW over gradient buffers, and the norm that clips it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import record_function

from tandem.backends.interface import EngineSettings
from tandem.backends.torch.compute.sets import kernels_of


@record_function("gradient norm")
def norm_of(gradients: Iterable[torch.Tensor]) -> float:
    """L2 norm over all gradients."""
    tensors = list(gradients)
    return kernels_of(tensors[0].device).norm(tensors).item() if tensors else 0.0


class AdamW:
    """Decoupled weight decay, bias corrected (arXiv 1711.05101); fp32 moments and weights, no decay on 1-D tensors.

    Args:
        weights: the tensors to update, by name: views of the model's weights, or of some of their rows.
        gradients: name -> the fp32 gradient, of the same shape.

    Attributes:
        master: the fp32 weights to update, by name: the model's, or copies when the model computes in 16 bits.
        exp_avg, exp_avg_sq: the moments, by name.
    """

    def __init__(
        self, weights: dict[str, torch.Tensor], gradients: Callable[[str], torch.Tensor], settings: EngineSettings
    ) -> None:
        self.weights = weights
        self.settings = settings
        self._gradients = gradients
        self.master = {
            name: weight if weight.dtype == torch.float32 else torch.empty_like(weight, dtype=torch.float32)
            for name, weight in weights.items()
        }
        self.exp_avg = {name: torch.zeros_like(master) for name, master in self.master.items()}
        self.exp_avg_sq = {name: torch.zeros_like(master) for name, master in self.master.items()}

    @record_function("optimizer")
    def update(self, step: int, lr: float, weight_decay: float, coefficient: float) -> None:
        """Apply update number `step`, counted from 1, with the gradients times `coefficient`. Gradients may change."""
        for decay, names in (
            (weight_decay, [name for name, weight in self.weights.items() if weight.ndim > 1]),
            (0.0, [name for name, weight in self.weights.items() if weight.ndim == 1]),
        ):
            if names:
                self._update(names, step, lr, decay, coefficient)
        for name, weight in self.weights.items():
            if weight.dtype != torch.float32:
                weight.copy_(self.master[name])

    def _update(self, names: list[str], step: int, lr: float, weight_decay: float, coefficient: float) -> None:
        kernels_of(self.master[names[0]].device).adamw(
            [self.master[name] for name in names],
            [self._gradients(name) for name in names],
            [self.exp_avg[name] for name in names],
            [self.exp_avg_sq[name] for name in names],
            step,
            coefficient,
            lr=lr,
            beta1=self.settings.adam_beta1,
            beta2=self.settings.adam_beta2,
            weight_decay=weight_decay,
            eps=self.settings.adam_eps,
        )
