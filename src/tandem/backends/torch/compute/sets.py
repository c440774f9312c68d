"""Which kernels belong to which kind of device."""

from __future__ import annotations

import torch

from tandem.backends.torch.attention import attention
from tandem.backends.torch.compute import cpu, cpu_experts, cuda, cuda_experts, npu, npu_experts
from tandem.backends.torch.kernels import Kernels
from tandem.frameworks import TORCH

CPU = Kernels(
    product=cpu.product,
    add_product=cpu.add_product,
    groups=cpu_experts.groups,
    parts=cpu_experts.parts,
    grouped_product=cpu_experts.grouped_product,
    add_grouped_product=cpu_experts.add_grouped_product,
    weighted_swiglu=cpu_experts.weighted_swiglu,
    weighted_swiglu_backward=cpu_experts.weighted_swiglu_backward,
    route=cpu_experts.route,
    route_backward=cpu_experts.route_backward,
    sum_rows=cpu_experts.sum_rows,
    rms_norm=cpu.rms_norm,
    rms_norm_backward=cpu.rms_norm_backward,
    swiglu=cpu.swiglu,
    swiglu_backward=cpu.swiglu_backward,
    rotary_heads=cpu.rotary_heads,
    rotary_heads_backward=cpu.rotary_heads_backward,
    to_device=cpu.to_device,
    early=cpu.early,
    angles=cpu.angles,
    documents=cpu.documents,
    attention=attention,
    attention_over_kept=cpu.attention_over_kept,
    losses_and_gradient=cpu.losses_and_gradient,
    logits_chunk_bytes=TORCH.logits_chunk_bytes,
    weight_piece=cpu.PIECE,
    norm=cpu.norm,
    adamw=cpu.adamw,
    update_skips=True,
    sums=torch.float64,
    reads_ahead=False,
)

CUDA = Kernels(
    product=cuda.product,
    add_product=cuda.add_product,
    groups=cuda_experts.groups,
    parts=cuda_experts.parts,
    grouped_product=cuda_experts.grouped_product,
    add_grouped_product=cuda_experts.add_grouped_product,
    weighted_swiglu=cuda_experts.WEIGHTED_SWIGLU,
    weighted_swiglu_backward=cuda_experts.WEIGHTED_SWIGLU_BACKWARD,
    route=cuda_experts.ROUTE,
    route_backward=cuda_experts.ROUTE_BACKWARD,
    sum_rows=cuda_experts.sum_rows,
    rms_norm=cuda.rms_norm,
    rms_norm_backward=cuda.rms_norm_backward,
    swiglu=cuda.swiglu,
    swiglu_backward=cuda.swiglu_backward,
    rotary_heads=cuda.rotary_heads,
    rotary_heads_backward=cuda.rotary_heads_backward,
    to_device=cuda.to_device,
    early=cuda.early,
    angles=cuda.angles,
    documents=cuda.documents,
    attention=cuda.attention,
    attention_over_kept=cuda.attention_over_kept,
    losses_and_gradient=cuda.losses_and_gradient,
    logits_chunk_bytes=TORCH.device_logits_chunk_bytes,
    weight_piece=1 << 24,  # 64 MiB
    norm=cuda.norm,
    adamw=cuda.adamw,
    update_skips=True,
    sums=torch.float64,
    reads_ahead=True,
)

NPU = Kernels(
    product=npu.product,
    add_product=npu.add_product,
    groups=npu_experts.groups,
    parts=npu_experts.parts,
    grouped_product=npu_experts.grouped_product,
    add_grouped_product=npu_experts.add_grouped_product,
    weighted_swiglu=npu.weighted_swiglu,
    weighted_swiglu_backward=npu.weighted_swiglu_backward,
    route=cpu_experts.route,
    route_backward=cpu_experts.route_backward,
    sum_rows=npu_experts.sum_rows,
    rms_norm=npu.rms_norm,
    rms_norm_backward=npu.rms_norm_backward,
    swiglu=npu.swiglu,
    swiglu_backward=npu.swiglu_backward,
    rotary_heads=npu.rotary_heads,
    rotary_heads_backward=npu.rotary_heads_backward,
    to_device=cuda.to_device,
    early=cpu.early,
    angles=npu.angles,
    documents=npu.documents,
    attention=npu.attention,
    attention_over_kept=cpu.attention_over_kept,
    losses_and_gradient=cpu.losses_and_gradient,
    logits_chunk_bytes=TORCH.device_logits_chunk_bytes,
    weight_piece=1 << 24,  # 64 MiB
    norm=npu.norm,
    adamw=npu.adamw,
    update_skips=False,
    sums=torch.float32,
    reads_ahead=True,
)

KERNELS = {"cpu": CPU, "cuda": CUDA, "npu": NPU}  # by type of device


def kernels_of(device: torch.device) -> Kernels:
    return KERNELS[device.type]
