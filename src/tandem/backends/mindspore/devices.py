"""What MindSpore finds here: `python -m tandem.backends.mindspore.devices` prints it as JSON, in a process that may
crash."""

from __future__ import annotations

import json

import mindspore as ms


def describe() -> dict[str, object]:
    """Version, the device that a run would take, and what it can do."""
    if ms.device_context.ascend.is_available():
        devices, dtypes = f"{ms.device_context.ascend.device_count()} x {ms.hal.get_device_name(0)}", "bf16 and fp32"
    else:
        devices, dtypes = "1 x cpu", "fp32; --bf16 computes in fp32"
    return {"version": ms.__version__, "devices": devices, "dtypes": dtypes}


if __name__ == "__main__":
    print(json.dumps(describe()))
