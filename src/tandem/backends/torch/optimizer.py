"""AdamW over gradient buffers, and the norm that clips it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from tandem.backends.interface import EngineSettings, StepResult
from tandem.backends.torch.compute.sets import kernels_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDENED = 2**24  # numbers whose moments are there in fp32 at the same time, when they are kept in bf16


@record_function("gradient norm")
def sum_of_squares(gradients: Iterable[torch.Tensor]) -> torch.Tensor | float:
    """The square of the L2 norm over all gradients, a tensor of no dimensions; 0 for none."""
    tensors = list(gradients)
    return kernels_of(tensors[0].device).norm(tensors).square() if tensors else 0.0


@dataclass(frozen=True)
class Decision:
    """What becomes of a step: tensors of no dimensions, which the host need not know yet.

    Attributes:
        loss, norm: of the step.
        trained: its number of trained tokens.
        skip: 1 where it is not applied, 0 where it is.
        coefficient: what gradients are multiplied by.
    """

    loss: torch.Tensor
    norm: torch.Tensor
    trained: torch.Tensor
    skip: torch.Tensor
    coefficient: torch.Tensor

    @classmethod
    def of(
        cls,
        totals: torch.Tensor,
        loss_limit: float,
        loss_scale: float,
        clip_grad: float,
        given: float | None = None,
    ) -> Decision:
        """From the sums over all ranks of loss, squares and trained tokens, [3].

        The same as `is_trusted` and `clip_coefficient` of `tandem.backends.update`, without reading anything.

        Args:
            given: the loss, where it is not the weighted sum.
        """
        loss, norm = totals[0] / loss_scale, totals[1].sqrt() / loss_scale
        if given is not None:
            loss = torch.full_like(loss, given)
        trusted = loss.isfinite() & (loss <= loss_limit) & norm.isfinite()
        if given is None:
            trusted &= loss > 0
        clipped = (clip_grad / (norm + 1e-6)).clamp(max=1.0) if clip_grad > 0 else torch.ones_like(norm)
        return cls(loss, norm, totals[2], (~trusted).to(totals.dtype), clipped / loss_scale)

    def read(self) -> StepResult:
        """Wait for the step, and read all in one copy."""
        loss, norm, trained, skip = torch.stack([self.loss, self.norm, self.trained, self.skip]).tolist()
        return StepResult(loss, norm, int(trained), not skip)


class AdamW:
    """Decoupled weight decay, bias corrected (arXiv 1711.05101); fp32 weights, no decay on 1-D tensors.

    All is computed in fp32. Moments that are kept in bf16 are rounded to the nearest after each update.

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
        self.exp_avg, self.exp_avg_sq = (
            {name: torch.zeros_like(master, dtype=DTYPES[dtype]) for name, master in self.master.items()}
            for dtype in (settings.exp_avg_dtype, settings.exp_avg_sq_dtype)
        )

    @record_function("optimizer")
    def update(self, step: int, lr: float, weight_decay: float, decision: Decision) -> None:
        """Apply update number `step`, counted from 1, as decided. Gradients may change."""
        for decay, names in (
            (weight_decay, [name for name, weight in self.weights.items() if weight.ndim > 1]),
            (0.0, [name for name, weight in self.weights.items() if weight.ndim == 1]),
        ):
            if names:
                self._update(names, step, lr, decay, decision)
        narrow = [name for name, weight in self.weights.items() if weight.dtype != torch.float32]
        if narrow:
            torch._foreach_copy_([self.weights[name] for name in narrow], [self.master[name] for name in narrow])

    def _update(self, names: list[str], step: int, lr: float, weight_decay: float, decision: Decision) -> None:
        tensors = [
            (self.master[name], self._gradients(name), self.exp_avg[name], self.exp_avg_sq[name]) for name in names
        ]
        for group in _groups(tensors) if self.settings.narrow_moments else [tensors]:
            masters, gradients, *moments = map(list, zip(*group))
            with _in_fp32(moments) as (exp_avg, exp_avg_sq):
                kernels_of(masters[0].device).adamw(
                    masters,
                    gradients,
                    exp_avg,
                    exp_avg_sq,
                    step,
                    decision.coefficient,
                    decision.skip,
                    lr=lr,
                    beta1=self.settings.adam_beta1,
                    beta2=self.settings.adam_beta2,
                    weight_decay=weight_decay,
                    eps=self.settings.adam_eps,
                )


def _groups(tensors: Sequence[tuple[torch.Tensor, ...]]) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """The same numbers in groups of tensors, with hardly more than WIDENED numbers in each. Large tensors are cut."""
    group: list[tuple[torch.Tensor, ...]] = []
    size = 0
    for of_weight in tensors:
        rows = max(1, WIDENED * len(of_weight[0]) // of_weight[0].numel())
        for part in zip(*(tensor.split(rows) for tensor in of_weight)):
            group.append(part)
            size += part[0].numel()
            if size >= WIDENED:
                yield group
                group, size = [], 0
    if group:
        yield group


@contextmanager
def _in_fp32(moments: Sequence[list[torch.Tensor]]) -> Iterator[list[list[torch.Tensor]]]:
    """The same lists of tensors in fp32. What becomes of them is rounded to where they came from."""
    narrow = [tensors for tensors in moments if tensors[0].dtype != torch.float32]
    copies = [[torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors] for tensors in narrow]
    for wide, tensors in zip(copies, narrow):
        torch._foreach_copy_(wide, tensors)
    rest = iter(copies)
    yield [tensors if tensors[0].dtype == torch.float32 else next(rest) for tensors in moments]
    for wide, tensors in zip(copies, narrow):
        torch._foreach_copy_(tensors, wide)
