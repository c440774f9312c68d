"""Adam's moments in bf16: computed in fp32, rounded to the nearest, kept and loaded as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from toy_work import mean_step, snapshot, toy_batch, toy_weights

from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.backends.torch import optimizer
from tandem.backends.torch.optimizer import AdamW
from tandem.errors import UserError
from tandem.frameworks import MINDSPORE
from toys import TOYS

BF16 = ml_dtypes.bfloat16
NARROW: dict[str, Any] = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
STEPS, LR, DECAY, CLIPPED = 30, 1e-2, 0.1, 0.25
SHAPES = {"matrix": (7, 5), "vector": (5,), "large": (40, 6)}


def decision(skip: bool = False) -> Any:
    return SimpleNamespace(coefficient=torch.tensor(CLIPPED), skip=torch.tensor(float(skip)))


def reference(
    weight: np.ndarray, gradients: list[np.ndarray], decay: float, dtypes: tuple[Any, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AdamW in NumPy (arXiv 1711.05101), in float64 but for what is kept: weights in fp32, moments in `dtypes`."""
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    first, second = (np.zeros(weight.shape, dtype) for dtype in dtypes)
    for step, gradient in enumerate(gradients, 1):
        scaled = gradient.astype(np.float64) * CLIPPED
        m = beta1 * first.astype(np.float64) + (1 - beta1) * scaled
        v = beta2 * second.astype(np.float64) + (1 - beta2) * scaled**2
        update = (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps)
        weight = (weight.astype(np.float64) * (1 - LR * decay) - LR * update).astype(np.float32)
        first, second = m.astype(np.float32).astype(dtypes[0]), v.astype(np.float32).astype(dtypes[1])
    return weight, first, second


@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16")])
@pytest.mark.parametrize("widened", [64, 2**24])
def test_updates_are_those_of_numpy(dtypes: tuple[str, str], widened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a large matrix is updated in pieces."""
    monkeypatch.setattr(optimizer, "WIDENED", widened)
    generator = np.random.default_rng(3)
    weights = {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    gradients = {
        name: [generator.normal(size=shape).astype(np.float32) for _ in range(STEPS)] for name, shape in SHAPES.items()
    }
    settings = EngineSettings(**{**NARROW, "exp_avg_dtype": dtypes[0], "exp_avg_sq_dtype": dtypes[1]}, adam_beta2=0.95)
    tensors = {name: torch.from_numpy(weight.copy()) for name, weight in weights.items()}
    now: dict[str, torch.Tensor] = {}
    adamw = AdamW(tensors, now.__getitem__, settings)
    for step in range(STEPS):
        now.update({name: torch.from_numpy(of_weight[step].copy()) for name, of_weight in gradients.items()})
        adamw.update(step + 1, LR, DECAY, decision())
    for name, weight in weights.items():
        numpy_dtypes = tuple({"bf16": BF16, "fp32": np.float32}[dtype] for dtype in dtypes)
        decay = DECAY if weight.ndim > 1 else 0.0
        expected = reference(weight, gradients[name], decay, numpy_dtypes)  # type: ignore[arg-type]
        np.testing.assert_allclose(tensors[name].numpy(), expected[0], rtol=1e-4, atol=1e-5)
        for kept, moment, dtype in zip((adamw.exp_avg[name], adamw.exp_avg_sq[name]), expected[1:], dtypes):
            assert kept.dtype == optimizer.DTYPES[dtype]
            # Where fp32 and float64 fall on two sides of a rounding, a moment in bf16 is off by one unit, 2^-7.
            found, wanted = kept.float().numpy(), moment.astype(np.float32)
            rtol = 2**-7 if dtype == "bf16" else 1e-5
            np.testing.assert_allclose(found, wanted, rtol=rtol, atol=1e-6)
            assert np.mean(np.abs(found - wanted) > 1e-5 * np.abs(wanted) + 1e-7) < 0.05


def test_a_skipped_step_changes_nothing() -> None:
    tensors = {"x": torch.ones(4, 3)}
    adamw = AdamW(tensors, lambda name: torch.full((4, 3), 0.3), EngineSettings(**NARROW))
    adamw.update(1, LR, DECAY, decision())
    before = [tensor.clone() for tensor in (tensors["x"], adamw.exp_avg["x"], adamw.exp_avg_sq["x"])]
    assert before[1].any()
    adamw.update(2, LR, DECAY, decision(skip=True))
    for old, new in zip(before, (tensors["x"], adamw.exp_avg["x"], adamw.exp_avg_sq["x"])):
        assert torch.equal(old, new)


def test_an_engine_goes_on_from_its_own_moments_bit_for_bit() -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    batches = [[toy_batch(source.config, (5, 3), seed=seed)] for seed in range(4)]
    settings = EngineSettings(device="cpu", adam_beta2=0.95, **NARROW)
    unbroken = create_engine("torch", source.config, settings)
    unbroken.load_weights(source)
    for batch in batches[:2]:
        mean_step(unbroken, batch, 1e-2, 0.1)
    kept = snapshot(unbroken)
    assert {kind: kept.dtype("decoder.final_layernorm.weight", kind) for kind in kept.kinds()} == {
        "model": np.float32,
        "exp_avg": BF16,
        "exp_avg_sq": BF16,
    }
    resumed = create_engine("torch", source.config, settings)
    resumed.load_weights(kept)
    resumed.load_optimizer(kept, 2)
    for batch in batches[2:]:
        assert mean_step(resumed, batch, 1e-2, 0.1) == mean_step(unbroken, batch, 1e-2, 0.1)
    after, expected = snapshot(resumed), snapshot(unbroken)
    for kind in expected.kinds():
        for shard in unbroken._shards.values():  # type: ignore[attr-defined]
            found, wanted = (one.read(shard.spec.name, kind) for one in (after, expected))
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)
    assert resumed.notices == []


def test_moments_that_change_their_dtype_are_named() -> None:
    source = toy_weights(TOYS["qwen3-tied"])
    wide, narrow = (
        create_engine("torch", source.config, EngineSettings(device="cpu", adam_beta2=0.95, **settings))
        for settings in ({}, NARROW)
    )
    narrow.load_optimizer(snapshot(wide), 1)
    assert narrow.notices == [
        f"memory holds {kind} in float32; this run keeps it in bfloat16" for kind in ("exp_avg", "exp_avg_sq")
    ]


@pytest.mark.parametrize(("beta2", "stands"), [(0.95, False), (0.99, False), (0.999, True)])
def test_a_moment_that_bf16_cannot_follow_is_named(beta2: float, stands: bool) -> None:
    """Measured: without gradients, the second moment falls to beta2^n, or not at all."""
    weight = {"x": torch.ones(1, 1)}
    gradient = torch.ones(1, 1)
    settings = EngineSettings(device="cpu", adam_beta2=beta2, **NARROW)
    adamw = AdamW(weight, lambda _: gradient, settings)
    adamw.update(1, LR, DECAY, decision())
    first = float(adamw.exp_avg_sq["x"])
    gradient.zero_()
    for step in range(2, 200):
        adamw.update(step, LR, DECAY, decision())
    assert (float(adamw.exp_avg_sq["x"]) == first) == stands
    notices = create_engine("torch", TOYS["qwen3-tied"], settings).notices
    assert [notice.split(":")[0] for notice in notices] == ["--adam-beta2 0.999"] * stands


def test_mindspore_refuses_the_flag_by_name() -> None:
    with pytest.raises(UserError, match="--exp-avg-sq-dtype needs torch, not mindspore"):
        MINDSPORE.check(shards_weights=False, narrow_moments=["--exp-avg-sq-dtype"])
