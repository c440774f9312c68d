"""MindSpore's devices, printed as JSON by `python -m tandem.backends.mindspore.devices`.

A process of its own does this, because it may crash.
"""

from __future__ import annotations

import json

import mindspore as ms


def describe() -> dict[str, object]:
    """MindSpore's version, the device that a run would take, its dtypes, and the CANN that it goes with."""
    if ms.device_context.ascend.is_available():
        count, name, dtypes = ms.device_context.ascend.device_count(), ms.hal.get_device_name(0), "bf16 and fp32"
    else:
        count, name, dtypes = 1, "cpu", "fp32; --bf16 computes in fp32"
    devices = {"count": count, "devices": f"{count} x {name}"}
    return {"version": ms.__version__, **devices, "dtypes": dtypes, "cann": cann_versions()}


def cann_versions() -> list[str]:
    """The releases of CANN that MindSpore itself accepts; none where it does not say."""
    try:
        from mindspore.run_check._check_version import AscendEnvChecker

        return list(AscendEnvChecker(None).version)
    except (ImportError, AttributeError, TypeError):
        return []


if __name__ == "__main__":
    print(json.dumps(describe()))
