"""`--profile` on PyTorch: `torch.profiler`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, supported_activities

# Part of an event's name -> the module that its time counts for. An operation counts for the nearest event around it
# that is listed here. So a norm that is computed again in a linear layer's backward pass counts as a norm.
MODULES = {
    "c10d::": "communication",
    "gloo:": "communication",
    "nccl:": "communication",
    "scaled_dot_product": "attention",
    "flash_attention": "attention",
    "_Flash": "attention",
    "ScaledDotProduct": "attention",
    "_RotaryHeads": "query and key norms, rotary",
    "_RMSNorm": "norms",
    "_SwiGLU": "SwiGLU",
    "_Route": "router",
    "_Mixture": "experts",
    "Linear": "linear layers",  # plain ones, with adapters, and after an exchange between ranks
    "_Embedding": "embedding",
    "loss": "head and loss",
    "optimizer": "optimizer",
    "gradient norm": "gradient norm",
}
REST = "everything else"


def start(folder: Path) -> TorchProfiler:
    """A running profiler whose files go into `folder`."""
    return TorchProfiler(folder)


class TorchProfiler:
    """`tandem.backends.interface.Profiler`."""

    def __init__(self, folder: Path) -> None:
        self._trace = folder / "trace.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._profile = profile(activities=supported_activities())
        self._profile.start()

    def stop(self) -> tuple[dict[str, float], str]:
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._trace))
        return by_module(self._profile.events() or []), str(self._trace)

    def counts(self) -> dict[str, int]:
        return count(self._profile.events() or [])


def _of_device(events: Any) -> list[Any]:
    """What a device did: kernels and copies. A name that was given to a part of a program is no kernel.

    A machine may have a device that a run does not use, or none sees into.
    """
    there = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    return [event for event in there if not getattr(event, "is_user_annotation", False)]


def count(events: Any) -> dict[str, int]:
    """Kernels, copies to the device, and calls in which the host waits for it; without kernels, operators that are no
    part of another one.
    """
    there = [event.name for event in _of_device(events)]
    if not there:
        of_host = [event for event in events if event.name.startswith("aten::")]
        return {"operators": sum(event.cpu_parent is None or not _is_operator(event.cpu_parent) for event in of_host)}
    copies = [name for name in there if name.startswith(("Memcpy", "Memset"))]
    return {
        "kernels": len(there) - len(copies),
        "copies to the device": sum("HtoD" in name for name in copies),
        "waits": sum("Synchronize" in event.name for event in events),
    }


def _is_operator(event: Any) -> bool:
    while event is not None:
        if event.name.startswith("aten::"):
            return True
        event = event.cpu_parent
    return False


def by_module(events: Any) -> dict[str, float]:
    """Seconds per module: of the kernels that operations launched, or of the operations where no kernels were seen."""
    seconds: dict[str, float] = {}
    on_device = bool(_of_device(events))
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
        name = module_of(event)
        seconds[name] = seconds.get(name, 0.0) + microseconds / 1e6
    return {name: spent for name, spent in seconds.items() if spent > 0}


def module_of(event: Any) -> str:
    while event is not None:
        for part, module in MODULES.items():
            if part in event.name:
                return module
        event = event.cpu_parent
    return REST
