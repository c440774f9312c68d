"""Which layers, and which slices of the tensors, each rank holds.

Pure functions of the model and the layout; nothing here knows processes or files. Layers are placed as by
Megatron-core: a pipeline stage holds consecutive layers. With virtual stages of `c` layers and `p` stages, chunk `k` of
stage `s` holds the `c` layers from `(k * p + s) * c`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.errors import UserError, check_all
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts
from tandem.models.tensors import EMBEDDING, FINAL_NORM, OUTPUT, TensorSpec, layer_prefix, tensor_table
from tandem.options import Describe, as_typed
from tandem.parallel.slices import Part


@dataclass(frozen=True)
class Slot:
    """A place for a layer: its number within the chunk, and the global layer that fills it."""

    local: int
    layer: int


# [pipeline stage][chunk] -> the slots that hold a layer; noop slots are left out but keep their number
Stages = tuple[tuple[tuple[Slot, ...], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is spread over ranks. Field names are Megatron's.

    `num_layer_list` gives the layers of each stage when they are uneven. `noop_layers` are the numbers of slots that
    stay empty, counted in the stack that they lengthen. `layers_of_chunks` gives the layers of each chunk, in the
    model's order, where interleaved stages are uneven; such checkpoints of Megatron are read, and not written.

    `expert_model_parallel_size` ranks share the experts of a layer, and `expert_tensor_parallel_size` ranks (None: the
    tensor ranks) cut each of them. `moe_tp_extend_ep` lets tensor ranks share experts, too, in place of cutting them.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    num_layer_list: tuple[int, ...] | None = None
    noop_layers: tuple[int, ...] = ()
    layers_of_chunks: tuple[int, ...] | None = None
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    moe_tp_extend_ep: bool = False

    @property
    def expert_size(self) -> int:
        """How many ranks share the experts of a layer, each with some of them."""
        return self.expert_model_parallel_size * (self.tensor_model_parallel_size if self.moe_tp_extend_ep else 1)

    @property
    def expert_tensor_size(self) -> int:
        """How many ranks share each expert, each with a slice of it."""
        if self.moe_tp_extend_ep:
            return 1
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def data_ranks_of_a_copy(self) -> int:
        """How many data ranks hold one copy of the model together: those that share experts."""
        return max(1, self.expert_tensor_size * self.expert_size // self.tensor_model_parallel_size)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """The inverse of `dataclasses.asdict`, also when JSON has turned tuples into lists."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)

    def balanced(self, num_layers: int) -> Layout:
        """The same layout, with `num_layer_list` filled in where the layers do not divide over the stages.

        A layout that already fixes how layers are split stays as it is. Stages differ by one layer at most. The last
        stage has the head, so it never gets one more; the first keeps most activations, so it gets one last.

        >>> Layout(pipeline_model_parallel_size=4).balanced(30).num_layer_list
        (7, 8, 8, 7)
        """
        stages = self.pipeline_model_parallel_size
        is_fixed = self.num_layer_list or self.noop_layers or self.num_layers_per_virtual_pipeline_stage
        if is_fixed or not 1 < stages <= num_layers or num_layers % stages == 0:
            return self
        layers, rest = divmod(num_layers, stages)
        counts = tuple(layers + (stages - 1 - rest <= stage < stages - 1) for stage in range(stages))
        return dataclasses.replace(self, num_layer_list=counts)

    def stages(self, num_layers: int, describe: Describe = as_typed) -> Stages:
        """Where each of `num_layers` layers goes.

        Args:
            describe: how errors call the fields of the layout, by default as flags of training.

        Raises:
            UserError: the numbers do not divide, or contradict each other.
        """
        total = num_layers + len(self.noop_layers)
        slots = self._slots(total, describe)
        empty = set(self.noop_layers)
        if len(empty) != len(self.noop_layers) or any(not 0 <= slot < total for slot in empty):
            given = describe("noop_layers", _comma_separated(self.noop_layers))
            raise UserError(f"{given}: expected different numbers from 0 to {total - 1}")
        layer_of = {slot: layer for layer, slot in enumerate(s for s in range(total) if s not in empty)}
        return tuple(
            tuple(
                tuple(Slot(local, layer_of[slot]) for local, slot in enumerate(chunk) if slot in layer_of)
                for chunk in stage
            )
            for stage in slots
        )

    def _slots(self, total: int, describe: Describe) -> list[list[range]]:
        """[stage][chunk] -> range of slot numbers, before noop slots are emptied."""
        pp, per_chunk = self.pipeline_model_parallel_size, self.num_layers_per_virtual_pipeline_stage
        if self.layers_of_chunks is not None:
            return _interleaved(self.layers_of_chunks, pp)
        if self.num_layer_list is not None:
            return self._uneven_slots(total, self.num_layer_list, describe)
        if total % pp:
            raise UserError(
                f"{describe('pipeline_model_parallel_size', pp)}: {total} layers (noop layers included) do not divide "
                f"over the stages: give {_one_of(divisors(total))}, or {self._ways_to_divide(total, describe)}"
            )
        per_stage = total // pp
        if per_chunk is None:
            return [[range(stage * per_stage, (stage + 1) * per_stage)] for stage in range(pp)]
        if per_chunk < 1 or per_stage % per_chunk or per_stage <= per_chunk:
            smaller = divisors(per_stage)[:-1]
            raise UserError(
                f"{describe('num_layers_per_virtual_pipeline_stage', per_chunk)}: expected a number that divides the "
                f"{per_stage} layers of a pipeline stage, and is smaller: "
                f"{f'give {_one_of(smaller)}, or ' if smaller else ''}leave it out"
            )
        return _interleaved((per_chunk,) * (total // per_chunk), pp)

    def _ways_to_divide(self, total: int, describe: Describe) -> str:
        """What else lays out slots that do not divide over the stages. Each stage of a list needs a layer."""
        stages, even = self.pipeline_model_parallel_size, self.balanced(total).num_layer_list
        filled = describe("noop_layers", _comma_separated([*self.noop_layers, *range(total, total + -total % stages)]))
        listed = (
            f"give the layers of each stage with {describe('num_layer_list', _comma_separated(even))}, or "
            if even
            else ""
        )
        return f"{listed}leave slots without a layer with {filled}"

    def _uneven_slots(self, total: int, counts: tuple[int, ...], describe: Describe) -> list[list[range]]:
        stages, given = self.pipeline_model_parallel_size, describe("num_layer_list", _comma_separated(counts))
        if self.num_layers_per_virtual_pipeline_stage is not None or self.noop_layers:
            others = ("num_layers_per_virtual_pipeline_stage", "noop_layers")
            names = " and ".join(describe(name, None) for name in others if getattr(self, name))
            raise UserError(f"{given} and {names} exclude each other: give one")
        if len(counts) != stages or sum(counts) != total or min(counts) < 1:
            even = dataclasses.replace(self, num_layer_list=None).balanced(total).num_layer_list
            example = even or (total // stages,) * stages if total >= stages else None
            raise UserError(
                f"{given}: expected {stages} positive numbers ({describe('pipeline_model_parallel_size', None)}) whose "
                f"sum is the {total} layers{f', such as {_comma_separated(example)}' if example else ''}"
            )
        starts = [sum(counts[:stage]) for stage in range(len(counts))]
        return [[range(start, start + count)] for start, count in zip(starts, counts)]

    def check(self, config: ModelConfig, describe: Describe = as_typed) -> None:
        """Raise UserError when `config` cannot be laid out like this. `describe`: see `stages`."""
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{describe(name, value)}: expected 1 or more")
        check_all(
            lambda: self._check_tensors(config, describe),
            lambda: self._check_experts(config.experts, describe),
            lambda: self.stages(config.num_layers, describe),
        )

    def _check_tensors(self, config: ModelConfig, describe: Describe) -> None:
        tp = self.tensor_model_parallel_size
        cut = ["num_query_groups", "num_attention_heads", *(["ffn_hidden_size"] if config.dense_layers else [])]
        sizes = {field: getattr(config, field) for field in cut}
        if wrong := [f"{field} {size}" for field, size in sizes.items() if size % tp]:
            raise UserError(
                f"{describe('tensor_model_parallel_size', tp)}: the model's {' and '.join(wrong)} cannot be split so: "
                f"give {_one_of(divisors(math.gcd(*sizes.values())))}"
            )

    def check_expert_sharding(self, use_torch_fsdp2: bool) -> None:
        """Raise UserError where ranks are to share experts, and fully sharded weights do that already."""
        shares = self.expert_size > 1 or self.expert_tensor_size != self.tensor_model_parallel_size
        if shares and use_torch_fsdp2:
            raise UserError(
                "--use-torch-fsdp2 shards experts as it shards all else: leave out --expert-model-parallel-size, "
                "--expert-tensor-parallel-size and --moe-tp-extend-ep"
            )

    def _check_experts(self, experts: Experts | None, describe: Describe) -> None:
        ep, etp, tp = self.expert_model_parallel_size, self.expert_tensor_parallel_size, self.tensor_model_parallel_size
        shared, extends = describe("expert_model_parallel_size", ep), describe("moe_tp_extend_ep", True)
        if etp not in (None, 1, tp):
            same = describe("tensor_model_parallel_size", None)
            raise UserError(f"{describe('expert_tensor_parallel_size', etp)}: expected 1, or {tp} as {same}")
        if self.moe_tp_extend_ep and etp not in (None, 1):
            whole = describe("expert_tensor_parallel_size", 1)
            raise UserError(f"{extends} leaves experts whole: give {whole}, or leave it out")
        if experts is None:
            if given := [*([shared] if ep > 1 else []), *([extends] if self.moe_tp_extend_ep else [])]:
                raise UserError(f"{' '.join(given)}: the model has no experts: leave it out")
            return
        total, by_tensor_ranks = experts.num_experts, tp if self.moe_tp_extend_ep else 1
        if total % self.expert_size:
            fitting = _one_of(divisors(total // by_tensor_ranks)) if total % by_tensor_ranks == 0 else ""
            raise UserError(
                f"{shared}: the model's {total} experts do not divide over "
                f"{f'{tp} tensor ranks x ' if self.moe_tp_extend_ep else ''}{ep} ranks: "
                f"{f'give {fitting}' if fitting else f'leave out {extends}'}"
            )
        if experts.moe_ffn_hidden_size % self.expert_tensor_size:
            raise UserError(
                f"the model's moe_ffn_hidden_size {experts.moe_ffn_hidden_size} cannot be split over "
                f"{self.expert_tensor_size} ranks: give {describe('expert_tensor_parallel_size', 1)}"
            )


def divisors(number: int) -> list[int]:
    """
    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _one_of(numbers: Sequence[int]) -> str:
    """
    >>> _one_of([1, 2, 4])
    '1, 2 or 4'
    """
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _comma_separated(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _interleaved(counts: tuple[int, ...], stages: int) -> list[list[range]]:
    """[stage][chunk] -> range of slots, when chunks of `counts` layers go to the stages in turn.

    >>> _interleaved((1, 2, 1, 2), 2)
    [[range(0, 1), range(3, 4)], [range(1, 3), range(4, 6)]]
    """
    ends = list(itertools.accumulate(counts))
    ranges = [range(end - count, end) for count, end in zip(counts, ends)]
    return [ranges[stage::stages] for stage in range(stages)]


@dataclass(frozen=True)
class Shard:
    """The part of one global tensor that one rank holds.

    `local_name` is its name on the rank: there, layer numbers count inside the chunk. Of a tensor of experts,
    `expert_rank` tells which experts it has, and `tensor_rank` which slice of each.
    """

    spec: TensorSpec
    local_name: str
    tensor_rank: int
    pipeline_rank: int
    chunk: int
    part: Part
    expert_rank: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    @property
    def is_copy(self) -> bool:
        """The last stage's copy of a tied embedding."""
        return self.spec.name == EMBEDDING and self.local_name == OUTPUT


@dataclass(frozen=True)
class RankFile:
    """A rank of a pipeline stage that has a file of its own in Megatron's checkpoints.

    Attributes:
        tensor, expert: the numbers in the name of its folder.
        slice_of_experts, experts: its `Shard.tensor_rank` and `Shard.expert_rank` for tensors of experts.
    """

    tensor: int
    expert: int
    slice_of_experts: int
    experts: int

    def holds(self, shard: Shard) -> bool:
        if shard.spec.split.experts:
            return (shard.tensor_rank, shard.expert_rank) == (self.slice_of_experts, self.experts)
        return shard.tensor_rank == self.tensor


def rank_files(layout: Layout) -> list[RankFile]:
    """The files of one stage. Ranks with the same folder hold the same.

    >>> whole = Layout(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1)
    >>> [(file.tensor, file.expert) for file in rank_files(whole)]
    [(0, 0), (1, 1), (0, 2), (1, 3)]
    """
    tensor, cut, shared = layout.tensor_model_parallel_size, layout.expert_tensor_size, layout.expert_size
    files = []
    for rank in range(math.lcm(tensor, cut * shared)):
        experts = rank // cut % shared
        folder = experts // tensor if layout.moe_tp_extend_ep else experts
        files.append(RankFile(rank % tensor, folder, rank % cut, experts))
    return files


def part_of(spec: TensorSpec, world: int, rank: int) -> Part:
    """The part of `spec` that tensor rank `rank` of `world` holds."""
    whole = Part.whole(spec.shape)
    dim = spec.split.dim
    if dim is None:
        return whole
    (full,) = whole.boxes
    ranges = spec.split.ranges(spec.shape[dim], world, rank)
    return Part(tuple((*full[:dim], cut, *full[dim + 1 :]) for cut in ranges), dim)


def even_rows(rows: int, world: int, rank: int) -> tuple[int, int]:
    """The half-open range of `rows` that `rank` of `world` keeps when state is sharded by rows.

    Chunks are of equal size, and the last ones shorter or empty: the rule of `torch.chunk` and of `fully_shard`.

    >>> [even_rows(10, 4, rank) for rank in range(4)]
    [(0, 3), (3, 6), (6, 9), (9, 10)]
    """
    step = -(-rows // world)
    return min(rank * step, rows), min((rank + 1) * step, rows)


def parse_layers(flag: str, text: str | None) -> tuple[int, ...] | None:
    """Numbers separated by commas, as `--num-layer-list` and `--noop-layers` take them; None for None.

    >>> parse_layers("--num-layer-list", "10,18")
    (10, 18)
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text!r}: expected numbers separated by commas, such as 4,4") from None


def shards(config: ModelConfig, layout: Layout, *, tied_head_copy: bool, first_ranks_only: bool = False) -> list[Shard]:
    """Every shard of every rank, in the tensor table's order; or only those of the first rank of each stage.

    With `tied_head_copy`, tied embeddings and several stages, the last stage also gets its copy of the embedding, named
    `output_layer.weight`, as Megatron stores it.
    """
    layout.check(config)
    stages = layout.stages(config.num_layers)
    home = {
        slot.layer: (stage, chunk, slot.local)
        for stage, chunks in enumerate(stages)
        for chunk, slots in enumerate(chunks)
        for slot in slots
    }
    last = (len(stages) - 1, len(stages[-1]) - 1)
    result: list[Shard] = []
    for spec in tensor_table(config).values():
        if spec.layer is None:
            homes = [(*(last if spec.name in (FINAL_NORM, OUTPUT) else (0, 0)), spec.name)]
        else:
            stage, chunk, local = home[spec.layer]
            homes = [(stage, chunk, layer_prefix(local) + spec.name.removeprefix(layer_prefix(spec.layer)))]
        if spec.name == EMBEDDING and config.tied and tied_head_copy and len(stages) > 1:
            homes.append((*last, OUTPUT))
        for stage, chunk, local_name in homes:
            for rank, expert_rank, part in itertools.islice(_parts(spec, layout), 1 if first_ranks_only else None):
                result.append(Shard(spec, local_name, rank, stage, chunk, part, expert_rank))
    return result


def _parts(spec: TensorSpec, layout: Layout) -> Iterator[tuple[int, int, Part]]:
    """Tensor rank, expert rank and part, of all ranks of a stage that hold different ones, from the first rank on."""
    if not spec.split.experts:
        for rank in range(layout.tensor_model_parallel_size):
            yield rank, 0, part_of(spec, layout.tensor_model_parallel_size, rank)
        return
    for expert_rank in range(layout.expert_size):
        for rank in range(layout.expert_tensor_size):
            yield rank, expert_rank, _part_of_experts(spec, layout, rank, expert_rank)


def _part_of_experts(spec: TensorSpec, layout: Layout, tensor_rank: int, expert_rank: int) -> Part:
    """The rows of some consecutive experts, and of each the slice of a tensor rank."""
    rows, split, world = spec.shape[0] // spec.split.experts, spec.split, layout.expert_tensor_size
    count = split.experts // layout.expert_size
    first, last = expert_rank * count * rows, (expert_rank + 1) * count * rows
    if split.dim == 0 and world > 1:
        cuts = split.ranges(rows, world, tensor_rank)
        boxes = [(start + low, start + high) for start in range(first, last, rows) for low, high in cuts]
        return Part(tuple((box, *((0, size) for size in spec.shape[1:])) for box in boxes))
    columns = [(0, size) for size in spec.shape[1:]]
    if split.dim == 1:
        ((low, high),) = split.ranges(spec.shape[1], world, tensor_rank)
        columns[0] = (low, high)
    return Part((((first, last), *columns),), split.dim or 0)
