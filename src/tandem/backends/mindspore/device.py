"""Preparing MindSpore for a device, and what that device computes with. The one place where devices differ."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor

from tandem.backends.mindspore import attention, functional, loss, npu
from tandem.backends.mindspore.weight import Pullback
from tandem.errors import UserError

Differentiable = Callable[..., "tuple[Tensor, Pullback]"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions that each device has its own of; signatures and shapes are those of the CPU's.

    Attributes:
        bf16: matrix products in bfloat16 exist.
        fp32_notice: what the user should know when computing in fp32.
    """

    embedding: Differentiable
    select_rows: Differentiable
    rms_norm: Differentiable
    swiglu: Differentiable
    attention: Differentiable
    cross_entropy: Callable[..., float]
    cross_entropy_and_gradient: Callable[..., tuple[float, Tensor]]
    zeros: Callable[[tuple[int, ...]], Tensor]
    scale: Callable[[Tensor, float], None]
    sum_of_squares: Callable[[Tensor], float]
    bf16: bool
    fp32_notice: str = ""


CPU = Kernels(
    embedding=functional.embedding,
    select_rows=functional.select_rows,
    rms_norm=functional.rms_norm,
    swiglu=functional.swiglu,
    attention=attention.attention,
    cross_entropy=loss.cross_entropy,
    cross_entropy_and_gradient=loss.cross_entropy_and_gradient,
    zeros=functional.zeros,
    scale=functional.scale,
    sum_of_squares=functional.sum_of_squares,
    bf16=False,
)

NPU = Kernels(
    embedding=npu.embedding,
    select_rows=npu.select_rows,
    rms_norm=npu.rms_norm,
    swiglu=npu.swiglu,
    attention=npu.attention,
    cross_entropy=npu.cross_entropy,
    cross_entropy_and_gradient=npu.cross_entropy_and_gradient,
    zeros=npu.zeros,
    scale=npu.scale,
    sum_of_squares=npu.sum_of_squares,
    bf16=True,
    fp32_notice="fp32: flash attention on Ascend computes in bf16; the rest computes in fp32",
)

_DEVICES = {"cpu": ("CPU", "mccl", CPU), "npu": ("Ascend", "hccl", NPU)}


def kernels_for(device: str | None) -> Kernels:
    """Prepare MindSpore for "cpu" or "npu", or the better of those present, and give its kernels.

    Under msrun the process also joins the job, for msrun waits until its workers have met.

    Raises:
        UserError: MindSpore does not run on that device here.
    """
    if device is None:
        device = "npu" if ms.device_context.ascend.is_available() else "cpu"
    if device not in _DEVICES:
        raise UserError(f"device {device!r}: the MindSpore backend runs on {' or '.join(_DEVICES)}")
    if device == "npu" and not ms.device_context.ascend.is_available():
        raise UserError("device 'npu': this MindSpore finds no Ascend NPU; use device 'cpu', or install CANN")
    _prepare(device)
    return _DEVICES[device][2]


def device_name() -> str:
    """Of the device that `kernels_for` has prepared."""
    return "cpu" if ms.get_context("device_target") == "CPU" else str(ms.hal.get_device_name(0))


@functools.cache
def _prepare(device: str) -> None:
    """Once per process: MindSpore accepts these settings only once."""
    target, collectives, _ = _DEVICES[device]
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_device(target)
    if device == "cpu":
        # The asynchronous pipeline's threads spin on the cores that the kernels need: about 2.8 times slower.
        ms.runtime.dispatch_threads_num(1)
        ms.runtime.launch_blocking()
    if "MS_ROLE" in os.environ:
        ms.communication.init(collectives)
