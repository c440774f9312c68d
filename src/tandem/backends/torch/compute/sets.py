"""Which kernels belong to which kind of device."""

from __future__ import annotations

import torch

from tandem.backends.torch.attention import attention
from tandem.backends.torch.compute import cpu
from tandem.backends.torch.kernels import Kernels
from tandem.frameworks import TORCH

CPU = Kernels(
    product=cpu.product,
    add_product=cpu.add_product,
    rms_norm=cpu.rms_norm,
    rms_norm_backward=cpu.rms_norm_backward,
    swiglu=cpu.swiglu,
    swiglu_backward=cpu.swiglu_backward,
    rotary_heads=cpu.rotary_heads,
    rotary_heads_backward=cpu.rotary_heads_backward,
    documents=cpu.documents,
    attention=attention,
    losses_and_gradient=cpu.losses_and_gradient,
    logits_chunk_bytes=TORCH.logits_chunk_bytes,
    norm=cpu.norm,
    adamw=cpu.adamw,
    sums=torch.float64,
)

KERNELS = {"cpu": CPU}  # by type of device


def kernels_of(device: torch.device) -> Kernels:
    return KERNELS[device.type]
