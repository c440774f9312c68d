"""Adapters of grouped experts as MindSpeed-LLM trains them: where ranks cut an expert, each rank has its own.

A rank adds B_s A_s to its rows of `linear_fc1`, and to its columns of `linear_fc2`. Nothing sums the gradients of a
factor that is as large on all ranks, so their numbers differ after the first step. All the same it is one change of the
whole weight, with a rank that is `ranks` times as large:

- of `linear_fc1`, the A_s stand one below the other, and each B_s has its own rows and columns;
- of `linear_fc2`, each A_s has its own rows and columns, and the B_s stand side by side.

What lies between is zero. Source: MindSpeed-LLM c77308a1, `tasks/posttrain/lora/moe/experts.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tandem.checkpoints.formats.torch_reader import LazyTensor
from tandem.checkpoints.megatron.experts import Stack
from tandem.models.lora import Lora
from tandem.parallel.layout import Shard
from tandem.parallel.slices import Part

OF_EXPERTS = r"experts\.linear_fc[12]"  # the modules, as a pattern of PEFT's


def have_own_factors(factors: Mapping[str, LazyTensor | Stack], ranks: int) -> bool:
    """Whether `ranks` ranks that cut each expert have factors of their own: those of grouped experts."""
    return ranks > 1 and any(isinstance(tensor, Stack) and tensor.columns is not None for tensor in factors.values())


def widened(lora: Lora, ranks: int) -> Lora:
    """Adapters of experts of `ranks` times the rank, with the same scale."""
    return replace(
        lora,
        rank_pattern=((OF_EXPERTS, lora.r * ranks),),
        alpha_pattern=((OF_EXPERTS, lora.lora_alpha * ranks),),
    )


def notice_of(where: str, ranks: int) -> str:
    """What a user should know of adapters whose ranks have factors of their own."""
    return (
        f"{where}: each of {ranks} tensor ranks trained adapters of its own for its slice of an expert; together they "
        f"are read as adapters of {ranks} times the rank and alpha"
    )


def part_of_own_factor(shard: Shard, ranks: int) -> Part:
    """The part of a factor of `ranks` times the rank that a rank's own one is.

    Args:
        shard: of the wide factor, with the number of the rank among those that cut an expert.
    """
    adapter = shard.spec.adapter
    assert adapter is not None
    wide, own = adapter.rank, adapter.rank // ranks
    first = shard.tensor_rank * own
    if shard.spec.name == adapter.b:
        return Part(tuple((rows, (first, first + own)) for rows, _ in shard.part.boxes))
    (((start, stop), columns),) = shard.part.boxes  # all rows of some experts
    return Part(tuple(((row + first, row + first + own), columns) for row in range(start, stop, wide)))


def target_modules(paths: Collection[str], *, has_dense_layers: bool) -> tuple[str, ...]:
    """Megatron's names of the modules at `paths`, which have adapters.

    Experts have some whatever the trainer's flags name. So layers without experts may have none of the same name.

    >>> target_modules(["l.0.mlp.experts.linear_fc1", "l.0.self_attention.linear_proj"], has_dense_layers=True)
    ('experts.linear_fc1', 'linear_proj')
    """
    last = {path: path.rpartition(".")[2] for path in paths}
    dense = {last[path] for path in paths if ".experts." not in path}
    short = set(last.values()) if not has_dense_layers else dense
    return tuple(sorted({name if name in short else f"experts.{name}" for name in last.values()}))
