"""Which rank does what: Megatron's grid of tensor, data and pipeline ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, TensorSpec
from tandem.parallel.layout import Layout, Shard, even_rows, shards

Axis = Literal["tensor", "data", "pipeline"]
ExpertAxis = Literal["tensor", "expert", "replica"]


@dataclass(frozen=True)
class Place:
    """A rank's position on each axis of the grid."""

    tensor: int = 0
    data: int = 0
    pipeline: int = 0


@dataclass(frozen=True)
class ExpertPlace:
    """A rank among those of its stage, for the tensors of experts: which slice, which experts, which copy of these."""

    tensor: int
    expert: int
    replica: int


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
        experts = self.layout.expert_tensor_size * self.layout.expert_size
        if self.layout.expert_size > 1 and self._stage_size % experts:
            raise UserError(
                f"--expert-model-parallel-size {self.layout.expert_model_parallel_size}: the {self._stage_size} "
                f"processes of a pipeline stage are not a multiple of {self.layout.expert_size} ranks that share the "
                f"experts x {self.layout.expert_tensor_size} that cut each"
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

    @property
    def _stage_size(self) -> int:
        return self.tensor_size * self.data_size

    def expert_place(self, place: Place) -> ExpertPlace:
        """Where a rank stands for experts. In Megatron's order, ranks that cut an expert are neighbours.

        >>> grid = Grid(Layout(tensor_model_parallel_size=2, expert_model_parallel_size=2), size=8)
        >>> grid.expert_place(grid.place(6))
        ExpertPlace(tensor=0, expert=1, replica=1)
        """
        rest, tensor = divmod(place.data * self.tensor_size + place.tensor, self.layout.expert_tensor_size)
        replica, expert = divmod(rest, self.layout.expert_size)
        return ExpertPlace(tensor, expert, replica)

    def expert_group(self, axis: ExpertAxis, place: Place) -> list[int]:
        """The ranks of the stage that differ from `place` along `axis` only, for experts, and its own rank."""
        here = self.expert_place(place)
        stage = [Place(t, d, place.pipeline) for d in range(self.data_size) for t in range(self.tensor_size)]
        return [
            self.rank(other)
            for other in stage
            if replace(self.expert_place(other), **{axis: 0}) == replace(here, **{axis: 0})
        ]

    def expert_holders(self, place: Place, *, whole: bool, by_rows: bool) -> list[int]:
        """The ranks of the stage that have the experts of the rank at `place`.

        Args:
            whole: also those that have other slices of these.
            by_rows: only the rank's own copy.
        """
        slices = self.expert_group("tensor", place) if whole else [self.rank(place)]
        if by_rows:
            return slices
        return [rank for of_slice in slices for rank in self.expert_group("replica", self.place(of_slice))]

    def copies(self, spec: TensorSpec, place: Place) -> tuple[int, int]:
        """How many ranks of the stage hold the same part of a tensor and share its updates, and which one this is.

        Other copies of a replicated tensor are those of other tensor ranks.
        """
        if not spec.split.experts:
            return self.data_size, place.data
        size = self._stage_size // (self.layout.expert_tensor_size * self.layout.expert_size)
        return size, self.expert_place(place).replica

    def holds(self, place: Place, shard: Shard) -> bool:
        """Whether the rank at `place` holds a shard."""
        if shard.pipeline_rank != place.pipeline:
            return False
        if not shard.spec.split.experts:
            return shard.tensor_rank == place.tensor
        here = self.expert_place(place)
        return (shard.tensor_rank, shard.expert_rank) == (here.tensor, here.expert)

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

    @property
    def copies_of_the_model(self) -> int:
        return self.data_size // self.layout.data_ranks_of_a_copy

    def copy(self, place: Place) -> int:
        """Which copy of the model a rank holds a part of."""
        return place.data // self.layout.data_ranks_of_a_copy

    def sharer(self, place: Place) -> tuple[int, int]:
        """How many data ranks hold a copy of the model together, and which of them a rank belongs to."""
        size = self.layout.data_ranks_of_a_copy
        return size, place.data % size

    def model(self, copy: int) -> list[int]:
        """The ranks that hold one copy of the model together; the first begins it.

        >>> grid = Grid(Layout(pipeline_model_parallel_size=2, expert_model_parallel_size=2), size=8)
        >>> grid.model(1)
        [2, 3, 6, 7]
        """
        size = self.layout.data_ranks_of_a_copy
        tensor, data, stages = range(self.tensor_size), range(copy * size, (copy + 1) * size), range(self.pipeline_size)
        return [self.rank(Place(slice_, rank, stage)) for stage in stages for rank in data for slice_ in tensor]

    def is_first_stage(self, place: Place) -> bool:
        return place.pipeline == 0

    def is_last_stage(self, place: Place) -> bool:
        return place.pipeline == self.pipeline_size - 1


def held_shards(config: ModelConfig, grid: Grid, place: Place) -> list[Shard]:
    """The weights that a rank computes with, including its copy of a tied embedding for the head."""
    return [shard for shard in shards(config, grid.layout, tied_head_copy=True) if grid.holds(place, shard)]


def counted_shards(config: ModelConfig, grid: Grid, place: Place) -> list[Shard]:
    """Those of the held shards that count on this rank: so tensor ranks and stages together count each number once.

    Replicated tensors count on the first tensor rank, a tied embedding on the first stage. Of experts, a tensor that is
    whole on the ranks that cut each expert counts on the first of these.
    """
    first = {False: place.tensor == 0, True: grid.expert_place(place).tensor == 0}
    return [
        shard
        for shard in held_shards(config, grid, place)
        if not shard.is_copy and (shard.spec.split.dim is not None or first[bool(shard.spec.split.experts)])
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
        held = [replace(s, part=s.part.rows(*even_rows(s.shape[0], *grid.copies(s.spec, place)))) for s in held]
    saved = []
    for shard in held:
        holders = _holders(config, grid, shard, place, by_rows)
        if rank == min(holder for holder in holders if holder >= first_rank) and 0 not in shard.shape:
            saved.append(shard)
    return saved


def _holders(config: ModelConfig, grid: Grid, shard: Shard, place: Place, by_rows: bool) -> list[int]:
    """The ranks that keep the same part of a tensor as the rank at `place`."""
    if shard.spec.split.experts:
        return grid.expert_holders(place, whole=shard.spec.split.dim is None, by_rows=by_rows)
    tensor = range(grid.tensor_size) if shard.spec.split.dim is None else (place.tensor,)
    data = (place.data,) if by_rows else range(grid.data_size)
    is_tied = config.tied and shard.spec.name == EMBEDDING
    stages = (0, grid.pipeline_size - 1) if is_tied else (place.pipeline,)
    return [grid.rank(Place(t, d, p)) for t in tensor for d in data for p in stages]
