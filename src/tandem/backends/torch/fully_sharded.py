"""PyTorch's `fully_shard`: weights, gradients and optimizer state by rows over data ranks.

A unit is a decoder layer here. `fully_shard` gathers a unit's weights for its forward and for its backward pass, and
frees them after each. Then it takes the `grad` of each whole weight, sums it over the ranks, and adds this rank's rows
of the sum to the `grad` of these rows.

Everything outside layers is one more unit. Every backward pass needs its whole weights and the head's whole gradient.
So it stays whole for a step, with all its gradients, and is gathered and scattered once.

Source: "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tandem.backends.torch.communication import Ranks
from tandem.backends.torch.functional import Gradient, Weight
from tandem.backends.torch.overlap import Part
from tandem.errors import UserError


class FullySharded:
    """`tandem.backends.torch.data_parallel.Sharing` of ranks that keep only their rows of everything.

    Rows and gradients are fp32.

    Args:
        dtype: of whole weights. Rows are cast to it when they are gathered.

    Raises:
        UserError: this PyTorch is too old.
    """

    weights_by_rows = by_rows = True

    def __init__(self, ranks: Ranks, dtype: torch.dtype, device: torch.device) -> None:
        if not (hasattr(torch.Tensor, "grad_dtype") and hasattr(FSDPModule, "set_force_sum_reduction_for_comms")):
            raise UserError(f"--use-torch-fsdp2 needs a newer PyTorch than {torch.__version__}")
        assert ranks.group is not None
        self.ranks = ranks
        self._mesh = DeviceMesh.from_group(ranks.group, device.type)  # creates no group: see `make_groups`
        self._precision = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self._units: list[FSDPModule] = []
        self._weights: list[nn.Parameter] = []

    def add(self, module: nn.Module) -> None:
        """Shard the weights of a module, except those in modules that were added before."""
        unit = fully_shard(module, mesh=self._mesh, mp_policy=self._precision)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
        self._units.append(unit)

    def prepare(self, weights: Sequence[nn.Parameter], *, training: bool) -> None:
        if not training:
            return
        self._weights = [weight for weight in weights if weight.requires_grad]
        for unit in self._units:
            unit.unshard()
            for parameter in cast(nn.Module, unit).parameters():
                if isinstance(parameter, DTensor):
                    continue
                whole = cast(Weight, parameter)  # the same object whenever its unit is whole
                whole.main_grad = None
                if whole.requires_grad:
                    whole.grad_dtype = torch.float32
                    whole.main_grad = _Grad(whole)
            unit.reshard()

    def overlap(self, parts: Sequence[Part]) -> None:
        pass  # `fully_shard` does so by itself

    def begin(self, *, gradients: bool) -> None:
        if gradients:
            for weight in self._weights:
                weight.grad = None

    def before_backward(self, chunk: nn.Module, *, last: bool) -> None:
        unit = cast(FSDPModule, chunk)
        unit.set_requires_gradient_sync(last, recurse=False)
        unit.set_reshard_after_backward(last, recurse=False)

    def end(self) -> None:
        for unit in self._units:
            unit.reshard()

    def reduce(self) -> None:
        pass  # done in each backward pass

    def share(self) -> None:
        pass  # the next forward pass gathers

    def kept(self, weight: nn.Parameter) -> torch.Tensor:
        return _rows(weight)

    def updated(self, weight: nn.Parameter) -> torch.Tensor:
        return _rows(weight)

    def gradient(self, weight: nn.Parameter) -> torch.Tensor:
        return _rows(weight.grad)

    def whole_gradient(self, weight: nn.Parameter) -> torch.Tensor:
        assert isinstance(weight.grad, DTensor)
        return weight.grad.full_tensor()


class _Grad(Gradient):
    """The `grad` of a weight while it is whole. `fully_shard` sums and scatters it."""

    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = weight

    def _open(self) -> tuple[torch.Tensor, bool]:
        first = self._weight.grad is None
        if self._weight.grad is None:
            self._weight.grad = torch.empty_like(self._weight, dtype=torch.float32)
        return self._weight.grad, first


def _rows(sharded: torch.Tensor | None) -> torch.Tensor:
    assert isinstance(sharded, DTensor)
    return sharded.to_local().detach()
