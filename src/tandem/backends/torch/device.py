"""The device that PyTorch computes on, and whether it has bfloat16."""

from __future__ import annotations

from pathlib import Path

import torch

from tandem.errors import UserError
from tandem.frameworks import TORCH


def choose_device(name: str | None) -> torch.device:
    """The named device, or the best one present."""
    present = [device for device in TORCH.devices if _is_present(device)]
    if name is None:
        return torch.device(present[0])
    if name not in present:
        raise UserError(f"--device {name}: PyTorch does not see such a device here: give {' or '.join(present)}")
    return torch.device(name)


def has_native_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware. On a CPU, Linux tells it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
        return bool(flags & {"avx512_bf16", "amx_bf16"})
    return True


def device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(getattr(torch, device.type).get_device_name(device))


def _is_present(device: str) -> bool:
    if device == "npu":
        try:
            import torch_npu  # type: ignore[import-not-found] # noqa: F401
        except ImportError:
            return False
        return bool(torch.npu.is_available())  # type: ignore[attr-defined]
    return device == "cpu" or torch.cuda.is_available()
