"""Which rank does what: Megatron's grid of tensor, data and pipeline ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING
from tandem.parallel.layout import Layout, Shard, even_rows, shards

Axis = Literal["tensor", "data", "pipeline"]


@dataclass(frozen=True)
class Place:
    """A rank's position on each axis of the grid."""

    tensor: int = 0
    data: int = 0
    pipeline: int = 0


@dataclass(frozen=True)
class Grid:
    """`size` ranks in Megatron-core's order (`tp-cp-ep-dp-pp`).

    Tensor ranks are neighbours, then come data ranks, and pipeline stages are furthest apart.

    >>> grid = Grid(Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), size=8)
    >>> grid.place(6)
    Place(tensor=0, data=1, pipeline=1)
    >>> grid.groups("tensor")
    [[0, 1], [2, 3], [4, 5], [6, 7]]

    Raises:
        UserError: the ranks do not divide into whole models.
    """

    layout: Layout = field(default_factory=Layout)
    size: int = 1

    def __post_init__(self) -> None:
        model = self.tensor_size * self.pipeline_size
        if self.size % model:
            raise UserError(
                f"{self.size} processes: expected a multiple of --tensor-model-parallel-size {self.tensor_size} x "
                f"--pipeline-model-parallel-size {self.pipeline_size} = {model}"
            )

    @property
    def tensor_size(self) -> int:
        return self.layout.tensor_model_parallel_size

    @property
    def pipeline_size(self) -> int:
        return self.layout.pipeline_model_parallel_size

    @property
    def data_size(self) -> int:
        return self.size // (self.tensor_size * self.pipeline_size)

    def place(self, rank: int) -> Place:
        rest, tensor = divmod(rank, self.tensor_size)
        pipeline, data = divmod(rest, self.data_size)
        return Place(tensor, data, pipeline)

    def rank(self, place: Place) -> int:
        return (place.pipeline * self.data_size + place.data) * self.tensor_size + place.tensor

    def group(self, axis: Axis, place: Place) -> list[int]:
        """The ranks that differ from `place` along `axis` only, and its own rank, in the axis's order."""
        size = {"tensor": self.tensor_size, "data": self.data_size, "pipeline": self.pipeline_size}[axis]
        return [self.rank(replace(place, **{axis: position})) for position in range(size)]

    def groups(self, axis: Axis) -> list[list[int]]:
        """All groups along `axis`; each rank is in exactly one."""
        groups = {tuple(self.group(axis, self.place(rank))) for rank in range(self.size)}
        return [list(group) for group in sorted(groups)]

    def is_first_stage(self, place: Place) -> bool:
        return place.pipeline == 0

    def is_last_stage(self, place: Place) -> bool:
        return place.pipeline == self.pipeline_size - 1


def held_shards(config: ModelConfig, grid: Grid, place: Place) -> list[Shard]:
    """The weights that a rank computes with, including its copy of a tied embedding for the head."""
    return [
        shard
        for shard in shards(config, grid.layout, tied_head_copy=True)
        if (shard.tensor_rank, shard.pipeline_rank) == (place.tensor, place.pipeline)
    ]


def counted_shards(config: ModelConfig, grid: Grid, place: Place) -> list[Shard]:
    """Those of the held shards that count on this rank: so tensor ranks and stages together count each number once.

    Replicated tensors count on the first tensor rank, a tied embedding on the first stage.
    """
    return [
        shard
        for shard in held_shards(config, grid, place)
        if not shard.is_copy and (shard.spec.split.dim is not None or place.tensor == 0)
    ]


def saved_shards(config: ModelConfig, grid: Grid, rank: int, *, by_rows: bool, first_rank: int = 0) -> list[Shard]:
    """What a checkpoint takes from a rank, in the tensor table's order.

    These are the parts that no earlier rank on its disk holds. So every disk gets everything that its ranks hold, once.

    Args:
        by_rows: the state is sharded by rows over data ranks (`even_rows`): a rank holds only its rows.
        first_rank: the first rank that writes to this rank's disk; 0 when all ranks share one disk.
    """
    place = grid.place(rank)
    held = held_shards(config, grid, place)
    if by_rows:
        held = [replace(s, part=s.part.rows(*even_rows(s.shape[0], grid.data_size, place.data))) for s in held]
    data = (place.data,) if by_rows else range(grid.data_size)
    saved = []
    for shard in held:
        tensor = range(grid.tensor_size) if shard.spec.split.dim is None else (place.tensor,)
        is_tied = config.tied and shard.spec.name == EMBEDDING
        stages = (0, grid.pipeline_size - 1) if is_tied else (place.pipeline,)
        holders = [grid.rank(Place(t, d, p)) for t in tensor for d in data for p in stages]
        if rank == min(holder for holder in holders if holder >= first_rank) and 0 not in shard.shape:
            saved.append(shard)
    return saved
