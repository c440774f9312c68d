"""The weight files of a Hugging Face folder: safetensors or torch's pickles, single or sharded with an index."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tandem.checkpoints.formats.safetensors import SafetensorsFile
from tandem.checkpoints.formats.torch_reader import LazyTensor, load
from tandem.checkpoints.name_lists import check_names
from tandem.errors import UserError
from tandem.files.real import check_real
from tandem.files.text import read_json
from tandem.models.weight_map import LM_HEAD
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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, under the name that it has there."""

    file: WeightFile
    name: str

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.name]

    def read(self, box: Box | None = None) -> np.ndarray:
        """The tensor, or a box of it."""
        return self.file.read(self.name, box)


@dataclass(frozen=True)
class Form:
    """A form of weight files: one file, or several that an index lists."""

    single: str
    index: str
    files: str  # pattern
    opener: Callable[[Path], WeightFile]

    def is_in(self, folder: Path) -> bool:
        """Dangling links count: what they should lead to is what the user means."""
        return os.path.lexists(folder / self.single) or os.path.lexists(folder / self.index)

    def open(self, folder: Path) -> dict[str, StoredTensor]:
        """Tensor name -> its place. As in transformers, a single file comes before an index."""
        single, index = folder / self.single, folder / self.index
        if not os.path.lexists(single):
            return _open_sharded(index, self.opener)
        if index.exists():
            _check_alone(single, index)
        file = self.opener(single)
        return {name: StoredTensor(file, name) for name in file.entries}


# Safetensors are taken where a folder holds both, as transformers does.
FORMS = (
    Form(SINGLE, INDEX, "model*.safetensors", SafetensorsFile),
    Form(TORCH_SINGLE, TORCH_INDEX, "pytorch_model*.bin", TorchWeightFile),
)


def holds_weights(folder: Path) -> bool:
    """Whether a folder has weight files of a Hugging Face model, whole or not."""
    return form_in(folder) is not None or any(folder.glob("*.safetensors"))


def form_in(folder: Path) -> Form | None:
    """The form of the weight files that are read from a folder; None where there are none under their names."""
    return next((form for form in FORMS if form.is_in(folder)), None)


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Tensor name -> its place in the files of the folder.

    Raises:
        UserError: no weights, two sets of weights, an index that is damaged or disagrees with its files, or a file that
            is missing.
    """
    form = form_in(folder)
    if form is None:
        raise UserError(f"{folder} holds no weights: expected {SINGLE}, {TORCH_SINGLE}, or an index of either")
    return form.open(folder)


def unread_weights(folder: Path, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Names of weight files in the folder that hold none of these tensors."""
    read = {tensor.file.path.name for tensor in tensors.values()}
    return sorted(path.name for form in FORMS for path in folder.glob(form.files) if path.name not in read)


def _check_alone(single: Path, index: Path) -> None:
    """Raise UserError when a folder holds a single file and also the files of an index: one of them is old."""
    others = sorted(name for name in set(_weight_map(index).values()) if name != single.name)
    present = [name for name in others if (index.parent / name).exists()]
    if present:
        raise UserError(
            f"{single.parent} holds two models: {single.name}, which transformers reads, and {index.name} with "
            f"{len(present)} of its {len(others)} files ({present[0]} ...), which vLLM reads: remove the one that is "
            f"out of date"
        )


def _open_sharded(index: Path, opener: Callable[[Path], WeightFile]) -> dict[str, StoredTensor]:
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not os.path.lexists(index.parent / name)]:
        raise UserError(
            f"{index} names {len(names)} files, and {len(missing)} of them are missing: {', '.join(missing[:3])}"
            f"{' ...' * (len(missing) > 3)}; copy or download them, too"
        )
    files = {name: opener(index.parent / name) for name in names}
    for name, file in files.items():
        announced = {tensor for tensor, place in weight_map.items() if place == name}
        # Of a tied head, some indices tell what the files do not hold, or the other way round.
        check_names(f"{file.path}, compared with {index.name}", {*file.entries, LM_HEAD}, {*announced, LM_HEAD})
    return {tensor: StoredTensor(file, tensor) for file in files.values() for tensor in file.entries}


def _weight_map(index: Path) -> dict[str, str]:
    check_real(index)
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: holds no weight_map from tensor names to file names")
    for name in set(weight_map.values()):
        if Path(name).name != name:
            raise UserError(f"{index}: names the file {name!r}; expected a file in the folder of the index")
    return weight_map
