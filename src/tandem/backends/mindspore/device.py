"""Preparing MindSpore for a device, once per process."""

from __future__ import annotations

import functools
import os

import mindspore as ms
from mindspore import mint

from tandem.errors import UserError
from tandem.frameworks import MINDSPORE

# device -> MindSpore's name for it, and its library of collectives
DEVICES = {"cpu": ("CPU", "mccl"), "npu": ("Ascend", "hccl")}


def prepare(device: str | None) -> str:
    """Prepare for "cpu" or "npu", or, for None, the best device present. Returns the device.

    Under msrun the process also joins the job, because msrun waits until all its workers have joined. msrun's scheduler
    process stays in this call until the job ends.

    Raises:
        UserError: MindSpore does not run on that device here.
        RuntimeError: the other processes of the job did not join.
    """
    if device is None:
        device = "npu" if ms.device_context.ascend.is_available() else "cpu"
    MINDSPORE.check_device(device)
    if device == "npu" and not ms.device_context.ascend.is_available():
        raise UserError("--device npu: this MindSpore finds no Ascend NPU: give --device cpu, or install CANN")
    _prepare(device)
    return device


def device_name() -> str:
    """The name of the device that `prepare` has prepared."""
    return "cpu" if ms.get_context("device_target") == "CPU" else str(ms.hal.get_device_name(own_number()))


def free_memory() -> int:
    """Bytes that this process's NPU has left, with those that MindSpore keeps for itself and does not use."""
    mint.zeros((1,), dtype=ms.float32)  # before its first operator a device has no memory: MindSpore would say 0
    ms.runtime.synchronize()
    unused = ms.runtime.memory_reserved() - ms.runtime.memory_allocated()
    return int(ms.hal.get_device_properties(own_number()).free_memory + unused)


def own_number() -> int:
    """The number of this process's device on its machine."""
    return int(ms.get_context("device_id"))


@functools.cache
def _prepare(device: str) -> None:
    """MindSpore accepts these settings only once."""
    target, collectives = DEVICES[device]
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_device(target)
    if device == "cpu":
        # The asynchronous pipeline's threads spin on the cores that the kernels need: about 2.8 times slower.
        ms.runtime.dispatch_threads_num(1)
        ms.runtime.launch_blocking()
    if "MS_ROLE" in os.environ:
        ms.communication.init(collectives)
