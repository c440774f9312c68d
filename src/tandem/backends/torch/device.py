"""The device that PyTorch computes on, and whether it has bfloat16."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from tandem.errors import UserError
from tandem.frameworks import TORCH

# Where a device's allocator looks for its settings; the first name is one that every version reads. (PyTorch 2.9 says
# that PYTORCH_CUDA_ALLOC_CONF is deprecated, and ignores the new name: pytorch issue 183387.)
ALLOCATORS = {
    "cuda": ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    "npu": ("PYTORCH_NPU_ALLOC_CONF",),
}


def choose_device(name: str | None) -> torch.device:
    """The named device, or the best one present."""
    present = [device for device in TORCH.devices if _is_present(device)]
    if name is not None and name not in present:
        raise UserError(f"--device {name}: PyTorch does not see such a device here: give {' or '.join(present)}")
    device = torch.device(name or present[0])
    _let_memory_grow(device)
    return device


def _let_memory_grow(device: torch.device) -> None:
    """Let blocks of the device's memory grow, unless the user says how memory is kept. Call it before it is used.

    Micro-batches have other numbers of tokens in each step. Blocks of a fixed size leave holes then, which none fits.
    """
    names = ALLOCATORS.get(device.type, ())
    if names and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def has_native_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware. On a CPU, Linux tells it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
        return bool(flags & {"avx512_bf16", "amx_bf16"})
    return True


def lacking_to_compile(device: torch.device) -> str | None:
    """What is missing here that `torch.compile` needs for a device, and how to get it; None for nothing."""
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing; pip install triton"
    if not any((os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))):  # as Triton looks for it
        return "a C compiler is missing; install gcc, or name one with CC"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():  # which Triton's launchers include
        return "Python's headers are missing; install python3-dev"
    return None


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
