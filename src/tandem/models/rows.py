"""A row of the weight map: one mcore tensor, and the Hugging Face tensors that it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

Shape = tuple[int, ...]
# Half-open ranges of the first dimension.
Ranges = tuple[tuple[int, int], ...]


class Heads(Protocol):
    """What rows need to know of a model: `tandem.models.config.ModelConfig`."""

    @property
    def num_query_groups(self) -> int: ...

    @property
    def kv_channels(self) -> int: ...


class Row(Protocol):
    """One mcore tensor and the Hugging Face tensors it is made of."""

    @property
    def mcore(self) -> str: ...

    @property
    def hf(self) -> tuple[str, ...]: ...

    def ranges(self, rows: int, heads: Heads) -> tuple[Ranges, ...]:
        """For each Hugging Face tensor: which of the mcore tensor's `rows` rows it is made of, in order."""
        ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    mcore: str
    source: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.source,)

    def ranges(self, rows: int, heads: Heads) -> tuple[Ranges, ...]:
        return (((0, rows),),)


@dataclass(frozen=True)
class GroupedQKV:
    """q [A*D, h], k [G*D, h], v [G*D, h] <-> [(A+2G)*D, h], group after group: its A/G queries, its key, its value.

    With 4 query heads and 2 groups of one channel, the rows are: q0 q1 k0 v0, then q2 q3 k1 v1.

    >>> from types import SimpleNamespace
    >>> heads = SimpleNamespace(num_query_groups=2, kv_channels=1)
    >>> GroupedQKV("linear_qkv", q="q_proj", k="k_proj", v="v_proj").ranges(8, heads)
    (((0, 2), (4, 6)), ((2, 3), (6, 7)), ((3, 4), (7, 8)))
    """

    mcore: str
    q: str
    k: str
    v: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v)

    def ranges(self, rows: int, heads: Heads) -> tuple[Ranges, ...]:
        size = rows // heads.num_query_groups
        key, value = size - 2 * heads.kv_channels, size - heads.kv_channels
        groups = range(0, rows, size)
        return tuple(
            tuple((group + start, group + stop) for group in groups)
            for start, stop in ((0, key), (key, value), (value, size))
        )


@dataclass(frozen=True)
class PerExpert:
    """One mcore tensor that holds the tensors of all experts, one below the other.

    Names of `of` have {} for the expert's number. `parameter` is what transformers 5 calls all of them, as one tensor.

    >>> row = PerExpert("linear_fc1", GateUp("", gate="{}.gate", up="{}.up"), experts=2, parameter="gate_up")
    >>> row.hf, row.ranges(8, None)
    (('0.gate', '0.up', '1.gate', '1.up'), (((0, 2),), ((2, 4),), ((4, 6),), ((6, 8),)))
    """

    mcore: str
    of: Row
    experts: int
    parameter: str

    @property
    def hf(self) -> tuple[str, ...]:
        return tuple(name.format(expert) for expert in range(self.experts) for name in self.of.hf)

    def ranges(self, rows: int, heads: Heads) -> tuple[Ranges, ...]:
        size = rows // self.experts
        return tuple(
            tuple((expert * size + start, expert * size + stop) for start, stop in ranges)
            for expert in range(self.experts)
            for ranges in self.of.ranges(size, heads)
        )


@dataclass(frozen=True)
class GateUp:
    """gate [f, h], up [f, h] <-> [2f, h]: gate above up."""

    mcore: str
    gate: str
    up: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def ranges(self, rows: int, heads: Heads) -> tuple[Ranges, ...]:
        return ((0, rows // 2),), ((rows // 2, rows),)
