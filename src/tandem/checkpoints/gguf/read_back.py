"""Comparing a GGUF file, as `gguf`'s own reader reads it, with the weights that it was made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tandem.checkpoints.gguf.encoding import Encoding, largest_error
from tandem.checkpoints.gguf.library import gguf
from tandem.checkpoints.gguf.tensors import NEIGHBOURS, ROPE_FACTORS, ROTATED, rope_factors, stored_tensors
from tandem.checkpoints.interface import TensorSource
from tandem.errors import UserError
from tandem.files.publish import final_place
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.models.weight_map import WeightMap


def read_back(path: Path, source: TensorSource, encoding: Encoding) -> tuple[int, float]:
    """Compare every tensor of the file with the source's, one at a time.

    Returns:
        How many tensors there are, and the largest difference of two numbers.

    Raises:
        UserError: a tensor is missing, surplus, of another shape or encoding, or differs by more than its encoding
            rounds.
    """
    config, where = source.config, final_place(path)
    found = {tensor.name: tensor for tensor in gguf().GGUFReader(path).tensors}
    stored = stored_tensors(config, encoding)
    expected = {tensor.name for tensor in stored.values()}
    if (factors := rope_factors(config)) is not None:
        expected.add(ROPE_FACTORS)
        if not np.array_equal(found[ROPE_FACTORS].data, factors):
            raise UserError(f"{where}: {ROPE_FACTORS} does not hold the rotary scaling of {source.location}")
    if found.keys() != expected:
        raise UserError(f"{where}: tensors differ from the model's: {sorted(found.keys() ^ expected)}")
    weight_map, largest = WeightMap(config), 0.0
    for name in tensor_table(config):
        for hf_name, original in weight_map.to_hf(name, source.read(name)).items():
            tensor = stored[hf_name]
            read = found[tensor.name]
            if read.tensor_type != tensor.type or tuple(reversed(read.shape.tolist())) != tensor.shape:
                raise UserError(f"{where}: {tensor.name} is {read.tensor_type.name} {read.shape.tolist()}")
            difference = _difference(config, hf_name, original.astype(np.float32), tensor.decode(read.data), read)
            if difference is None:
                raise UserError(f"{where}: {tensor.name} does not hold the numbers of {source.location}")
            largest = max(largest, difference)
    return len(found), largest


def _difference(
    config: ModelConfig, hf_name: str, original: np.ndarray, numbers: np.ndarray, read: object
) -> float | None:
    """The largest difference; None when one is larger than rounding explains."""
    encoding = read.tensor_type.name  # type: ignore[attr-defined]
    if config.model_type in NEIGHBOURS and ROTATED.search(hf_name):
        # llama.cpp's row r of a head is Hugging Face's row r // 2 of its first half, or of its second where r is odd
        head = config.kv_channels
        rows = np.arange(len(original))
        within = rows % head
        original = original[rows - within + within // 2 + within % 2 * (head // 2)]
    error = np.abs(numbers - original)
    return float(error.max()) if bool((error <= largest_error(encoding, original)).all()) else None
