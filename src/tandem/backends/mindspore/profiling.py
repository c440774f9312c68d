"""`--profile` on MindSpore: `mindspore.profiler`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import mindspore as ms
from mindspore.profiler import ProfilerActivity, profile, tensorboard_trace_handler

# Operator -> module. On the CPU, the rest of the work runs in NumPy, which the profiler does not see. It is one entry,
# `OUTSIDE`.
OPERATORS = {
    "MatMul": "linear layers, head",
    "BatchMatMul": "attention",
    "FlashAttentionScore": "attention",
    "FlashAttentionScoreGrad": "attention",
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
        self._folder, self._begin = folder, time.perf_counter()
        activities = [ProfilerActivity.CPU]
        if ms.get_context("device_target") != "CPU":
            activities.append(ProfilerActivity.NPU)
        self._before = set(folder.iterdir())
        self._profile = profile(
            activities=activities,
            on_trace_ready=tensorboard_trace_handler(str(folder)),
        )
        self._profile.start()

    def stop(self) -> tuple[dict[str, float], str]:
        spent = time.perf_counter() - self._begin
        self._profile.stop()
        (made,) = set(self._folder.iterdir()) - self._before
        return by_operator(made / "ASCEND_PROFILER_OUTPUT" / "trace_view.json", spent), str(made)


def by_operator(trace: Path, spent: float) -> dict[str, float]:
    """Seconds per module of the operators in a trace. The rest of `spent` seconds is the time outside them."""
    seconds: dict[str, float] = {}
    for event in json.loads(trace.read_text()):
        if event["ph"] == "X" and event.get("args", {}).get("type") == "HostCpuOps":
            operator = event["name"].rpartition("/")[2].partition("-op")[0]  # "Default/Adam-op5"
            name = OPERATORS.get(operator, operator)
            seconds[name] = seconds.get(name, 0.0) + float(event["dur"]) / 1e6
    if not seconds:
        return {}
    outside = spent - sum(seconds.values())
    return {**seconds, OUTSIDE: outside} if outside > 0 else seconds
