"""Hugging Face names <-> Megatron-core names, and which rows of one tensor are which rows of the other.

A row of the table names one mcore tensor and the Hugging Face tensors that it is made of. For each of these it says
which rows of the mcore tensor they are. Both directions follow from that. Numbers are moved, never computed. A family
is a table of such rows; `WeightMap` repeats it for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.models.config import ModelConfig
from tandem.models.rows import Ranges, Rename, Row, Shape
from tandem.models.tensors import EMBEDDING, FINAL_NORM, OUTPUT, layer_prefix, tensor_table

OUTSIDE_LAYERS: tuple[Row, ...] = (
    Rename(EMBEDDING, "model.embed_tokens.weight"),
    Rename(FINAL_NORM, "model.norm.weight"),
    Rename(OUTPUT, "lm_head.weight"),
)

LM_HEAD = "lm_head.weight"
HF_EMBEDDING = "model.embed_tokens.weight"


class WeightMap:
    """The whole model's map, in the tensor table's order. Adapters are not part of it.

    Attributes:
        rows: mcore name -> Hugging Face name -> the ranges of the mcore tensor's rows that make up that tensor.
    """

    def __init__(self, config: ModelConfig) -> None:
        layer_rows = [{row.mcore: row for row in config.layer_rows(layer)} for layer in range(config.num_layers)]
        outside = {row.mcore: row for row in OUTSIDE_LAYERS}
        self._table = tensor_table(config.without_adapters)
        self.rows: dict[str, dict[str, Ranges]] = {}
        for name, spec in self._table.items():
            if spec.layer is None:
                row, prefix = outside[name], ""
            else:
                row, prefix = (
                    layer_rows[spec.layer][name.removeprefix(layer_prefix(spec.layer))],
                    f"model.layers.{spec.layer}.",
                )
            hf = (prefix + part for part in row.hf)
            self.rows[name] = dict(zip(hf, row.ranges(spec.shape[0], config), strict=True))

    def hf_shapes(self) -> dict[str, Shape]:
        """Every Hugging Face tensor that the config implies, with its shape; no `lm_head` when tied."""
        return {
            hf: (sum(stop - start for start, stop in ranges), *self._table[name].shape[1:])
            for name, hf_tensors in self.rows.items()
            for hf, ranges in hf_tensors.items()
        }

    def to_hf(self, name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """The Hugging Face tensors that an mcore tensor is made of. They are views where their rows lie together."""
        return {hf: _stack([tensor[start:stop] for start, stop in ranges]) for hf, ranges in self.rows[name].items()}

    def to_mcore(self, name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `to_hf`: an mcore tensor from its `parts`, in the order of `rows[name]`."""
        pieces: dict[int, np.ndarray] = {}
        for part, ranges in zip(parts, self.rows[name].values(), strict=True):
            ends = np.cumsum([stop - start for start, stop in ranges])[:-1]
            pieces.update(zip((start for start, _ in ranges), np.split(part, ends)))
        return _stack([pieces[start] for start in sorted(pieces)])


def _stack(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
