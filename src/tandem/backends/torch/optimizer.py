"""AdamW over gradient buffers, and the norm that clips it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tandem.backends.interface import EngineSettings
from tandem.backends.torch.functional import GradientBuffer, Weight


def global_norm(buffers: Iterable[GradientBuffer]) -> float:
    """L2 norm over all gradients. Row by row first: a plain fp32 sum over 10^8 squares would lose digits."""
    rows = [torch.linalg.vector_norm(buffer.value, dim=-1).flatten() for buffer in buffers]
    return torch.linalg.vector_norm(torch.cat(rows), dtype=torch.float64).item()


def clip_coefficient(norm: float, clip_grad: float) -> float:
    """What gradients are multiplied by, as in Megatron; `clip_grad` 0 is off."""
    return min(1.0, clip_grad / (norm + 1e-6)) if clip_grad > 0 else 1.0


class AdamW:
    """Decoupled weight decay, bias corrected (arXiv 1711.05101); fp32 moments and weights, no decay on 1-D tensors.

    Attributes:
        step: updates applied so far.
        master: the fp32 weights that are updated: the model's own, or copies when the model computes in less.
        exp_avg, exp_avg_sq: the moments. All three are keyed by name.
    """

    def __init__(self, weights: dict[str, Weight], settings: EngineSettings) -> None:
        self.step = 0
        self.weights = weights
        self.settings = settings
        self.master = {
            name: weight.data if weight.dtype == torch.float32 else torch.empty_like(weight, dtype=torch.float32)
            for name, weight in weights.items()
        }
        self.exp_avg = {name: torch.zeros_like(master) for name, master in self.master.items()}
        self.exp_avg_sq = {name: torch.zeros_like(master) for name, master in self.master.items()}

    def update(self, lr: float, weight_decay: float, coefficient: float) -> None:
        """One step over the gradients in the weights' buffers times `coefficient`; the buffers are used up."""
        self.step += 1
        for decay, names in (
            (weight_decay, [name for name, weight in self.weights.items() if weight.ndim > 1]),
            (0.0, [name for name, weight in self.weights.items() if weight.ndim == 1]),
        ):
            self._update(names, lr, decay, coefficient)
        for name, weight in self.weights.items():
            if weight.dtype != torch.float32:
                weight.data.copy_(self.master[name])

    def _update(self, names: list[str], lr: float, weight_decay: float, coefficient: float) -> None:
        device = self.master[names[0]].device
        gradients = []
        for name in names:
            buffer = self.weights[name].main_grad
            assert buffer is not None
            gradients.append(buffer.value)
        torch._fused_adamw_(
            [self.master[name] for name in names],
            gradients,
            [self.exp_avg[name] for name in names],
            [self.exp_avg_sq[name] for name in names],
            [],
            [torch.tensor(float(self.step), device=device)] * len(names),
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
