"""Stand-ins for what only accelerators have, so that their kernels can be tried on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from tandem.backends.torch.compute import cuda, sets
from tandem.backends.torch.compute.fused import Fused


def run_step_by_step(monkeypatch: Any) -> None:
    """Fused functions run without being compiled."""
    monkeypatch.setattr(Fused, "__call__", lambda self, *arguments: self.function(*arguments))


def copy_at_once(monkeypatch: Any) -> None:
    """Copies to NVIDIA's devices need neither memory that does not move nor a stream."""

    def begin(copy: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
        tensors = copy()
        return lambda: tensors

    monkeypatch.setattr(cuda, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(cuda, "copy_stream", lambda device: SimpleNamespace(begin=begin))


def compute_with(monkeypatch: Any, kernels: sets.Kernels, **changed: Any) -> None:
    """Let the CPU compute with another device's kernels."""
    copy_at_once(monkeypatch)
    monkeypatch.setitem(sets.KERNELS, "cpu", dataclasses.replace(kernels, **changed))


class FakeNpu:
    """torch_npu's operators, computed step by step. What they are called with is checked as the device would.

    Attributes:
        calls: how often each was called.
    """

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def module(self) -> SimpleNamespace:
        names = [name for name in dir(self) if name.startswith("npu_")]
        return SimpleNamespace(**{name: self._counted(name) for name in names})

    def _counted(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return getattr(self, name)(*arguments, **named)

        return call

    def npu_rms_norm(self, x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
        return (x.float() * rstd * gamma.float()).to(x.dtype), rstd

    def npu_rms_norm_backward(
        self, dy: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert rstd.dtype == torch.float32
        with torch.enable_grad():
            leaves = [x.detach().float().requires_grad_(), gamma.detach().float().requires_grad_()]
            scale = torch.rsqrt(
                leaves[0].square().mean(-1, keepdim=True) + (1 / rstd**2 - x.float().square().mean(-1, keepdim=True))
            )
            dx, dgamma = torch.autograd.grad(leaves[0] * scale * leaves[1], leaves, dy.float())
        return dx.to(x.dtype), dgamma

    def npu_swiglu(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        assert x.numel(), "the operator takes no tensor without numbers"
        gate, up = x.chunk(2, dim=dim)
        return silu(gate) * up

    def npu_swiglu_backward(self, grad: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(self.npu_swiglu(leaf, dim), leaf, grad)
        return dx

    def npu_rotary_mul(self, x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
        assert x.ndim == r1.ndim == r2.ndim == 4
        assert r1.shape[-1] == r2.shape[-1] == x.shape[-1]
        first, second = x.chunk(2, dim=-1)
        return x * r1 + torch.cat([-second, first], dim=-1) * r2

    def npu_fusion_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        head_num: int,
        input_layout: str,
        *,
        atten_mask: torch.Tensor,
        scale: float,
        pre_tockens: int,
        next_tockens: int,
        sparse_mode: int,
        actual_seq_qlen: list[int],
        actual_seq_kvlen: list[int],
    ) -> tuple[torch.Tensor]:
        assert (input_layout, sparse_mode, next_tockens) == ("TND", 3, 0)
        assert atten_mask.shape == (2048, 2048)
        assert atten_mask.dtype == torch.bool
        assert head_num == q.shape[1]
        assert pre_tockens >= len(q)
        assert len(actual_seq_qlen) <= 1024
        assert actual_seq_qlen == actual_seq_kvlen
        assert actual_seq_qlen[-1] == len(q)
        outputs = []
        for start, stop in zip([0, *actual_seq_qlen], actual_seq_qlen):
            part = [x[start:stop].transpose(0, 1) for x in (q, k, v)]
            outputs.append(
                scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True, scale=scale).transpose(0, 1)
            )
        return (torch.cat(outputs),)

    def npu_grouped_matmul(
        self,
        x: list[torch.Tensor],
        weight: list[torch.Tensor],
        *,
        group_list: torch.Tensor,
        split_item: int,
        group_type: int,
        group_list_type: int,
    ) -> list[torch.Tensor]:
        """Along rows (`group_type` 0), or along what is summed (2): an expert without rows gets zeros then."""
        (left,), (right,) = x, weight
        check_grouped(left, right, group_list, split_item, group_type, group_list_type)
        ends = group_list.tolist()
        assert ends[-1] == left.shape[1 if group_type else 0]
        ranges = [slice(start, stop) for start, stop in zip([0, *ends], ends)]
        if group_type:
            return [torch.stack([left[:, part] @ right[part] for part in ranges])]
        return [torch.cat([left[part] @ of_group for part, of_group in zip(ranges, right)])]


def check_grouped(
    left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor, split_item: int, group_type: int, group_list_type: int
) -> None:
    """What CANN's documents ask of `aclnnGroupedMatmulV4` with single tensors: groups of rows, or of what is summed."""
    assert (split_item, group_list_type) == (3, 0)
    assert left.dtype == right.dtype
    assert (ends.dtype, ends.ndim) == (torch.int64, 1)
    assert len(ends) <= 1024
    assert left.ndim == 2
    assert left.numel(), "the operator takes no tensor without numbers"
    assert max(left.shape[-1], right.shape[-1]) < 65536
    if group_type == 0:
        assert left.is_contiguous(), "the left matrix may not be transposed"
        assert right.is_contiguous() or right.transpose(1, 2).is_contiguous()
        assert right.shape[:2] == (len(ends), left.shape[1])
    else:
        assert group_type == 2
        assert left.t().is_contiguous(), "the left matrix must be transposed"
        assert right.is_contiguous(), "the right matrix may not be transposed"
        assert left.shape[1] == right.shape[0]


def ignore_scales(monkeypatch: Any) -> None:
    """PyTorch's fused AdamW, without `grad_scale` and `found_inf`, as torch_npu has it."""
    fused = torch._fused_adamw_

    def without(*arguments: Any, grad_scale: Any = None, found_inf: Any = None, **named: Any) -> None:
        fused(*arguments, **named)

    monkeypatch.setattr(torch, "_fused_adamw_", without)
