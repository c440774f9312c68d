"""AdamW over gradient buffers, and the norm that clips it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import record_function

from tandem.backends.interface import EngineSettings


@record_function("gradient norm")
def norm_of(gradients: Iterable[torch.Tensor]) -> float:
    """L2 norm over all gradients. Rows are summed first: one fp32 sum over 10^8 squares would lose digits."""
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64).item() if rows else 0.0


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
        device = self.master[names[0]].device
        torch._fused_adamw_(
            [self.master[name] for name in names],
            [self._gradients(name) for name in names],
            [self.exp_avg[name] for name in names],
            [self.exp_avg_sq[name] for name in names],
            [],
            [torch.tensor(float(step), device=device)] * len(names),
            lr=lr,
            beta1=self.settings.adam_beta1,
            beta2=self.settings.adam_beta2,
            weight_decay=weight_decay,
            eps=self.settings.adam_eps,
            amsgrad=False,
            maximize=False,
            # The kernel divides gradients by this while it reads them.
            grad_scale=None if coefficient == 1.0 else torch.tensor(1.0 / coefficient, device=device),
        )
