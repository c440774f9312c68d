"""Weights with adapters next to them, and with adapters merged into them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np

from tandem.checkpoints.adapters.base import BaseRecord
from tandem.checkpoints.formats.arrays import is_finite
from tandem.checkpoints.formats.rows import of_rows
from tandem.checkpoints.interface import TensorKind, TensorSource
from tandem.checkpoints.views import View
from tandem.errors import UserError
from tandem.models.adapters import Adapter, adapters
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.parallel.slices import Part, cut, cut_rows


class Adapted(View):
    """Adapters from one source, and the weights that they change from another.

    Args:
        adapters: its config has the adapters. It need not hold the weights.
        base: the weights.
        follows: which of the two a run goes on from: its documents, folder and iteration are this source's.
        record: the weights that the adapters were trained on. `base` is compared with it before its first tensor is
            read, which takes seconds for large models; None for no comparison.

    Raises:
        UserError: the two are of different models; on reading, `base` is not what was recorded.
    """

    base: TensorSource
    adapters: TensorSource

    def __init__(
        self,
        adapters: TensorSource,
        base: TensorSource,
        follows: TensorSource,
        record: BaseRecord | None = None,
    ) -> None:
        super().__init__(follows)
        if base.config != adapters.config.without_adapters:
            raise UserError(
                f"{adapters.location}: its adapters are for another model than that of {base.location}: "
                f"{_difference(adapters.config.without_adapters, base.config)}. Give the model that they were trained "
                f"on with --load"
            )
        self.config = adapters.config
        self.companions = follows.companions if follows.companions.hf_config else base.companions
        self.base, self.adapters = base, adapters
        self.notices = tuple(dict.fromkeys((*base.notices, *adapters.notices)))
        self._is_run = follows is adapters
        self._table = tensor_table(self.config)
        self.record, self._is_checked, self._checking = record, record is None, threading.Lock()

    def of(self, source: TensorSource) -> Adapted:
        if self._is_run:
            return Adapted(source, self.base, source, self.record)
        return Adapted(self.adapters, source, source, self.record)

    def check_base(self) -> None:
        with self._checking:
            if self.record is not None and not self._is_checked:
                self.record.check(self.base, self.adapters.location)
            self._is_checked = True

    def trust_base(self) -> None:
        self._is_checked = True

    def kinds(self) -> tuple[TensorKind, ...]:
        return self.adapters.kinds()

    def kinds_of(self, name: str) -> tuple[TensorKind, ...]:
        return (self.base if self._table[name].adapter is None else self.adapters).kinds_of(name)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return (self.base if self._table[name].adapter is None else self.adapters).dtype(name, kind)

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return self._holder(name).read(name, kind)

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return self._holder(name).read_part(name, part, kind)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        return self._holder(name).stream(name, part, kind)

    def _holder(self, name: str) -> TensorSource:
        if self._table[name].adapter is not None:
            return self.adapters
        self.check_base()
        return self.base


def _difference(trained_on: ModelConfig, base: ModelConfig) -> str:
    """The first tensor that is another one, with both shapes; of equal tensors the fields, with both values."""
    theirs, here = tensor_table(trained_on), tensor_table(base)
    for name in (*theirs, *here):
        shapes = [list(table[name].shape) if name in table else None for table in (theirs, here)]
        if shapes[0] != shapes[1]:
            was, now = ("absent" if shape is None else str(shape) for shape in shapes)
            return f"{name} is {was} in theirs and {now} here"
    ours, other = trained_on.to_dict(), base.to_dict()
    fields = [name for name in (*ours, *other) if ours.get(name) != other.get(name)]
    texts = (f"{name} is {ours.get(name)} in theirs and {other.get(name)} here" for name in dict.fromkeys(fields))
    return "; ".join(texts)


def merged(source: TensorSource) -> TensorSource:
    """`source` with its adapters merged into its weights; `source` itself when it has none.

    Raises:
        UserError: the adapters change nothing, because no training has changed them.
    """
    if source.config.lora is None:
        return source
    factors = [spec.adapter.b for spec in tensor_table(source.config).values() if spec.adapter is not None]
    if not source.config.lora.use_dora and not any(source.read(name).any() for name in dict.fromkeys(factors)):
        raise UserError(
            f"{source.location}: merging would change nothing: every B of its adapters is zero, as before the first "
            f"training step"
        )
    return Merged(source)


class Merged(View):
    """The weights of a source with adapters, with these added to them.

    A changed weight is W + scale B A, with the product and the sum in fp32, rounded once to the dtype of W. With DoRA
    its rows then get their trained lengths. Other tensors keep their bits.
    """

    def __init__(self, source: TensorSource) -> None:
        super().__init__(source)
        self.config = source.config.without_adapters
        self._lora = source.config.lora
        self._table = tensor_table(self.config)
        self._added: dict[str, list[Adapter]] = {}
        for layer in range(source.config.num_layers):
            for adapter in adapters(source.config, layer):
                self._added.setdefault(adapter.weight, []).append(adapter)

    def of(self, source: TensorSource) -> Merged:
        return Merged(source)

    def kinds(self) -> tuple[TensorKind, ...]:
        return ("model",)

    def kinds_of(self, name: str) -> tuple[TensorKind, ...]:
        return ("model",)

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        if name not in self._added:
            return self._source.read(name)
        values, first = np.empty(self._table[name].shape, self._source.dtype(name)), 0
        for matrix in self._merged(name):
            values[first : first + len(matrix)] = matrix
            first += len(matrix)
        return values

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return cut(self.read(name), part) if name in self._added else self._source.read_part(name, part)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        if name not in self._added:
            yield from self._source.stream(name, part)
            return
        first = 0
        for matrix in self._merged(name):
            if len(rows := cut_rows(matrix, first, part)):
                yield rows
            first += len(matrix)

    def _merged(self, name: str) -> Iterator[np.ndarray]:
        """A weight with its changes, matrix by matrix: there is one for each expert."""
        added = [(adapter, self._fp32(adapter.a), self._fp32(adapter.b)) for adapter in self._added[name]]
        rows, columns = self._table[name].shape
        size = rows // added[0][0].matrices
        blocks = self._source.stream(name, Part.whole((rows, columns)))
        for number, weight in enumerate(of_rows(blocks, size)):
            merged = weight.astype(np.float32)
            for adapter, of_a, of_b in added:
                a, b = (
                    of_matrices.reshape(adapter.matrices, -1, of_matrices.shape[1])[number]
                    for of_matrices in (of_a, of_b)
                )
                change = np.float32(adapter.scale) * (b @ a)
                ranges, first = adapter.ranges(size, self.config), 0
                for start, stop in ranges:
                    merged[start:stop] += change[first : first + stop - start]
                    first += stop - start
                if self._lora is not None and self._lora.use_dora:
                    self._stretch(merged, ranges, self._fp32(adapter.magnitude))
            yield merged.astype(weight.dtype)

    def _fp32(self, name: str) -> np.ndarray:
        kind: TensorKind = "master" if "master" in self._source.kinds_of(name) else "model"
        values = self._source.read(name, kind)
        if not is_finite(values):
            raise UserError(f"{self.location}: its adapter {name} holds NaN or infinity, so nothing can be merged")
        return values.astype(np.float32)

    @staticmethod
    def _stretch(merged: np.ndarray, ranges: tuple[tuple[int, int], ...], magnitude: np.ndarray) -> None:
        """Give rows their trained lengths, in place."""
        first = 0
        for start, stop in ranges:
            rows = merged[start:stop]
            rows *= (magnitude[first : first + stop - start] / np.linalg.norm(rows, axis=1))[:, None]
            first += stop - start
