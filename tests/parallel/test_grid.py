"""Every rank has one place, every element of every tensor is saved once."""

from __future__ import annotations

import numpy as np
import pytest

from tandem.errors import UserError
from tandem.launch.world import World
from tandem.models.tensors import tensor_table
from tandem.options import as_typed
from tandem.parallel.grid import Grid, Place, held_shards, saved_shards
from tandem.parallel.layout import Layout, even_rows
from tandem.parallel.slices import Part, cut, overlaps, tiles, transfer
from toys import moe_config, toy_config

GRID = Grid(Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), size=8)


def test_ranks_follow_megatron() -> None:
    """Tensor ranks are neighbours, stages furthest apart: `RankGenerator(tp=2, dp=2, pp=2, order="tp-dp-pp")`."""
    assert GRID.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert GRID.groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert GRID.groups("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [GRID.rank(GRID.place(rank)) for rank in range(8)] == list(range(8))
    assert GRID.place(5) == Place(tensor=1, data=0, pipeline=1)


def test_processes_that_make_no_whole_models_are_refused() -> None:
    with pytest.raises(UserError, match=r"6 processes: expected a multiple of .* = 4"):
        Grid(GRID.layout, size=6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("by_rows", [True, False])
def test_all_ranks_together_save_each_element_once(tied: bool, by_rows: bool) -> None:
    config = toy_config(num_layers=4, vocab_size=211, untie_embeddings_and_output_weights=not tied)
    saved = {name: np.zeros(spec.shape, int) for name, spec in tensor_table(config).items()}
    for rank in range(GRID.size):
        names = [shard.spec.name for shard in saved_shards(config, GRID, rank, by_rows=by_rows)]
        assert names == [name for name in tensor_table(config) if name in set(names)]
        for shard in saved_shards(config, GRID, rank, by_rows=by_rows):
            count = saved[shard.spec.name]
            transfer(cut(count, shard.part) + 1, shard.part, count, Part.whole(count.shape))
    for name, count in saved.items():
        assert (count == 1).all(), name


def test_a_tied_head_is_held_by_the_last_stage_too() -> None:
    config = toy_config(num_layers=4)
    for stage, expected in ((0, False), (1, True)):
        copies = [shard for shard in held_shards(config, GRID, Place(pipeline=stage)) if shard.is_copy]
        assert bool(copies) == expected


@pytest.mark.parametrize("boxes", [(((3, 9), (0, 4)),), (((0, 4), (0, 4)), ((8, 10), (0, 4)))])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_of_a_part_are_rows_of_its_values(boxes: tuple, world: int) -> None:
    tensor = np.arange(48).reshape(12, 4)
    part = Part(boxes)
    for rank in range(world):
        start, stop = even_rows(part.shape[0], world, rank)
        rows = part.rows(start, stop)
        assert rows.shape == (stop - start, 4)
        np.testing.assert_array_equal(cut(tensor, rows), cut(tensor, part)[start:stop])


def test_rows_of_a_part_split_along_columns() -> None:
    tensor = np.arange(48).reshape(4, 12)
    part = Part((((0, 4), (0, 2)), ((0, 4), (6, 8))), dim=1)
    np.testing.assert_array_equal(cut(tensor, part.rows(1, 3)), cut(tensor, part)[1:3])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        ({"WORLD_SIZE": "1"}, World()),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, World(3, 4, 1)),
        ({"MS_WORKER_NUM": "2", "RANK_SIZE": "2", "RANK_ID": "1", "DEVICE_ID": "1"}, World(1, 2, 1)),
    ],
)
def test_launchers_are_understood(environment: dict[str, str], expected: World) -> None:
    assert World.from_environment(environment) == expected


def test_a_world_without_a_rank_is_refused() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE=2, but RANK and LOCAL_RANK is not set"):
        World.from_environment({"WORLD_SIZE": "2"})


def test_any_part_is_put_together_from_any_slices() -> None:
    tensor = np.arange(24 * 6).reshape(24, 6)
    slices = [Part((((r * 4, r * 4 + 4), (0, 6)), ((12 + r * 4, 16 + r * 4), (0, 6)))) for r in range(3)]  # gate and up
    parts = [Part((((2, 9), (1, 5)), ((14, 21), (1, 5)))), Part((((0, 24), (2, 4)),), dim=1), Part.whole((24, 6))]
    for part in parts:
        values = np.full(part.shape, -1)
        for piece in slices:
            transfer(cut(tensor, piece), piece, values, part)
        np.testing.assert_array_equal(values, cut(tensor, part))
    assert not overlaps(slices[0], slices[1])
    assert overlaps(slices[0], parts[0])


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ({"expert_model_parallel_size": 4}, 4),
        ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, 8),
        ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}, 8),
        ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "moe_tp_extend_ep": True}, 8),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3, "expert_tensor_parallel_size": 1}, 12),
    ],
)
def test_every_number_of_a_mixture_is_saved_once(layout: dict, size: int, by_rows: bool) -> None:
    config, grid = moe_config(), Grid(Layout(**layout), size)
    parts: dict[str, list[Part]] = {}
    for rank in range(size):
        held = {shard.spec.name: shard.part for shard in held_shards(config, grid, grid.place(rank))}
        for shard in saved_shards(config, grid, rank, by_rows=by_rows):
            parts.setdefault(shard.spec.name, []).append(shard.part)
            assert overlaps(shard.part, held[shard.spec.name])
    for name, spec in tensor_table(config).items():
        assert tiles(parts[name], spec.shape), name


def test_megatrons_places_of_experts() -> None:
    """Ranks that cut an expert are neighbours, then come those that share experts, then copies."""
    grid = Grid(Layout(tensor_model_parallel_size=2, expert_model_parallel_size=2), 8)
    place = grid.place(5)
    assert (grid.expert_group("tensor", place), grid.expert_group("expert", place)) == ([4, 5], [5, 7])
    assert grid.expert_group("replica", place) == [1, 5]
    whole = Grid(Layout(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1), 8)
    assert whole.expert_group("expert", whole.place(5)) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("layout", "size", "named"),
    [
        (
            {"expert_model_parallel_size": 3},
            3,
            "--expert-model-parallel-size 3: .*: give 1, 2, 4 or 8",
        ),
        ({"expert_model_parallel_size": 4}, 2, "the 2 processes of a pipeline stage are not a multiple of 4 ranks"),
        ({"expert_tensor_parallel_size": 2}, 2, "--expert-tensor-parallel-size 2: expected 1"),
        (
            {"moe_tp_extend_ep": True, "tensor_model_parallel_size": 16},
            16,
            "16 tensor ranks x 1 ranks: leave out --moe-",
        ),
    ],
)
def test_experts_that_do_not_divide_are_refused(layout: dict, size: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Grid(Layout(**layout), size).layout._check_experts(moe_config().experts, as_typed)
