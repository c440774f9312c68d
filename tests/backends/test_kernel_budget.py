"""How many kernels a step launches on NVIDIA's and Ascend's devices, counted on tensors without memory.

Views and allocations launch nothing. A fused function counts as the kernels that Inductor makes of it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from counted_steps import check, check_kinds
from device_toys import FakeNpu, check_grouped, copy_at_once
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.backends.interface import EngineSettings, StepResult
from tandem.backends.torch import engine as engine_module
from tandem.backends.torch import passes
from tandem.backends.torch.compute import cuda, npu_experts, sets
from tandem.backends.torch.compute.fused import Fused
from tandem.backends.torch.engine import TorchEngine
from tandem.backends.torch.optimizer import WIDENED, Decision
from tandem.data.batch import IGNORE, Sample, collate
from tandem.models.config import ModelConfig
from tandem.models.lora import Lora
from tandem.models.published import qwen3_config
from tandem.models.tensors import parameter_count
from tandem.planning.counted import COUNTED
from tandem.training.objectives import MeanLoss, RankBatch

TOKENS = 4096
META = torch.device("meta")
# What launches nothing: views, memory, and questions about tensors.
FREE = set(
    """view _unsafe_view t transpose slice select split split_with_sizes unsqueeze expand as_strided detach alias
    squeeze permute unbind reshape _reshape_alias lift_fresh empty empty_like empty_strided new_empty new_empty_strided
    resize_ is_pinned""".split()  # noqa: SIM905
)


PRODUCTS = set(
    """mm addmm bmm _flash_attention_forward _flash_attention_backward npu_fusion_attention _grouped_mm
    npu_grouped_matmul""".split()  # noqa: SIM905
)


class Counted(TorchDispatchMode):
    """Counts what PyTorch is asked to do.

    Attributes:
        kernels: launched on the device, by name.
        copies: from the host, by whether the host waits.
        reads: by the host.
        doubles: kernels that have to do with float64.
        moved: bytes that kernels read and write, except products and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.reads = self.doubles = self.moved = 0
        self.in_fused = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name.split("::")[1]
        if name == "_local_scalar_dense":
            self.reads += 1
            return 1.0
        result = function(*args, **(kwargs or {}))
        if self.in_fused or name in FREE:
            return result
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            if isinstance(result, torch.Tensor) and source.device != result.device:
                waits = not ((kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2]))
                self.copies["the host waits" if waits else "the host goes on"] += 1
                return result
        outputs = result if isinstance(result, tuple | list) else (result,)
        touched = [tensor for tensor in (*outputs, *args) if isinstance(tensor, torch.Tensor)]
        touched += [
            tensor for group in args if isinstance(group, list | tuple) for tensor in group if torch.is_tensor(tensor)
        ]
        if any(tensor.device == META for tensor in touched):
            self.kernels[name] += 1
            self.doubles += any(tensor.dtype == torch.float64 for tensor in touched)
            self.move(name, *touched)
        return result

    def move(self, name: str, *values: Any) -> None:
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if name not in PRODUCTS:
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """Engines compute on tensors without memory, with the kernels of NVIDIA's devices."""
    mode = Counted()

    def fused(self: Fused, *arguments: Any) -> Any:
        mode.kernels[self.function.__name__] += self.kernels
        mode.in_fused = True
        try:
            results = self.function(*arguments)
        finally:
            mode.in_fused = False
        mode.move("fused", *arguments, *(results if isinstance(results, tuple) else (results,)))
        return results

    def read(decision: Decision) -> StepResult:
        mode.reads += 1
        return StepResult(loss=1.0, grad_norm=1.0, trained_tokens=1, applied=True)

    monkeypatch.setattr(Fused, "__call__", fused)
    monkeypatch.setattr(cuda, "_adds_in_fp32", lambda *_: True)  # numbers without memory cannot say so
    monkeypatch.setattr(Decision, "read", read)
    copy_at_once(monkeypatch)
    monkeypatch.setitem(sets.KERNELS, "meta", sets.CUDA)
    for name, value in (("choose_device", META), ("device_name", "meta"), ("has_native_bf16", True)):
        monkeypatch.setattr(engine_module, name, lambda *_, value=value: value)
    return mode


@pytest.fixture
def counted_npu(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The same with the kernels of Ascend's devices. An operator of torch_npu is one kernel."""
    monkeypatch.setattr(npu_experts, "_sums_groups", lambda *_: True)  # not tried, so that only a step is counted

    def one_kernel(name: str, operator: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            counted.kernels[name] += 1
            counted.in_fused = True
            try:
                results = operator(*arguments, **named)
            finally:
                counted.in_fused = False
            counted.move(name, *arguments, *(results if isinstance(results, tuple) else (results,)))
            return results

        return call

    class Attention(torch.autograd.Function):
        """One kernel forward, and one backward."""

        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(q, k, v)
            return torch.empty_like(q)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
            counted.kernels["npu_fusion_attention_grad"] += 1
            return tuple(map(torch.empty_like, ctx.saved_tensors))

    def grouped(
        self: FakeNpu, x: list[torch.Tensor], weight: list[torch.Tensor], *, group_list: torch.Tensor, **settings: int
    ) -> list[torch.Tensor]:
        (left,), (right,) = x, weight
        check_grouped(left, right, group_list, **settings)
        batch = (len(group_list),) if settings["group_type"] else ()
        return [left.new_empty(*batch, len(left), right.shape[-1])]

    monkeypatch.setattr(FakeNpu, "npu_fusion_attention", lambda self, q, k, v, *_, **__: (Attention.apply(q, k, v),))
    monkeypatch.setattr(FakeNpu, "npu_grouped_matmul", grouped)
    operators = {name: one_kernel(name, operator) for name, operator in vars(FakeNpu().module()).items()}
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(**operators))
    monkeypatch.setitem(sets.KERNELS, "meta", sets.NPU)
    return counted


def shape(size: str, layers: int) -> ModelConfig:
    return dataclasses.replace(qwen3_config(size), num_layers=layers)


def sparse(layers: int, experts: int) -> ModelConfig:
    config = shape("30B-A3B", layers)
    assert config.experts is not None
    return dataclasses.replace(config, experts=dataclasses.replace(config.experts, num_experts=experts))


def step(engine: TorchEngine, lengths: tuple[int, ...], micro_batches: int = 1) -> None:
    tokens = np.arange(sum(lengths), dtype=np.int32)
    labels = np.append(tokens[1:], IGNORE).astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    batches = [collate([Sample(tokens, labels, positions, lengths)])] * micro_batches
    weights = MeanLoss()(None, RankBatch(batches, micro_batches * (len(tokens) - 1))).weights
    engine.train_step(batches, weights, lr=1e-4, weight_decay=0.1)


def count(
    counted: Counted,
    config: ModelConfig,
    lengths: tuple[int, ...] = (TOKENS,),
    micro_batches: int = 1,
    **settings: Any,
) -> Counter[str]:
    """Kernels of a step after the first one, in which tables are made."""
    engine = engine_module.create(config, EngineSettings(bf16=True, **settings))
    step(engine, lengths)
    counted.kernels.clear(), counted.copies.clear()
    counted.reads = counted.doubles = counted.moved = 0
    with counted:
        step(engine, lengths, micro_batches)
    return Counter(counted.kernels)


def test_a_layer_of_8b_launches_few_kernels(counted: Counted) -> None:
    difference = count(counted, shape("8B", 2))
    difference.subtract(count(counted, shape("8B", 1)))
    weights = 4  # with a product for a gradient: linear_qkv, linear_proj, linear_fc1, linear_fc2
    assert sum(difference.values()) <= 60 + 2 * weights, difference
    assert difference["addmm"] == weights  # one product, which adds to the fp32 gradient itself


@pytest.mark.parametrize(("dora", "most"), [(False, 125), (True, 290)])
def test_adapters_of_a_layer_of_8b_launch_few_kernels(counted: Counted, dora: bool, most: int) -> None:
    """Of all its linear layers; in linear_qkv, rows of q, k and v take turns."""
    adapters = Lora(r=16, lora_alpha=32, use_dora=dora)
    two, one = (count(counted, dataclasses.replace(shape("8B", layers), lora=adapters)) for layers in (2, 1))
    layer = two - one
    assert sum(layer.values()) <= most, (sum(layer.values()), layer)


def test_a_layer_with_experts_launches_as_many_kernels_for_128_as_for_16(counted: Counted) -> None:
    """A layer of 30B-A3B's widths, with all the losses that balance its router."""
    losses = {"moe_aux_loss_coeff": 1e-3, "moe_z_loss_coeff": 1e-3}
    one, few, both = (count(counted, sparse(*size), **losses) for size in ((1, 128), (1, 16), (2, 128)))
    assert counted.reads == 1  # at the end of the step: no layer asks how many rows an expert has
    assert one == few
    layer = both - one
    assert layer["_grouped_mm"] == 6  # of two weights: the product, its own gradient, its input's gradient
    assert sum(layer.values()) <= 90, layer


def test_head_and_loss_launch_few_kernels(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: Counter[str] = Counter()
    loss = passes.cross_entropy_and_gradient

    def noted(*arguments: Any) -> Any:
        before = Counter(counted.kernels)
        result = loss(*arguments)
        inside.update(Counter(counted.kernels) - before)
        return result

    engine = engine_module.create(shape("8B", 1), EngineSettings(bf16=True))
    monkeypatch.setattr(passes, "cross_entropy_and_gradient", noted)
    with counted:
        step(engine, (TOKENS,))
    assert 0 < sum(inside.values()) <= 60, inside


def test_documents_in_a_row_add_nothing(counted: Counted) -> None:
    config = shape("0.6B", 2)
    lengths = (20,) * 199 + (TOKENS - 20 * 199,)
    assert count(counted, config, lengths) == count(counted, config)


def test_nothing_is_read_in_a_step_and_each_micro_batch_is_one_copy(counted: Counted) -> None:
    count(counted, shape("0.6B", 2), micro_batches=3)
    assert counted.reads == 1  # of loss, norm and what became of the step, when all is launched
    assert counted.copies == {"the host goes on": 3}


def test_a_step_of_0_6b_launches_few_kernels(counted: Counted) -> None:
    kernels = count(counted, shape("0.6B", 28))
    assert sum(kernels.values()) <= 28 * 68 + 60 + 100, kernels  # layers, head and loss, and all the rest


def test_moments_in_bf16_add_few_kernels_and_no_reads(counted: Counted) -> None:
    config = shape("0.6B", 2)
    narrow = count(counted, config, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")
    assert counted.reads == 1
    groups = parameter_count(config) // WIDENED + 2  # of matrices, and one of vectors
    # Each group has two copies to fp32, two back, and an update of its own: five kernels with its scalars.
    added = sum(narrow.values()) - sum(count(counted, config).values())
    assert 0 < added <= 9 * groups, narrow


# --- Ascend, through torch_npu


def test_a_layer_of_8b_launches_few_operators_of_torch_npu(counted_npu: Counted) -> None:
    difference = count(counted_npu, shape("8B", 2))
    difference.subtract(count(counted_npu, shape("8B", 1)))
    weights = 4
    assert sum(difference.values()) <= 60 + 2 * weights, difference


def test_a_layer_with_experts_calls_as_many_operators_of_torch_npu_for_128_as_for_16(counted_npu: Counted) -> None:
    losses = {"moe_aux_loss_coeff": 1e-3, "moe_z_loss_coeff": 1e-3}
    one, few, both = (count(counted_npu, sparse(*size), **losses) for size in ((1, 128), (1, 16), (2, 128)))
    assert counted_npu.reads == 1  # before the update: no layer asks how many rows an expert has
    assert counted_npu.copies == {"the host goes on": 1}
    assert one == few
    layer = both - one
    assert layer["npu_grouped_matmul"] == 6
    assert sum(layer.values()) <= 140, layer


def test_head_and_loss_launch_few_operators_of_torch_npu(counted_npu: Counted) -> None:
    kernels = count(counted_npu, shape("8B", 1))
    layer = count(counted_npu, shape("8B", 2))
    layer.subtract(kernels)
    kernels.subtract(layer)
    assert sum(kernels.values()) <= 60 + 40, kernels  # and embedding, final norm and update


def test_a_step_of_torch_npu_waits_once_and_needs_no_float64(counted_npu: Counted) -> None:
    lengths = (20,) * 199 + (TOKENS - 20 * 199,)
    config = shape("0.6B", 2)
    assert count(counted_npu, config, lengths, micro_batches=3) == count(counted_npu, config, micro_batches=3)
    assert counted_npu.reads == 1  # before the update, which cannot skip itself
    assert counted_npu.copies == {"the host goes on": 3}
    assert counted_npu.doubles == 0


@pytest.mark.slow("jobs")
@pytest.mark.parametrize("size", ["0.6B", "8B"])
@pytest.mark.parametrize("maker", ["nvidia", "ascend"])
def test_a_plan_knows_the_counts(maker: str, size: str, request: pytest.FixtureRequest) -> None:
    mode: Counted = request.getfixturevalue({"nvidia": "counted", "ascend": "counted_npu"}[maker])

    def counts(size: str, layers: int, tokens: int, micro_batches: int, again: int) -> tuple[int, int]:
        kernels = count(mode, shape(size, layers), (tokens,), micro_batches, recompute_layers=again)
        return sum(kernels.values()), mode.moved

    check(COUNTED["torch", maker], size, counts, "torch")


@pytest.mark.parametrize("maker", ["nvidia", "ascend"])
def test_a_plan_knows_the_counts_of_experts_and_adapters(maker: str, request: pytest.FixtureRequest) -> None:
    mode: Counted = request.getfixturevalue({"nvidia": "counted", "ascend": "counted_npu"}[maker])

    def kernels(config: ModelConfig, micro_batches: int) -> int:
        return sum(count(mode, config, (TOKENS,), micro_batches).values())

    check_kinds(COUNTED["torch", maker], kernels)
