"""What only the PyTorch backend can be asked: which products it forms, what it keeps, what it falls back to."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from parts import set_logits_chunk_bytes
from reference import Reference
from torch.utils._python_dispatch import TorchDispatchMode
from toy_work import assert_close_gradients, mean_gradients, mean_step, toy_batch, toy_weights

from tandem.backends.interface import EngineSettings
from tandem.backends.torch import device as device_module
from tandem.backends.torch import engine as engine_module
from tandem.backends.torch import functional
from tandem.backends.torch.attention import Run, runs
from tandem.backends.torch.compute import cpu
from tandem.backends.torch.device import choose_device
from tandem.backends.torch.engine import TorchEngine, create
from tandem.checkpoints.interface import TensorSource
from tandem.errors import UserError
from toys import TOYS, moe_config, toy_config

# Before 2.9 (pytorch pull request 157893) attention on a CPU forms matrices of scores where heads share keys.
shares_heads = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="this PyTorch forms matrices of scores on a CPU"
)
RAGGED = (7, 1, 19, 12, 12, 5)


def build(source: TensorSource, **settings: Any) -> TorchEngine:
    engine = create(source.config, EngineSettings(device="cpu", **settings))
    engine.load_weights(source)
    return engine


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any operation returned in one tensor of at least two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, torch.Tensor) and output.ndim > 1:
                self.numel = max(self.numel, output.numel())
        return result


@shares_heads
def test_no_product_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_weights(toy_config(vocab_size=1009))
    chunk = 8 * source.config.vocab_size
    set_logits_chunk_bytes(monkeypatch, "torch", 4 * chunk)
    engine = build(source)
    batch = toy_batch(source.config, (400, 100))
    with LargestTensor() as largest:
        mean_step(engine, [batch], 1e-3, 0.1)
        engine.evaluate([batch])
    embedding = source.config.vocab_size * source.config.hidden_size
    activations = 500 * 2 * source.config.ffn_hidden_size
    assert largest.numel <= max(chunk, embedding, activations) < 500 * source.config.vocab_size


@shares_heads
def test_attention_forms_no_matrix_of_scores() -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    length = 512
    engine = build(source)
    with LargestTensor() as largest:
        mean_step(engine, [toy_batch(source.config, (length,))], 1e-3, 0.1)
    assert largest.numel < length * length * source.config.num_attention_heads / 4


@shares_heads
def test_experts_are_computed_one_at_a_time() -> None:
    """No operation sees the rows of all experts: eight for each token."""
    source, tokens = toy_weights(moe_config(moe_router_topk=8)), 600
    engine = build(source)
    with LargestTensor() as largest:
        mean_step(engine, [toy_batch(source.config, (tokens // 2, tokens // 2))], 1e-3, 0.1)
    assert largest.numel < 8 * tokens * source.config.hidden_size


def test_equal_neighbours_share_a_call() -> None:
    assert runs([5, 5, 3, 5]) == [Run(2, 5), Run(1, 3), Run(1, 5)]


@pytest.mark.parametrize(("name", "value"), [("_HAS_ONEDNN", False), ("_FAR", 1)])
def test_products_without_onednn_are_the_same(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batches = [toy_batch(source.config, RAGGED)]
    expected_loss, expected = mean_gradients(build(source), batches)
    monkeypatch.setattr(cpu, name, value)
    actual_loss, gradients = mean_gradients(build(source), batches)
    assert actual_loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close_gradients(gradients, expected, rtol=1e-5)


def test_gradients_of_a_large_weight_are_added_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_weights(TOYS["qwen3-untied"])
    batches = [toy_batch(source.config, RAGGED, seed=seed) for seed in range(2)]
    _, expected = mean_gradients(build(source), batches)
    monkeypatch.setattr(cpu, "PIECE", 100)
    _, gradients = mean_gradients(build(source), batches)
    assert_close_gradients(gradients, expected, rtol=1e-5)


def test_recomputed_gives_the_same_gradient_and_keeps_only_inputs() -> None:
    calls = []

    def cheap(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        return x.exp().detach()

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(y)
            return x * y**2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            (y,) = ctx.saved_tensors
            return gradient * y**2, None

    x = torch.tensor([0.5, 2.0], requires_grad=True)
    functional.recomputed(cheap, lambda y: Square.apply(x, y), x).sum().backward()
    assert calls == [0, 1]
    torch.testing.assert_close(x.grad, x.detach().exp() ** 2)


def test_tokens_of_a_read_only_file_are_taken_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batch = toy_batch(source.config, RAGGED)
    batch.tokens.flags.writeable = False
    torch.set_warn_always(True)  # otherwise it warns once in a process
    try:
        mean_step(build(source), [batch], 1e-3, 0.1)
    finally:
        torch.set_warn_always(False)
    assert not [warning for warning in recwarn if "not writable" in str(warning.message)]


def test_a_step_leaves_no_tensor_behind() -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    engine = build(source, recompute_layers=1)

    def tensors_after_a_step() -> int:
        mean_step(engine, [toy_batch(source.config, RAGGED)], 1e-3, 0.1)
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # proxies may be dead

    gc.collect()
    gc.disable()  # cycles must not be what frees activations
    try:
        assert tensors_after_a_step() == tensors_after_a_step()
    finally:
        gc.enable()


def test_bf16_trains_near_fp32_and_keeps_fp32_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "has_native_bf16", lambda device: True)
    source = toy_weights(toy_config(init_method_std=0.05))
    half, full = build(source, bf16=True), build(source)
    assert half.param_dtype == "bfloat16"
    for step in range(5):
        batches = [toy_batch(source.config, RAGGED, seed=step)]
        assert mean_step(half, batches, 1e-3, 0.1).loss == pytest.approx(
            mean_step(full, batches, 1e-3, 0.1).loss, rel=1e-2
        )
    held = {(kind, shard.spec.name): array.copy() for kind, shard, array in half.tensors()}
    assert {kind for kind, _ in held} == {"model", "master", "exp_avg", "exp_avg_sq"}
    for (kind, name), array in held.items():
        assert array.dtype.name == ("bfloat16" if kind == "model" else "float32")
        if kind == "master":
            np.testing.assert_array_equal(array.astype(held["model", name].dtype), held["model", name])
            assert np.any(array != held["model", name].astype(np.float32))


def test_bf16_without_hardware_is_fp32_with_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "has_native_bf16", lambda device: False)
    engine = build(toy_weights(TOYS["llama"]), bf16=True)
    assert engine.param_dtype == "float32"
    assert engine.notices == ["bf16: cpu does not compute in bfloat16 natively; computing in fp32"]


def test_an_absent_device_is_named() -> None:
    with pytest.raises(UserError, match=r"--device tpu: .* give .*cpu"):
        choose_device("tpu")


@pytest.mark.parametrize(
    ("device", "given", "added"),
    [
        ("cuda", None, "PYTORCH_CUDA_ALLOC_CONF"),
        ("cuda", "PYTORCH_CUDA_ALLOC_CONF", None),
        ("cuda", "PYTORCH_ALLOC_CONF", None),
        ("npu", None, "PYTORCH_NPU_ALLOC_CONF"),
        ("npu", "PYTORCH_NPU_ALLOC_CONF", None),
        ("npu", "PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"),  # torch_npu does not read the name without NPU
    ],
)
def test_a_devices_memory_grows_unless_the_user_says_otherwise(
    device: str, given: str | None, added: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"SOME": "thing"} if given is None else {given: "max_split_size_mb:64"}
    monkeypatch.setattr(device_module, "_is_present", lambda kind: kind in (device, "cpu"))
    monkeypatch.setattr(device_module.os, "environ", found := dict(environment))
    monkeypatch.setattr(torch, "device", lambda name: SimpleNamespace(type=name))  # there is an npu with torch_npu only
    assert choose_device("cpu").type == "cpu"
    assert found == environment
    assert choose_device(None).type == device
    assert found == environment | ({added: "expandable_segments:True"} if added else {})


def test_memory_that_pytorch_keeps_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"mem_get_info": (30, 80), "memory_reserved": 25, "memory_allocated": 20}
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    engine = build(toy_weights(TOYS["llama"]))
    engine.device_name, engine._device = "H100", torch.device("cuda")
    assert engine.free_memory() == 35


def test_mis_shaped_weights_are_named() -> None:
    source = toy_weights(TOYS["llama"])
    engine = create(toy_config(model_type="llama", vocab_size=212), EngineSettings(device="cpu"))
    with pytest.raises(UserError, match=r"embedding\.word_embeddings\.weight has shape \[211, 48\]"):
        engine.load_weights(source)


def test_a_batch_of_one_token_is_trained() -> None:
    """Ranks that must compute as often as others get such a one. Its products are no views, which could not be added
    to."""
    source = toy_weights(TOYS["qwen3-tied"])
    batches = [toy_batch(source.config, (1,))]
    loss, gradients = mean_gradients(build(source), batches)
    expected_loss, expected = Reference(source).loss_and_gradients(batches)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert_close_gradients(gradients, expected, rtol=1e-4)
