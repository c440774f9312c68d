"""Kernels of accelerators, tried on a CPU: what they compute, and how often they are called."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from device_toys import FakeNpu, compute_with, ignore_scales, run_step_by_step
from reference import assert_close_gradients, mean_gradients, mean_step, toy_batch, toy_weights
from torch.nn.functional import scaled_dot_product_attention

from tandem.backends.interface import EngineSettings
from tandem.backends.torch.compute import cpu, cpu_experts, cuda, cuda_experts, fused, npu_experts, pure, sets
from tandem.backends.torch.compute.fused import Fused
from tandem.backends.torch.device import lacking_to_compile
from tandem.backends.torch.engine import TorchEngine, create
from tandem.backends.torch.functional import new_weight
from tandem.backends.torch.optimizer import Decision
from tandem.backends.update import clip_coefficient, is_trusted
from tandem.checkpoints.interface import TensorSource
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import Scheduler
from toys import TOYS

SUMS_GROUPS = npu_experts._sums_groups.__wrapped__
RAGGED = (7, 1, 19, 12, 12, 5)


def build(source: TensorSource, **settings: Any) -> TorchEngine:
    engine = create(source.config, EngineSettings(device="cpu", **settings))
    engine.load_weights(source)
    return engine


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> FakeNpu:
    """The CPU computes with the kernels of an Ascend device, over stand-ins for its operators."""
    fake = FakeNpu()
    monkeypatch.setitem(sys.modules, "torch_npu", fake.module())
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: False), raising=False)
    compute_with(monkeypatch, sets.NPU)
    monkeypatch.setattr(npu_experts, "_sums_groups", lambda *_: True)  # so that calls are those of a step
    ignore_scales(monkeypatch)
    return fake


@pytest.mark.parametrize("toy", list(TOYS))
def test_cuda_kernels_give_the_cpus_gradients(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_weights(TOYS[toy])
    batches = [toy_batch(source.config, RAGGED), toy_batch(source.config, (9, 4), seed=2)]
    expected_loss, expected = mean_gradients(build(source), batches)
    run_step_by_step(monkeypatch)
    compute_with(monkeypatch, sets.CUDA)
    loss, gradients = mean_gradients(build(source), batches)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close_gradients(gradients, expected, rtol=1e-5)


@pytest.mark.parametrize("toy", list(TOYS))
def test_npu_kernels_give_the_cpus_gradients(
    toy: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    source = toy_weights(TOYS[toy])
    batches = [toy_batch(source.config, RAGGED), toy_batch(source.config, (9, 4), seed=2)]
    expected_loss, expected = mean_gradients(build(source), batches)
    fake = request.getfixturevalue("npu")
    loss, gradients = mean_gradients(build(source), batches)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close_gradients(gradients, expected, rtol=1e-5)
    assert fake.calls["npu_fusion_attention"] == len(batches) * source.config.num_layers
    assert fake.calls["npu_swiglu_backward"] == len(batches) * source.config.num_layers  # of MLPs and of experts
    with_experts = source.config.num_layers - source.config.dense_layers
    # Of two weights of a layer's experts: the product, its input's gradient, its own gradient.
    assert fake.calls.get("npu_grouped_matmul", 0) == 6 * len(batches) * with_experts


def test_an_optimizer_that_ignores_scales_still_clips(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batches = [toy_batch(source.config, RAGGED)]
    clipped = build(source, clip_grad=0.01)
    result = mean_step(clipped, batches, 1e-3, 0.0)
    assert result.grad_norm > 0.1  # so that clipping changes the moments
    request.getfixturevalue("npu")
    actual = build(source, clip_grad=0.01)
    mean_step(actual, batches, 1e-3, 0.0)
    for (kind, shard, value), (_, _, expected) in zip(actual.tensors(), clipped.tensors(), strict=True):
        if kind == "model":  # AdamW's first step has the size lr for every gradient: it would show no scale
            continue
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-9, err_msg=f"{kind} {shard.spec.name}")


def test_more_documents_than_one_call_takes(npu: FakeNpu) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    lengths = (2,) * 1500
    loss, _ = mean_gradients(build(source), [toy_batch(source.config, lengths)])
    assert np.isfinite(loss)
    assert npu.calls["npu_fusion_attention"] == 2 * source.config.num_layers


@pytest.mark.parametrize("allowed", [True, False])
def test_new_lengths_need_no_plan_of_cudnns(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that goes on has another number of keys with each token. What users allow elsewhere stays."""
    seen = []

    def noted(*given: Any, **settings: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return scaled_dot_product_attention(*given, **settings)

    source = toy_weights(TOYS["qwen3-tied"])
    prompt = [5, 7, 11]
    wanted = answered(build(source, training=False), prompt)
    run_step_by_step(monkeypatch)
    compute_with(monkeypatch, sets.CUDA)
    monkeypatch.setattr(cpu, "scaled_dot_product_attention", noted)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        assert answered(build(source, training=False), prompt) == wanted
        assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [False] * 3 * source.config.num_layers  # the first of four tokens comes with the prompt


def answered(engine: TorchEngine, prompt: list[int]) -> list[int]:
    scheduler = Scheduler(engine)
    request = scheduler.submit(prompt, Sampling(max_new_tokens=4), ())
    scheduler.run()
    return request.tokens


@pytest.mark.parametrize("loss", [2.0, 0.0, -1.0, 11.0, np.nan, np.inf])
@pytest.mark.parametrize("norm", [0.5, 4.0, np.nan, np.inf])
@pytest.mark.parametrize(("clip_grad", "loss_scale"), [(1.0, 1.0), (0.0, 1.0), (1.0, 1024.0)])
def test_the_device_decides_as_the_host(loss: float, norm: float, clip_grad: float, loss_scale: float) -> None:
    totals = torch.tensor([loss * loss_scale, (norm * loss_scale) ** 2, 7.0], dtype=torch.float64)
    decision = Decision.of(totals, loss_limit=10.0, loss_scale=loss_scale, clip_grad=clip_grad)
    result = decision.read()
    assert result.applied == is_trusted(loss, norm, 10.0)
    assert result.trained_tokens == 7
    if np.isfinite(norm):
        assert decision.coefficient.item() == pytest.approx(clip_coefficient(norm, clip_grad) / loss_scale, rel=1e-12)


def test_one_transfer_keeps_every_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    arrays = [np.arange(5, dtype=np.int32), np.empty((0, 1)), np.arange(3, dtype=np.int64), np.array([[0.1], [1 / 3]])]
    copies = cuda.to_device(arrays, torch.device("cpu"))
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(copy.numpy(), array, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(3, 0, 5, 1, 4), (0, 0, 13, 0, 0), (0, 6, 0, 0, 7), (0,) * 5, (4,)], ids=str)
@pytest.mark.parametrize("grouped", [cuda_experts, npu_experts], ids=["nvidia", "ascend"])
def test_grouped_products_are_those_of_one_expert_after_the_other(
    grouped: ModuleType, counts: tuple[int, ...], dtype: torch.dtype, npu: FakeNpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, the inputs' gradient, and weights' gradients: the first one overwrites, others add. Rows are ragged."""
    run_step_by_step(monkeypatch)
    rows, outputs, inputs, of_experts = sum(counts), 16, 24, torch.tensor(counts)
    x, gradient = numbers(rows, inputs).to(dtype), numbers(rows, outputs, seed=1).to(dtype)
    weight = numbers(len(counts) * outputs, inputs, seed=2).to(dtype)
    results = []
    for kernels in (cpu_experts, grouped):
        groups, target = kernels.groups(of_experts), torch.full((len(counts) * outputs, inputs), torch.nan)
        forward = kernels.grouped_product(x, weight, groups)
        back = kernels.grouped_product(gradient, weight, groups, transposed=True)
        for first in (True, False):
            kernels.add_grouped_product(target, first, gradient, x, groups)
        assert (forward.dtype, back.dtype, target.dtype) == (dtype, dtype, torch.float32)
        results.append((forward, back, target))
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(*results, rtol=rounding, atol=rounding)


def test_torch_npus_operators_are_not_called_without_rows(npu: FakeNpu) -> None:
    x, factors, gradient = numbers(0, 8), numbers(0, 1), numbers(0, 4)
    assert sets.NPU.weighted_swiglu(x, factors).shape == (0, 4)
    shapes = [tuple(result.shape) for result in sets.NPU.weighted_swiglu_backward(gradient, x, factors)]
    assert shapes == [(0, 8), (0, 1), (0, 4)]
    assert npu.calls == {}


def test_torch_npu_2_6_computes_one_experts_gradient_after_the_other(
    npu: FakeNpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its grouped product takes no groups along what is summed."""
    counts = torch.tensor([3, 0, 2])
    x, gradient, expected, target = numbers(5, 6), numbers(5, 4, seed=1), torch.zeros(12, 6), torch.zeros(12, 6)
    cpu_experts.add_grouped_product(expected, True, gradient, x, cpu_experts.groups(counts))

    def refuse(*arguments: Any, **named: Any) -> Any:
        assert named["group_type"] == npu_experts.SUMMED
        raise RuntimeError("group_type only supports -1, 0")

    monkeypatch.setattr(sys.modules["torch_npu"], "npu_grouped_matmul", refuse)
    monkeypatch.setattr(npu_experts, "_sums_groups", SUMS_GROUPS)
    npu_experts.add_grouped_product(target, True, gradient, x, npu_experts.groups(counts))
    torch.testing.assert_close(target, expected)


def test_experts_without_rows_have_no_gradient_whatever_the_product_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """On B200 PyTorch's product leaves what the memory held before (pytorch issue 172439)."""
    grouped_mm = cuda_experts._grouped_mm(torch.device("cpu"), torch.float32)
    if grouped_mm is None:
        pytest.skip("this PyTorch has no grouped product")

    def leaves_memory(x: torch.Tensor, y: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        products = grouped_mm(x, y, offs=offs)
        products[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return products

    run_step_by_step(monkeypatch)
    monkeypatch.setattr(cuda_experts, "_grouped_mm", lambda device, dtype: leaves_memory)
    groups = cuda_experts.groups(torch.tensor([0, 3, 0, 0, 2, 0]))
    target = torch.full((6 * 8, 16), torch.nan)
    for first, total in ((True, 1.0), (False, 2.0)):
        cuda_experts.add_grouped_product(target, first, torch.ones(5, 8), torch.ones(5, 16), groups)
        expected = torch.tensor([0.0, 3.0, 0.0, 0.0, 2.0, 0.0]).repeat_interleave(8)[:, None].expand(-1, 16) * total
        torch.testing.assert_close(target, expected, rtol=0, atol=0)


def test_matrices_that_grouped_products_do_not_take_are_multiplied_all_the_same() -> None:
    """In bf16, rows of 20 numbers begin anywhere, not at multiples of 16 bytes."""
    counts = torch.tensor([3, 0, 2])
    x, weight, gradient = (numbers(*shape).bfloat16() for shape in ((5, 20), (24, 20), (5, 8)))
    results = []
    for kernels in (cpu_experts, cuda_experts):
        groups, target = kernels.groups(counts), torch.zeros(24, 20)
        kernels.add_grouped_product(target, True, gradient, x, groups)
        results.append((kernels.grouped_product(x, weight, groups), target))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("first", "tokens"), [(0, 4), (3, 9)])
@pytest.mark.parametrize("kernels", [cuda_experts, npu_experts], ids=["nvidia", "ascend"])
def test_rows_are_summed_as_the_cpu_sums_them(
    kernels: ModuleType, first: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a rank sends a part of the tokens, and others are padding."""
    run_step_by_step(monkeypatch)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    places = torch.empty_like(order)
    places[order] = torch.arange(8)
    given = (numbers(8, 5), (order + 2 * first) // 2, places.view(4, 2), first, tokens)
    x, *others = given
    whole, cut = kernels.sum_rows([x], *others), cpu_experts.sum_rows([x[:3], x[3:3], x[3:]], *others)
    torch.testing.assert_close(whole, cut)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("has_fp32", [True, False])
def test_weight_gradients_are_rounded_only_where_no_product_is_fp32(
    first: bool, has_fp32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch 2.8 has products of 16-bit matrices in fp32, and 2.7 has none."""
    x, gradient, target = numbers(9, 4).bfloat16(), numbers(9, 6, seed=1).bfloat16(), numbers(6, 4, seed=2)
    exact = gradient.float().t() @ x.float()
    mm = torch.mm

    def mm_of_2_8(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return mm(a, b) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype))

    if has_fp32:
        monkeypatch.setattr(torch, "mm", mm_of_2_8)
    for probe in (cuda._adds_in_fp32, cuda._multiplies_in_fp32):
        monkeypatch.setattr(cuda, probe.__name__, probe.__wrapped__)
    expected = 0.5 * (exact if has_fp32 else exact.bfloat16().float()) + (0 if first else target)
    cuda.add_product(target, first, gradient, x, 0.5)
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


def test_compiled_functions_get_plain_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.6 and 2.7 refuse to compile for a subclass with attributes."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    function = Fused(lambda x, w: seen.extend((x, w)), kernels=1)
    function(numbers(3).requires_grad_(), new_weight(3, dtype=torch.float32, device=torch.device("cpu")))
    assert [(type(tensor), tensor.requires_grad) for tensor in seen] == [(torch.Tensor, False)] * 2


def test_without_a_compiler_functions_run_step_by_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lacking_to_compile(torch.device("cpu")) is None
    lacking = lacking_to_compile(torch.device("cuda"))
    assert lacking == "Triton is missing; pip install triton"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "environ", {"PATH": "/nowhere"})
    assert "C compiler" in str(lacking_to_compile(torch.device("cuda")))
    monkeypatch.setattr(fused, "lacking_to_compile", lambda device: lacking)
    for function in (pure.swiglu, pure.swiglu_backward):
        assert Fused(function, kernels=1)._compile(torch.device("cuda")) is function
    assert caplog.text.count("each step takes longer") == 1


T, G, D, N = 13, 2, 8, 24
FUSED = (*cuda.FUSED, *cuda_experts.FUSED)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def arguments() -> dict[str, tuple[Any, tuple[Any, ...], Any]]:
    """By name: the pure function, its arguments, and what the CPU's kernels give for them."""
    x, w, g, wide = numbers(T, N), numbers(N, seed=1), numbers(T, N, seed=2), numbers(T, 2 * N, seed=3)
    qkv, qw, kw = numbers(T, G, 4, D), numbers(D, seed=4), numbers(D, seed=5)
    heads = [numbers(T, G, size, D, seed=6) for size in (2, 1, 1)]
    cos, sin = numbers(T, 1, D // 2, seed=7), numbers(T, 1, D // 2, seed=8)
    labels = torch.arange(T) % N
    scale = cpu.rms_norm(x, w, 1e-6)[1]
    share = numbers(T, 1, seed=9)
    chosen = x.sort(dim=1, descending=True).indices[:, :3].contiguous()
    routed = cpu_experts.route(x, chosen, T - 2, True)
    of_router = (numbers(T, 3, seed=10), routed[1], routed[2], chosen, w, numbers(1)[0], T - 2, True)
    places = torch.randperm(2 * T, generator=torch.Generator().manual_seed(1)).view(T, 2)
    rows, owners = numbers(2 * T, N, seed=11), places.flatten().argsort() // 2
    target, products, ends = numbers(3, N, D, seed=12), numbers(3, N, D, seed=13), torch.tensor([4, 4, 9])
    of_rows = products * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)  # the second expert has none
    return {
        "weighted_swiglu": (pure.weighted_swiglu, (wide, share), cpu_experts.weighted_swiglu(wide, share)),
        "weighted_swiglu_backward": (
            pure.weighted_swiglu_backward,
            (g, wide, share),
            cpu_experts.weighted_swiglu_backward(g, wide, share),
        ),
        "route": (pure.route, (x, chosen, T - 2, True), routed),
        "route_backward": (pure.route_backward, of_router, cpu_experts.route_backward(*of_router)),
        "set_products": (pure.set_products, (target, products, ends), of_rows),
        "add_products": (pure.add_products, (target, products, ends), target + of_rows),
        "sum_rows": (pure.sum_rows, (rows, places), cpu_experts.sum_rows([rows], owners, places, 0, T)),
        "rms_norm": (pure.rms_norm, (x, w, 1e-6), cpu.rms_norm(x, w, 1e-6)),
        "rms_norm_backward": (
            pure.rms_norm_backward,
            (g, x, scale, w),
            cpu.rms_norm_backward(g, x, scale, w, trained=True),
        ),
        "swiglu": (pure.swiglu, (wide,), cpu.swiglu(wide)),
        "swiglu_backward": (pure.swiglu_backward, (g, wide), cpu.swiglu_backward(g, wide)),
        "rotary_heads": (pure.rotary_heads, (qkv, cos, sin), cpu.rotary_heads(qkv, None, None, 0.0, cos, sin)),
        "rotary_heads_backward": (
            pure.rotary_heads_backward,
            (*heads, cos, sin),
            cpu.rotary_heads_backward(heads, qkv, None, None, 0.0, cos, sin, trained=True)[0],
        ),
        "normalised_rotary_heads": (
            pure.normalised_rotary_heads,
            (qkv, qw, kw, 1e-6, cos, sin),
            cpu.rotary_heads(qkv, qw, kw, 1e-6, cos, sin),
        ),
        "normalised_rotary_heads_backward": (
            pure.normalised_rotary_heads_backward,
            (*heads, qkv, qw, kw, 1e-6, cos, sin),
            cpu.rotary_heads_backward(heads, qkv, qw, kw, 1e-6, cos, sin, trained=True),
        ),
        "losses_and_gradient": (
            pure.losses_and_gradient,
            (x * 20, labels),  # so large that exp(x) alone would overflow nothing but lose all digits
            cpu.losses_and_gradient(x * 20, labels),
        ),
    }


def test_every_fused_function_is_tried() -> None:
    assert {fused.function for fused in FUSED} == {function for function, _, _ in arguments().values()}


@pytest.mark.parametrize("name", list(arguments()))
def test_pure_functions_give_what_the_cpu_gives(name: str) -> None:
    function, given, expected = arguments()[name]
    torch.testing.assert_close(function(*given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow("jobs")
@pytest.mark.parametrize("name", list(arguments()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_functions_give_what_they_give_step_by_step(name: str, dtype: torch.dtype) -> None:
    function, given, _ = arguments()[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    is_exact = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 1e-2)}[dtype]
    for tokens in (T, 1, 5):
        cut, again = ([_cut(value, tokens, dtype) for value in given] for _ in range(2))
        torch.testing.assert_close(compiled(*cut), function(*again), rtol=is_exact[0], atol=is_exact[1])


def _cut(value: Any, tokens: int, dtype: torch.dtype) -> Any:
    """A copy of the first tokens of an argument. Tensors of T rows are of tokens; numbers stay."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    value = value.to(dtype) if value.dtype == torch.float32 and value.shape[-1] != 1 else value.clone()
    return value[:tokens] if len(value) == T else value
