"""`--profile` on MindSpore: `mindspore.profiler`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import mindspore as ms
from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from tandem.backends.mindspore.compute.cpu import products

# Operator -> module. On the CPU, products and the rest of the work run in NumPy, which the profiler does not see.
# Products are counted; the rest is one entry, `OUTSIDE`.
OPERATORS = {
    "MatMul": products.LINEAR,
    "BatchMatMul": products.ATTENTION,
    "FlashAttentionScore": products.ATTENTION,
    "FlashAttentionScoreGrad": products.ATTENTION,
    "Adam": "optimizer",
    "AllReduce": "communication",
    "AllGather": "communication",
    "Send": "communication",
    "Receive": "communication",
}
OUTSIDE = "outside operators"


def start(folder: Path) -> MindSporeProfiler:
    """A running profiler whose files go into `folder`."""
    return MindSporeProfiler(folder)


class MindSporeProfiler:
    """`tandem.backends.interface.Profiler`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        activities = [ProfilerActivity.CPU]
        if ms.get_context("device_target") != "CPU":
            activities.append(ProfilerActivity.NPU)
        self._before = set(folder.iterdir())
        self._profile = profile(
            activities=activities,
            on_trace_ready=tensorboard_trace_handler(str(folder)),
        )
        self._profile.start()  # takes up to seconds, which belong to no step
        self._begin, self._products = time.perf_counter(), dict(products.seconds)

    def stop(self) -> tuple[dict[str, float], str]:
        spent = time.perf_counter() - self._begin
        self._profile.stop()
        (made,) = set(self._folder.iterdir()) - self._before
        counted = {name: total - self._products[name] for name, total in products.seconds.items()}
        self._trace = made / "ASCEND_PROFILER_OUTPUT" / "trace_view.json"
        return by_operator(self._trace, spent, counted), str(made)

    def counts(self) -> dict[str, int]:
        return {"operators": len(_operators(self._trace))}


def by_operator(trace: Path, spent: float, counted: dict[str, float]) -> dict[str, float]:
    """Seconds per module: of the operators in a trace, and those `counted` elsewhere.

    The rest of `spent` seconds is the time outside both.
    """
    seconds = {name: value for name, value in counted.items() if value > 0}
    for operator, spent_there in _operators(trace):
        name = OPERATORS.get(operator, operator)
        seconds[name] = seconds.get(name, 0.0) + spent_there
    if not seconds:
        return {}
    outside = spent - sum(seconds.values())
    return {**seconds, OUTSIDE: outside} if outside > 0 else seconds


def _operators(trace: Path) -> list[tuple[str, float]]:
    """The operators of a trace, each with its seconds."""
    return [
        (event["name"].rpartition("/")[2].partition("-op")[0], float(event["dur"]) / 1e6)  # "Default/Adam-op5"
        for event in json.loads(trace.read_text())
        if event["ph"] == "X" and event.get("args", {}).get("type") == "HostCpuOps"
    ]
