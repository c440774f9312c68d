"""`--profile` on PyTorch: `torch.profiler`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

# Part of an event's name -> the module that its time counts for. An operation counts for the nearest event around it
# that is listed here. So a norm that is computed again in a linear layer's backward pass counts as a norm.
MODULES = {
    "c10d::": "communication",
    "gloo:": "communication",
    "nccl:": "communication",
    "scaled_dot_product": "attention",
    "ScaledDotProduct": "attention",
    "_RotaryHeads": "query and key norms, rotary",
    "_RMSNorm": "norms",
    "_SwiGLU": "SwiGLU",
    "_Linear": "linear layers",
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
        on_device = any(activity != ProfilerActivity.CPU for activity in supported_activities())
        return by_module(self._profile.events() or [], on_device), str(self._trace)


def by_module(events: Any, on_device: bool) -> dict[str, float]:
    """Seconds per module: with `on_device`, of the kernels that operations launched; otherwise of the operations."""
    seconds: dict[str, float] = {}
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
