"""How Megatron's files hold the experts of a rank, in each of its three layouts.

A rank's part of a table's tensor is a stack: expert after expert, the rows that each has alone. The files hold

- sequential: `mlp.experts.local_experts.J.linear_fc1.weight`, a tensor for each expert; so are its adapters,
  `mlp.experts.local_experts.J.linear_fc1.lora_A.default.weight`;
- Transformer Engine's: `mlp.experts.linear_fc1.weightJ`, the same under another name;
- grouped: `mlp.experts.weight1`, all of them in one tensor. Its numbers are each expert's matrix, transposed, one after
  the other. The shape that Megatron gives it, [hidden, all columns], does not follow from that, and means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tandem.checkpoints.formats.torch_reader import LazyTensor
from tandem.errors import UserError
from tandem.models.families import EXPERTS_FC1, EXPERTS_FC2

Form = Literal["sequential", "grouped", "transformer_engine"]
SEQUENTIAL = re.compile(r"(.*)\.local_experts\.(\d+)\.(linear_fc[12]\.(?:lora_[AB]\.default\.)?weight)")
GROUPED = {"weight1": "linear_fc1.weight", "weight2": "linear_fc2.weight"}
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

    def read(self, name: str) -> np.ndarray:
        if self.columns is None:
            return np.concatenate([part.read(name) for part in self.parts])
        values = self.parts[0].read(name).reshape(self.experts, self.columns, -1)
        return np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(self.shape)


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
            rest[f"{stem}.experts.{GROUPED[last]}"] = _grouped(tensor, last, hidden, held)
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


def _grouped(tensor: LazyTensor, name: str, hidden: int, held: int) -> Stack:
    """`weight1` is made of [hidden, 2 width] for each expert, `weight2` of [width, hidden]."""
    numbers = tensor.shape[0] * tensor.shape[1]
    return Stack((tensor,), held, hidden if name == "weight1" else numbers // (held * hidden))


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
