"""Sources yield global tensors, sinks take them; everything that moves weights is `copy(source, sink)`.

Names are the global Megatron-core names of `tandem.models.tensors`. A checkpoint can hold, for each of them,
several kinds of tensor of the same shape: the weight itself and, for training, what the optimizer keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import ml_dtypes
import numpy as np

from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.parallel.layout import Layout
from tandem.parallel.slices import Part

# "model": the weight, in the dtype it computes in. "master": its fp32 original, when that dtype is smaller.
# "exp_avg", "exp_avg_sq": Adam's first and second moments, fp32.
TensorKind = Literal["model", "master", "exp_avg", "exp_avg_sq"]
TENSOR_KINDS: tuple[TensorKind, ...] = get_args(TensorKind)

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", **{name: name for name in DTYPES}}


def dtype_name(dtype: np.dtype) -> str:
    """The key of DTYPES for `dtype`; MindSpore registers a bfloat16 of its own, which counts as the same."""
    if dtype.name in DTYPES:
        return dtype.name
    raise UserError(f"dtype {dtype} is not supported in checkpoints; supported: {', '.join(DTYPES)}")


@dataclass
class Companions:
    """The small files that travel with weights: Hugging Face's config, and tokenizer and template files.

    `hf_config` is the `config.json` that the model came from (None when it never had one); `files` are the other
    files, to be copied as they are; `texts` are files to be written with that content instead, by name.
    """

    hf_config: dict[str, Any] | None = None
    files: list[Path] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder of the tokenizer, if there is one."""
        return next((path.parent for path in self.files if path.name == "tokenizer.json"), None)


@dataclass(frozen=True, kw_only=True)
class Format:
    """What weights are stored as.

    Attributes:
        name: in words.
        load_model_type: upstream's word for it, as `--load-model-type` takes it.
        holder: what is stored so, in words.
        has_iterations: a folder of it holds iterations, each in a folder of its own.
        checksums: what reading all tensors proves, in words; None where nothing is recorded to compare with.
    """

    name: str
    load_model_type: str
    holder: str
    has_iterations: bool = False
    checksums: str | None = None


HUGGING_FACE = Format(name="Hugging Face", load_model_type="hf", holder="a Hugging Face folder")
NATIVE = Format(
    name="native",
    load_model_type="mg",
    holder="a Megatron-core checkpoint",
    has_iterations=True,
    checksums="every slice has the sha256 that index.json records",
)
MEGATRON = Format(
    name="Megatron torch",
    load_model_type="mg",
    holder="a Megatron-core checkpoint",
    has_iterations=True,
    checksums="every tensor has the CRC that its file records",
)
RANDOM = Format(name="random weights", load_model_type="random", holder="nothing: its weights are random")


class TensorSource(Protocol):
    """Somewhere to read global tensors from, one at a time. Sources inherit from it what they do not know better.

    Attributes:
        location: where it is, for messages.
        folder: where its files are; of an iteration, that one's own folder. None without files.
        iteration: the number that `--ckpt-step` takes; None where there is none.
        layout: how its files share the tensors out; None where they hold them whole.
        hf_folder: a Hugging Face folder with these very tensors; None where there is none.
    """

    config: ModelConfig
    companions: Companions
    location: str
    format: Format
    folder: Path | None = None
    iteration: int | None = None
    layout: Layout | None = None
    hf_folder: Path | None = None

    def document(self, name: str) -> str | None:
        """A small text file that was stored with the tensors, such as a trainer's counters; None where it is not."""
        return None

    def trainer_state(self) -> tuple[str, ...]:
        """Names of what a trainer stored with the tensors."""
        return ()

    def unread_optimizer(self) -> tuple[str, ...]:
        """Files that hold an optimizer's state in a form that is not read."""
        return ()

    def earlier(self) -> TensorSource | None:
        """The newest iteration before this one that can be opened; None where there is none."""
        return None

    def kinds(self) -> tuple[TensorKind, ...]:
        """What is held for every tensor; always contains "model"."""
        ...

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype: ...

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        """The whole global tensor.

        Raises:
            UserError: it is missing, mis-shaped or damaged; the file and the tensor are named.
        """
        ...

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        """Part of a global tensor, without reading more of the others than the format makes necessary.

        Raises:
            UserError: as `read`.
        """
        ...

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        """The same in blocks of consecutive rows: small ones, or all at once, as the format is best read.

        Raises:
            UserError: as `read`, perhaps after blocks of what is damaged.
        """
        ...


class TensorSink(Protocol):
    """Somewhere to write global tensors to, in the tensor table's order."""

    location: str

    def write(self, name: str, rows: np.ndarray, kind: TensorKind = "model") -> None:
        """The next rows of a global tensor: all of them, or block after block."""
        ...

    def close(self) -> None:
        """Make what was written visible, whole, under its final name.

        Raises:
            UserError: not every tensor of the table was written.
        """
        ...

    def abort(self) -> None:
        """Remove what was written; nothing appears under the final name."""
        ...


class RowsWritten:
    """How many rows a sink has of each tensor."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> range:
        """Which rows of a tensor of `shape` the next ones are.

        Raises:
            UserError: they are not of its shape, or too many.
        """
        first = self._counts.get(name, 0)
        last = self._counts[name] = first + len(rows)
        if rows.shape[1:] != shape[1:] or last > shape[0]:
            check_shape("checkpoint to be written", name, (last, *rows.shape[1:]), shape)
        return range(first, last)


def kinds_to_load(source: TensorSource, name: str, param_dtype: str) -> tuple[TensorKind, TensorKind]:
    """What an engine that computes in `param_dtype` takes a weight from, and its fp32 master.

    Masters say more than weights in a smaller dtype. But a weight in the very dtype is its master, rounded, and is then
    taken as it is: without shared storage a machine may hold only some rows of the masters.
    """
    if "master" not in source.kinds():
        return "model", "model"
    exact = dtype_name(source.dtype(name, "model")) == param_dtype
    return ("model" if exact else "master"), "master"


def check_shape(where: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise UserError(f"{where}: tensor {name} has shape {list(found)}; the config implies {list(expected)}")


def check_names(where: str, found: set[str], expected: set[str]) -> None:
    """Raise UserError listing what is missing and what is left over."""
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        parts = [
            f"{label}: {', '.join(names)}" for label, names in (("missing", missing), ("left over", extra)) if names
        ]
        raise UserError(f"{where}: the tensors do not match the config. {'; '.join(parts)}")


def check_recorded(field: str, given: Any, recorded: Any, where: str) -> None:
    """Raise UserError, with both values, when what is said of a checkpoint contradicts what it records."""
    if given is not None and given != recorded:
        raise UserError(f"{field} {given} contradicts {where}, which records {recorded}")
