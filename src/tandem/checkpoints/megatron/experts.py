"""How Megatron's files hold the experts of a rank, in each of its three layouts.

A rank's part of a table's tensor is a stack: expert after expert, the rows that each has alone. The files hold

- sequential: `mlp.experts.local_experts.J.linear_fc1.weight`, a tensor for each expert; so are its adapters,
  `mlp.experts.local_experts.J.linear_fc1.lora_A.default.weight`;
- Transformer Engine's: `mlp.experts.linear_fc1.weightJ`, the same under another name;
- grouped: `mlp.experts.weight1`, all of them in one tensor. Its numbers are each expert's matrix, transposed, one after
  the other. The shape that Megatron gives it, [hidden, all columns], does not follow from that, and means nothing.
  MindSpeed-LLM holds their adapters alike: `mlp.experts.weight1_lora_a`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tandem.checkpoints.formats.arrays import transposed
from tandem.checkpoints.formats.rows import Rows
from tandem.checkpoints.formats.torch_reader import LazyTensor
from tandem.errors import UserError
from tandem.models.families import EXPERTS_FC1, EXPERTS_FC2

Form = Literal["sequential", "grouped", "transformer_engine"]
SEQUENTIAL = re.compile(r"(.*)\.local_experts\.(\d+)\.(linear_fc[12]\.(?:lora_[AB]\.default\.)?weight)")
GROUPED = {
    "weight1": "linear_fc1.weight",
    "weight2": "linear_fc2.weight",
    "weight1_lora_a": "linear_fc1.lora_A.default.weight",
    "weight1_lora_b": "linear_fc1.lora_B.default.weight",
    "weight2_lora_a": "linear_fc2.lora_A.default.weight",
    "weight2_lora_b": "linear_fc2.lora_B.default.weight",
}
TRANSFORMER_ENGINE = re.compile(r"(.*\.experts\.linear_fc[12]\.weight)(\d+)")


def is_of_experts(name: str) -> bool:
    return name.endswith((EXPERTS_FC1, EXPERTS_FC2))


@dataclass(frozen=True)
class Stack:
    """A rank's experts in a file, as one tensor of the layout.

    Attributes:
        parts: their tensors, in order; of the grouped form, the one that has them all.
        experts: how many there are.
        columns: of the stack, where the grouped form has all experts in one tensor; None for the other forms.
    """

    parts: tuple[LazyTensor, ...]
    experts: int
    columns: int | None = None

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        if self.columns is not None:
            total = self.parts[0].shape[0] * self.parts[0].shape[1]
            return total // self.columns, self.columns
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def rows(self, name: str) -> Rows:
        """Its rows, as they are asked for. One expert at a time is in memory, and one that is read ahead."""
        if self.columns is None:
            return _RowsOfEach(self, name)
        return _RowsOfAll(self, name)


class _RowsOfEach:
    """Rows of experts that are tensors of their own. Those of which nothing is asked for are not read."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._parts, self._name = stack.parts, name
        self._size = stack.shape[0] // stack.experts
        self._open: tuple[int, Rows] | None = None  # the number of the expert that is read, and its rows

    def read(self, first: int, last: int) -> np.ndarray:
        pieces = [self._rows(expert).read(low, high) for expert, low, high in _of_experts(first, last, self._size)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _rows(self, expert: int) -> Rows:
        if self._open is None or self._open[0] != expert:
            self.close()
            self._open = expert, self._parts[expert].rows(self._name)
        return self._open[1]


class _RowsOfAll:
    """Rows of experts that are one tensor, in which the matrix of each is transposed.

    To read and to transpose takes as long as to write elsewhere. So a thread does it for the next expert meanwhile.
    """

    def __init__(self, stack: Stack, name: str) -> None:
        assert stack.columns is not None
        self._size, self._experts = stack.shape[0] // stack.experts, stack.experts
        self._stored = stack.parts[0].rows(name, (stack.experts, stack.columns, self._size))
        self._open: tuple[int, np.ndarray] | None = None  # the number of the expert that is read, and its matrix
        self._next: tuple[int, Future[np.ndarray]] | None = None
        self._thread = ThreadPoolExecutor(1, "tandem-experts")

    def read(self, first: int, last: int) -> np.ndarray:
        pieces = [self._matrix(expert)[low:high] for expert, low, high in _of_experts(first, last, self._size)]
        if last % self._size == 0:
            self._open = None  # there may be a hundred ranks, each with an expert that was read to its end
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def close(self) -> None:
        self._open = self._next = None
        self._thread.shutdown(cancel_futures=True)
        self._stored.close()

    def _matrix(self, expert: int) -> np.ndarray:
        if self._open is None or self._open[0] != expert:
            self._open = None
            if self._next is None or self._next[0] != expert:
                self._begin(expert)
            assert self._next is not None
            self._open = expert, self._next[1].result()
            self._next = None
            if expert + 1 < self._experts:
                self._begin(expert + 1)
        return self._open[1]

    def _begin(self, expert: int) -> None:
        self._next = expert, self._thread.submit(lambda: transposed(self._stored.read(expert, expert + 1)[0]))


def _of_experts(first: int, last: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Of rows `first` to `last` of a stack, with `size` rows an expert: each expert, and its own rows.

    >>> list(_of_experts(1, 6, 4))
    [(0, 1, 4), (1, 0, 2)]
    """
    for expert in range(first // size, -(-last // size)):
        start = expert * size
        yield expert, max(first - start, 0), min(last - start, size)


def stacked(chunk: dict[str, LazyTensor | Stack], hidden: int, held: int, where: str) -> dict[str, LazyTensor | Stack]:
    """A file's tensors with those of experts as stacks, under the layout's names.

    Args:
        hidden: the model's hidden size.
        held: how many experts the rank has.

    Raises:
        UserError: an expert is missing, or there are too many.
    """
    rest: dict[str, LazyTensor | Stack] = {}
    single: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in chunk.items():
        assert isinstance(tensor, LazyTensor)
        stem, _, last = name.rpartition(".experts.")
        if stem and last in GROUPED:
            rest[f"{stem}.experts.{GROUPED[last]}"] = _grouped(tensor, name, hidden, held, where)
        elif match := SEQUENTIAL.fullmatch(name):
            single.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
        elif match := TRANSFORMER_ENGINE.fullmatch(name):
            single.setdefault(match[1], {})[int(match[2])] = tensor
        else:
            rest[name] = tensor
    for name, tensors in single.items():
        if sorted(tensors) != list(range(held)):
            raise UserError(
                f"{where}: {name} is there for the experts {', '.join(map(str, sorted(tensors)))}; expected {held} of "
                f"them, from 0"
            )
        rest[name] = Stack(tuple(tensors[expert] for expert in range(held)), held)
    return rest


def _grouped(tensor: LazyTensor, name: str, hidden: int, held: int, where: str) -> Stack:
    """The experts of one tensor. Each has numbers of a matrix that is transposed in the stack.

    `weight1` is made of [hidden, 2 width], and `weight2` of [width, hidden]. The first factors of their adapters are
    made of [inputs, rank], and the second ones of [rank, outputs].
    """
    if len(tensor.shape) != 2:
        raise UserError(f"{where}: {name} has shape {list(tensor.shape)}; expected two dimensions")
    rows, last = tensor.shape[0], name.rpartition(".")[2]
    columns = {
        "weight1": hidden,
        "weight2": rows * tensor.shape[1] // (held * hidden),
        "weight1_lora_a": hidden,
        "weight1_lora_b": rows,
        "weight2_lora_a": rows // held,
        "weight2_lora_b": rows // held,
    }[last]
    if not columns or rows * tensor.shape[1] % (columns * held):
        raise UserError(f"{where}: {name} has shape {list(tensor.shape)}, which {held} experts cannot share evenly")
    return Stack((tensor,), held, columns)


def names_of(name: str, form: Form, held: int) -> list[str]:
    """The names in a file of a stack: one for each expert, or one for all.

    >>> names_of("decoder.layers.0.mlp.experts.linear_fc2.weight", "grouped", 2)
    ['decoder.layers.0.mlp.experts.weight2']
    >>> names_of("decoder.layers.0.mlp.experts.linear_fc1.weight", "transformer_engine", 2)[1]
    'decoder.layers.0.mlp.experts.linear_fc1.weight1'
    """
    stem, _, last = name.rpartition(".experts.")
    if form == "grouped":
        (new,) = (new for new, old in GROUPED.items() if old == last)
        return [f"{stem}.experts.{new}"]
    if form == "transformer_engine":
        return [f"{name}{expert}" for expert in range(held)]
    return [f"{stem}.experts.local_experts.{expert}.{last}" for expert in range(held)]


def shapes_of(name: str, form: Form, held: int, shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The shapes in a file of a stack of `shape`, in the order of `names_of`."""
    rows, columns = shape
    if form != "grouped":
        return [(rows // held, columns)] * held
    if name.endswith(EXPERTS_FC1):
        return [(columns, rows)]  # [hidden, experts x 2 width]
    return [(held * columns, rows // held)]  # [experts x width, hidden]
