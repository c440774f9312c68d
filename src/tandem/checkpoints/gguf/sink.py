"""Writing a GGUF file, rows after rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.gguf.encoding import Encoding, Stored
from tandem.checkpoints.gguf.library import gguf
from tandem.checkpoints.gguf.tensors import ROPE_FACTORS, architecture, reordered, rope_factors, stored_tensors
from tandem.checkpoints.interface import RowsWritten, TensorKind
from tandem.errors import UserError
from tandem.files.publish import check_free_space, final_place
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.models.weight_map import WeightMap

ROOM_FOR_FIELDS = 64 << 20  # bytes: vocabularies of 250,000 tokens take less


class GGUFSink:
    """A GGUF file. It lies in a folder that is not yet published: who made that removes it when writing fails.

    Tensors must come in the tensor table's order. Those that Hugging Face has whole are written as their rows come.

    Args:
        set_fields: tells a `gguf.GGUFWriter` what the file says besides the tensors.
    """

    def __init__(self, path: Path, config: ModelConfig, encoding: Encoding, set_fields: Callable[[Any], None]) -> None:
        self.path, self.location = path, str(path)
        self._config, self._table, self._map = config, tensor_table(config), WeightMap(config)
        self._stored = stored_tensors(config, encoding)
        check_free_space(path, sum(stored.nbytes for stored in self._stored.values()) + ROOM_FOR_FIELDS)
        self._names, self._written = list(self._table), 0
        self._rows, self._blocks = RowsWritten(), list[np.ndarray]()
        self._writer = gguf().GGUFWriter(path, gguf().MODEL_ARCH_NAMES[architecture(config)])
        set_fields(self._writer)
        self._begin()

    def write(self, name: str, rows: np.ndarray, kind: TensorKind = "model") -> None:
        assert kind == "model", f"a GGUF file holds no {kind}"
        assert name == self._names[self._written], f"{name} written where {self._names[self._written]} was due"
        shape = self._table[name].shape
        written = self._rows.add(name, rows, shape)
        is_whole = written.stop == shape[0]
        parts = list(self._map.rows[name])
        if len(parts) == 1:
            self._append(self._stored[parts[0]], rows, is_last=is_whole)
        else:
            self._blocks.append(rows)  # rows of several tensors take turns in it
            if is_whole:
                for hf_name, part in self._map.to_hf(name, np.concatenate(self._blocks)).items():
                    self._append(self._stored[hf_name], reordered(self._config, hf_name, part), is_last=True)
                self._blocks.clear()
        self._written += is_whole

    def close(self) -> None:
        if self._written != len(self._names):
            raise UserError(f"{final_place(self.path)}: {self._names[self._written]} was never written")
        self._writer.close()

    def abort(self) -> None:
        self._writer.close()
        self.path.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Write everything that comes before the tensors."""
        factors = rope_factors(self._config)
        extra = [] if factors is None else [Stored(ROPE_FACTORS, factors.shape, "F32")]
        for stored in [*extra, *self._stored.values()]:
            self._writer.add_tensor_info(
                stored.name, stored.shape, np.dtype(np.float32), stored.nbytes, raw_dtype=stored.type
            )
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        (self._file,) = self._writer.fout
        self._pad()
        if factors is not None:
            self._append(extra[0], factors, is_last=True)

    def _append(self, stored: Stored, rows: np.ndarray, is_last: bool) -> None:
        """Write the next rows of a tensor. After the last ones the next tensor's place begins."""
        self._file.write(stored.encode(rows, self.location).data)
        if is_last:
            self._pad()

    def _pad(self) -> None:
        self._writer.write_padding(self._file, self._file.tell())
