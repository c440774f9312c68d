"""Distributed checkpoints with experts, as Megatron-core writes them of both of its local kinds of experts."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from ours import our_logits
from toy_work import toy_batch

from tandem.checkpoints.detect import open_source
from tandem.checkpoints.interface import TORCH_DIST
from tandem.checkpoints.megatron.args import to_args
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
