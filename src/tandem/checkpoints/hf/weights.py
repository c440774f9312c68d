"""The weight files of a Hugging Face folder: safetensors or torch's pickles, single or sharded with an index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from tandem.checkpoints.formats.safetensors import SafetensorsFile
from tandem.checkpoints.formats.torch_reader import LazyTensor, load
from tandem.checkpoints.interface import check_names
from tandem.errors import UserError
from tandem.files.text import read_json
from tandem.parallel.slices import Box, Part, cut

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"


class Entry(Protocol):
    """What a file's header says about a tensor."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class WeightFile(Protocol):
    """A file of named tensors. `partial`: a box of a tensor can be read without the rest of the tensor."""

    path: Path
    partial: bool

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """The tensor, or a box of it."""
        ...


class TorchWeightFile:
    """A `pytorch_model*.bin`. Its pickle is not executed.

    Raises:
        UserError: the file is damaged, asks for code, or holds something other than tensors.
    """

    partial = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = load(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds a {type(content).__name__}; expected a dict of tensors")
        for name, value in content.items():
            if not isinstance(value, LazyTensor):
                raise UserError(f"{path}: {name} is a {type(value).__name__}; expected a tensor")
        self.entries: dict[str, LazyTensor] = content

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """As in `WeightFile`. The whole tensor is read, to check its CRC."""
        tensor = self.entries[name].read(name)
        return tensor if box is None else cut(tensor, Part((box,)))


def holds_weights(folder: Path) -> bool:
    """Whether a folder has weight files of a Hugging Face model, whole or not."""
    named = any((folder / name).exists() for name in (INDEX, SINGLE, TORCH_INDEX, TORCH_SINGLE))
    return named or any(folder.glob("*.safetensors"))


def open_weights(folder: Path) -> dict[str, WeightFile]:
    """Tensor name -> the file that holds it. Safetensors are taken where a folder holds both formats.

    Raises:
        UserError: no weights, an index that is damaged or disagrees with its files, or a file that is missing.
    """
    openers: tuple[tuple[str, str, Callable[[Path], WeightFile]], ...] = (
        (INDEX, SINGLE, SafetensorsFile),
        (TORCH_INDEX, TORCH_SINGLE, TorchWeightFile),
    )
    for index, single, opener in openers:
        if (folder / index).exists():
            return _open_sharded(folder / index, opener)
        if (folder / single).exists():
            file = opener(folder / single)
            return dict.fromkeys(file.entries, file)
    raise UserError(f"{folder} holds no weights: expected {SINGLE}, {TORCH_SINGLE}, or an index of either")


def _open_sharded(index: Path, opener: Callable[[Path], WeightFile]) -> dict[str, WeightFile]:
    weight_map = _weight_map(index)
    files = {name: opener(index.parent / name) for name in sorted(set(weight_map.values()))}
    for name, file in files.items():
        announced = {tensor for tensor, place in weight_map.items() if place == name}
        check_names(f"{file.path}, compared with {index.name}", set(file.entries), announced)
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: holds no weight_map from tensor names to file names")
    for name in set(weight_map.values()):
        if Path(name).name != name:
            raise UserError(f"{index}: names the file {name!r}; expected a file in the folder of the index")
    return weight_map
