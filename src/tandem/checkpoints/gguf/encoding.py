"""How GGUF stores the numbers of a tensor, as llama.cpp's own converter chooses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tandem.checkpoints.formats.arrays import is_finite
from tandem.checkpoints.gguf.library import gguf
from tandem.errors import UserError

Encoding = Literal["f16", "bf16", "q8_0"]
FALLBACK = "F16"  # for matrices whose rows are no whole number of Q8_0's blocks


@dataclass(frozen=True)
class Stored:
    """How one tensor is stored: under which name, in which shape and encoding.

    Attributes:
        name: llama.cpp's.
        shape: in numbers, rows first.
        encoding: a name of `gguf.GGMLQuantizationType`.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str

    @property
    def bytes_per_row(self) -> int:
        block, size = gguf().GGML_QUANT_SIZES[self.type]
        return (self.shape[-1] if len(self.shape) > 1 else 1) * size // block

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.bytes_per_row

    @property
    def type(self) -> Any:
        return gguf().GGMLQuantizationType[self.encoding]

    def encode(self, rows: np.ndarray, where: str) -> np.ndarray:
        """The bytes of some rows.

        Raises:
            UserError: numbers are beyond the encoding's range. `where` is named.
        """
        with np.errstate(over="ignore"):  # reported below, with the tensor's name
            encoded: np.ndarray = gguf().quantize(np.ascontiguousarray(rows, np.float32), self.type)
        if self.encoding == "F16" and not is_finite(encoded):
            raise UserError(f"{where}: tensor {self.name} holds numbers beyond the range of float16: use --gguf bf16")
        return encoded.reshape(-1).view(np.uint8)

    def decode(self, data: np.ndarray) -> np.ndarray:
        """The numbers, fp32, of what `gguf`'s reader found."""
        numbers: np.ndarray = gguf().dequantize(data, self.type)
        return numbers


def stored_as(name: str, shape: tuple[int, ...], encoding: Encoding) -> Stored:
    """Vectors, as those of norms and biases, stay in fp32. All matrices have the encoding."""
    if len(shape) == 1:
        return Stored(name, shape, "F32")
    chosen = encoding.upper()
    block = gguf().GGML_QUANT_SIZES[gguf().GGMLQuantizationType[chosen]][0]
    return Stored(name, shape, chosen if shape[-1] % block == 0 else FALLBACK)


def largest_error(encoding: str, numbers: np.ndarray) -> np.ndarray:
    """How far a stored number may be from each of `numbers` [..., columns], when all went well.

    F16 and BF16 round to the nearest. Q8_0 keeps a scale in F16 for 32 numbers, and a whole number of -127 to 127 for
    each.
    """
    size = np.abs(numbers)
    if encoding == "F32":
        return np.zeros_like(size)
    if encoding != "Q8_0":
        bits, smallest = (11, 2.0**-25) if encoding == "F16" else (8, 2.0**-134)
        return size * 2.0**-bits + smallest
    largest = size.reshape(*size.shape[:-1], -1, 32).max(axis=-1, keepdims=True)
    step = largest / 127
    bound = np.broadcast_to(step / 2 + largest * 2.0**-11 + 127 * 2.0**-25, (*largest.shape[:-1], 32))
    return bound.reshape(size.shape)
