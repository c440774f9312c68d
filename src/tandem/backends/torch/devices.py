"""PyTorch's devices: `python -m tandem.backends.torch.devices` prints them as JSON, in a process that may crash."""

from __future__ import annotations

import json

import torch

from tandem.backends.torch.device import choose_device, device_name, has_native_bf16, lacking_to_compile


def describe() -> dict[str, object]:
    """PyTorch's version, the device that a run would take, its dtypes, and what is lacking to compile for it."""
    device = choose_device(None)
    count = 1 if device.type == "cpu" else getattr(torch, device.type).device_count()
    dtypes = "bf16 and fp32" if has_native_bf16(device) else "fp32; --bf16 computes in fp32"
    devices = f"{count} x {device_name(device)}"
    answer = {"version": torch.__version__, "count": count, "devices": devices, "dtypes": dtypes}
    return {**answer, "lacking": lacking_to_compile(device)}


if __name__ == "__main__":
    print(json.dumps(describe()))
