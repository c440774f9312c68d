"""Distributed checkpoints with experts, as Megatron-core writes them of both of its local kinds of experts."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from ours import our_logits
from test_mcore_model import MODELS, convert
from toy_work import toy_batch, toy_weights

from tandem.backends import transformers_logits
from tandem.backends.capacity import Capacity
from tandem.backends.torch.experts import taken_choices
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import TORCH_DIST, Companions
from tandem.checkpoints.megatron.args import to_args
from tandem.config.settings import RouterSettings
from tandem.models.experts import Experts
from tandem.parallel.grid import Grid, held_shards
from tandem.parallel.layout import Layout
from tandem.parallel.slices import cut
from toys import moe_config


def multiplied(x: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, trans_b: bool) -> torch.Tensor:
    """In place of the product that Megatron takes from a package for CUDA."""
    assert not trans_b
    return torch.cat([rows @ weight for rows, weight in zip(x.split(counts.tolist()), weights)])


@pytest.fixture
def grouped(mcore: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`GroupedMLP` can be built and computes."""
    from megatron.core.transformer.moe import experts

    operators = SimpleNamespace(ops=SimpleNamespace(gmm=multiplied), assert_grouped_gemm_is_available=lambda: None)
    monkeypatch.setattr(experts, "gg", operators)


def mixture(experts: int, topk: int) -> Experts:
    return Experts(num_experts=experts, moe_router_topk=topk, moe_ffn_hidden_size=4, norm_topk_prob=True)


@pytest.mark.parametrize("factor", [0.3, 0.75, 1.0, 3.0])
@pytest.mark.parametrize("topk", [1, 3])
def test_experts_take_the_tokens_that_megatrons_take(mcore: ModuleType, topk: int, factor: float) -> None:
    """On both frameworks. By position, Megatron keeps as many as here, but of equal ones not always the first."""
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    logits = torch.randn(37, 8, generator=torch.Generator().manual_seed(topk))
    factors, chosen = torch.softmax(logits, 1).topk(topk, dim=1)
    probabilities = torch.zeros(37, 8).scatter(1, chosen, factors)
    routed = probabilities > 0
    for policy in ("probs", "position"):
        _, expected = apply_router_token_dropping(probabilities, routed, topk, factor, policy)
        padded, _ = apply_router_token_dropping(probabilities, routed, topk, factor, policy, pad_to_capacity=True)
        settings = RouterSettings(moe_expert_capacity_factor=factor, moe_token_drop_policy=policy)
        capacity = Capacity.of(settings, mixture(8, topk), parts=1)
        assert capacity is not None
        taken = capacity.taken(chosen.numpy(), factors.numpy(), 37)
        np.testing.assert_array_equal(taken_choices(capacity, chosen, factors, 37).numpy(), taken)
        ours = torch.zeros(37, 8, dtype=torch.bool).scatter(1, chosen, torch.from_numpy(taken))
        if policy == "probs":
            torch.testing.assert_close(ours, expected)
            torch.testing.assert_close(probabilities * ours, padded)  # rows of padding have a factor of 0
        torch.testing.assert_close(ours.sum(0), expected.sum(0))
        if policy == "position":
            first = routed.cumsum(0) <= ours.sum(0)
            torch.testing.assert_close(ours, routed & first)


def test_parts_of_the_tokens_have_capacities_of_their_own() -> None:
    """As tensor ranks under sequence parallelism have in Megatron. Padding is not counted."""
    chosen, factors = np.zeros((12, 1), np.int64), np.linspace(1.0, 0.1, 12, dtype=np.float32)[:, None]
    capacity = Capacity(mixture(4, 1), 2.0, parts=2, by_probability=True)
    taken = capacity.taken(chosen, factors, 10)[:, 0]
    assert np.flatnonzero(taken).tolist() == [0, 1, 2, 5, 6, 7]  # ceil(5 / 4 * 2) of each five
    torch.testing.assert_close(
        taken_choices(capacity, torch.from_numpy(chosen), torch.from_numpy(factors), 10)[:, 0], torch.from_numpy(taken)
    )


@pytest.mark.slow("jobs")
@pytest.mark.parametrize("kind", ["SequentialMLP", "GroupedMLP"])
@pytest.mark.parametrize("form", ["stacked", "by-layer", "by-expert"])
def test_experts_of_distributed_checkpoints_are_read(
    mcore: ModuleType, grouped: None, kind: str, form: str, tmp_path: Path
) -> None:
    """Layers of one kind are stacked, of two kinds are not; `singleton_local_shards` gives each expert a name."""
    config = moe_config(**({} if form == "stacked" else {"mlp_only_layers": (0,)}))
    args = to_args(config, Layout(), "float32", config.vocab_size)
    args.moe_grouped_gemm = kind == "GroupedMLP"
    (chunk,) = chunks = mcore.build(args)
    experts = chunk.decoder.layers[1].mlp.experts
    assert type(experts).__name__ == kind
    chunk.config.bf16 = experts.config.bf16 = True  # `GroupedMLP` insists on it, whatever its weights are
    mcore.save_distributed(tmp_path, chunks, args, singleton_local_shards=form == "by-expert")
    batch = toy_batch(config, (60,))
    expected = mcore.logits(chunks, torch.from_numpy(batch.tokens).long()).numpy()
    source = open_source(tmp_path)
    assert (source.format, source.config) == (TORCH_DIST, config)
    np.testing.assert_allclose(our_logits(source, batch), expected, atol=1e-4, rtol=0)
    grid = Grid(Layout(tensor_model_parallel_size=2, expert_model_parallel_size=2), 4)
    for rank in range(grid.size):  # each gets its parts alone
        for shard in held_shards(config, grid, grid.place(rank)):
            values = source.read_part(shard.spec.name, shard.part)
            np.testing.assert_array_equal(values, cut(source.read(shard.spec.name), shard.part))


@pytest.mark.parametrize("model", ["qwen3-moe", "qwen3-moe-raw"])
def test_files_of_grouped_experts_are_megatrons(mcore: ModuleType, grouped: None, model: str, tmp_path: Path) -> None:
    """Megatron opens ours, strictly, and computes what transformers computes of the model. What it saves is read."""
    config = MODELS[model]
    copy(toy_weights(config), HFSink(tmp_path / "hf", config, "float32", Companions()))
    batch = toy_batch(config, (60,))
    tokens = torch.from_numpy(batch.tokens).long()
    converted = convert(
        *(tmp_path / "hf", tmp_path / "mg", "--load-model-type", "hf", "--ckpt-format", "torch", "--moe-grouped-gemm")
    )
    chunks = mcore.load(converted)
    layer = chunks[0].decoder.layers[1].mlp.experts
    assert type(layer).__name__ == "GroupedMLP"
    chunks[0].config.bf16 = layer.config.bf16 = True  # it insists on that, whatever its weights are
    logits = mcore.logits(chunks, tokens).numpy()
    np.testing.assert_allclose(logits, transformers_logits(tmp_path / "hf", "float32", batch), atol=1e-4, rtol=0)
    args = to_args(config, Layout(), "float32", config.vocab_size)
    args.moe_grouped_gemm = True
    mcore.save(tmp_path / "saved", chunks, args)
    np.testing.assert_allclose(our_logits(open_source(tmp_path / "saved"), batch), logits, atol=1e-4, rtol=0)
