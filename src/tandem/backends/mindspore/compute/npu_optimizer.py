"""Norm and AdamW on Ascend NPUs. Written from MindSpore's documentation; there was no NPU to run it on."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Tensor, mint, ops

from tandem.backends.mindspore.optimizer import Hyper, Update

_adamw = ops.auto_generate.AdamW()


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor | float:
    """Rows are summed first: one fp32 sum over 10^8 squares would lose digits. There is no float64 on the device."""
    if not tensors:
        return 0.0
    rows = [mint.linalg.vector_norm(tensor, 2, -1) if len(tensor.shape) > 1 else tensor for tensor in tensors]
    return mint.square(mint.linalg.vector_norm(mint.cat([of_tensor.reshape(-1) for of_tensor in rows], 0), 2))


def adamw(updates: Sequence[Update], hyper: Hyper) -> None:
    """One operator for each weight, and one more where gradients are clipped."""
    step = mint.full(
        (1,), float(hyper.step - 1), dtype=ms.float32
    )  # the operator adds 1, as `mint.optim.AdamW` expects
    for update in updates:
        if hyper.coefficient != 1:
            update.gradient.mul_(hyper.coefficient)
        _adamw(
            update.master,
            update.exp_avg,
            update.exp_avg_sq,
            update.exp_avg_sq,  # unused without amsgrad
            update.gradient,
            step,
            hyper.lr,
            hyper.beta1,
            hyper.beta2,
            hyper.weight_decay if update.decays else 0.0,
            hyper.eps,
            False,  # amsgrad
            False,  # maximize
        )
