"""Sources yield global tensors, and sinks take them. Everything that moves weights is `copy(source, sink)`.

Names are the global Megatron-core names of `tandem.models.tensors`. For each name, a checkpoint can hold several kinds
of tensor of the same shape: the weight itself and, for training, what the optimizer keeps.
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
# "exp_avg", "exp_avg_sq": Adam's first and second moments.
TensorKind = Literal["model", "master", "exp_avg", "exp_avg_sq"]
TENSOR_KINDS: tuple[TensorKind, ...] = get_args(TensorKind)

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", **{name: name for name in DTYPES}}


def dtype_name(dtype: np.dtype) -> str:
    """The key of DTYPES for `dtype`. MindSpore registers its own bfloat16, which counts as the same.

    >>> dtype_name(np.dtype("<f4"))
    'float32'
    """
    if dtype.name in DTYPES:
        return dtype.name
    raise UserError(f"dtype {dtype} is not supported in checkpoints; supported: {', '.join(DTYPES)}")


TEMPLATE_FOLDER = "additional_chat_templates"  # in a model's folder: the templates that are not its default


@dataclass
class Companions:
    """The small files that travel with weights: Hugging Face's config, and tokenizer and template files.

    `hf_config` is the `config.json` that the model came from; None when there was none. `files` are the other files,
    which are copied as they are. `texts` holds, by name, the content of files that are written instead. `left_out` are
    the names of files next to them that are not copied.
    """

    hf_config: dict[str, Any] | None = None
    files: list[Path] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def text_of(self, name: str) -> str | None:
        """The content of one of the files, as it will be written; None when there is no such file."""
        path = self.places.get(name)
        return self.texts.get(name) or (path.read_text(encoding="utf-8") if path else None)

    @property
    def places(self) -> dict[str, Path]:
        """The files that are copied, by the name in the folder of a model."""
        return {
            f"{TEMPLATE_FOLDER}/{path.name}" if path.parent.name == TEMPLATE_FOLDER else path.name: path
            for path in self.files
        }

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder of the tokenizer, if there is one."""
        return next((path.parent for path in self.files if path.name == "tokenizer.json"), None)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format in which weights are stored.

    Attributes:
        name: in words.
        load_model_type: upstream's name for it, as `--load-model-type` takes it.
        holder: in words, what is stored in this format.
        has_iterations: a folder of this format holds iterations, each in a folder of its own.
        checksums: in words, what reading all tensors proves; None where the format records no checksums.
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
TORCH_DIST = Format(
    name="Megatron torch_dist",
    load_model_type="mg",
    holder="a Megatron-core checkpoint",
    has_iterations=True,
    checksums="every weight has the CRC that its file records",
)
PEFT = Format(name="PEFT adapter", load_model_type="hf", holder="a PEFT adapter")
RANDOM = Format(name="random weights", load_model_type="random", holder="nothing: its weights are random")


class TensorSource(Protocol):
    """Somewhere to read global tensors from, one at a time. Sources inherit its defaults, and override what differs.

    Attributes:
        location: where it is, for messages.
        folder: the folder of its files; for an iteration, the iteration's folder. None without files.
        iteration: the number that `--ckpt-step` takes; None without one.
        layout: how tensors are split over its files; None where files hold whole tensors.
        hf_folder: a Hugging Face folder from which transformers reads the same weights; None without one.
        notices: what a user should know of how the files were read.
        base, adapters: where the source puts adapters to weights, each of the two as a source of its own.
    """

    config: ModelConfig
    companions: Companions
    location: str
    format: Format
    folder: Path | None = None
    iteration: int | None = None
    layout: Layout | None = None
    hf_folder: Path | None = None
    notices: tuple[str, ...] = ()
    base: TensorSource | None = None
    adapters: TensorSource | None = None

    def check_base(self) -> None:
        """Raise UserError unless `base` holds the weights that the adapters were trained on. Reading does it, too."""
        return

    def trust_base(self) -> None:
        """Compare nothing: another process did."""
        return

    def document(self, name: str) -> str | None:
        """The text of a small file that was stored with the tensors, such as a trainer's counters; None without it."""
        return None

    def trainer_state(self) -> tuple[str, ...]:
        """Names of what a trainer stored with the tensors."""
        return ()

    def unread_optimizer(self) -> tuple[str, ...]:
        """Files that hold an optimizer's state in a form that is not read."""
        return ()

    def earlier(self) -> TensorSource | None:
        """The newest earlier iteration that can be opened; None without one."""
        return None

    def kinds(self) -> tuple[TensorKind, ...]:
        """The kinds that are held for every trained tensor; "model" is always one."""
        ...

    def kinds_of(self, name: str) -> tuple[TensorKind, ...]:
        """The kinds that are held for one tensor."""
        return self.kinds()

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype: ...

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        """The whole global tensor.

        Raises:
            UserError: it is missing, has the wrong shape, or is damaged. The file and the tensor are named.
        """
        ...

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        """Part of a global tensor. No more of the rest is read than the format makes necessary.

        Raises:
            UserError: as `read`.
        """
        ...

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        """The same part in blocks of consecutive rows. Their size is what suits the format, up to the whole part.

        Raises:
            UserError: as `read`. It may come after blocks that are damaged: a checksum is known only at the end.
        """
        ...


class TensorSink(Protocol):
    """Somewhere to write global tensors to, in the tensor table's order."""

    location: str

    def write(self, name: str, rows: np.ndarray, kind: TensorKind = "model") -> None:
        """Take the next rows of a global tensor: all of them, or block after block."""
        ...

    def close(self) -> None:
        """Make everything that was written visible under its final name.

        Raises:
            UserError: not every tensor of the table was written.
        """
        ...

    def abort(self) -> None:
        """Remove everything that was written. Nothing appears under the final name."""
        ...


class RowsWritten:
    """Counts how many rows of each tensor were written to a sink."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> range:
        """Count the next rows of a tensor of `shape`. Returns their row numbers.

        Raises:
            UserError: the rows do not fit the shape, or are too many.
        """
        first = self._counts.get(name, 0)
        last = self._counts[name] = first + len(rows)
        if rows.shape[1:] != shape[1:] or last > shape[0]:
            check_shape("checkpoint to be written", name, (last, *rows.shape[1:]), shape)
        return range(first, last)


def kinds_to_load(source: TensorSource, name: str, param_dtype: str) -> tuple[TensorKind, TensorKind]:
    """The kinds from which an engine that computes in `param_dtype` takes a weight, and its fp32 master.

    Masters are more exact than weights in a smaller dtype. But a weight that is stored in `param_dtype` equals its
    rounded master, so it is taken as it is: without shared storage, a machine may hold only some rows of the masters.
    """
    if "master" not in source.kinds_of(name):
        return "model", "model"
    exact = dtype_name(source.dtype(name, "model")) == param_dtype
    return ("model" if exact else "master"), "master"


def check_shape(where: str, name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise UserError, with both shapes, when they differ."""
    if tuple(actual) != tuple(expected):
        raise UserError(f"{where}: tensor {name} has shape {list(actual)}; the config implies {list(expected)}")


def check_recorded(field: str, value: Any, recorded: Any, where: str) -> None:
    """Raise UserError, with both values, when a user's value contradicts what a checkpoint records."""
    if value is not None and value != recorded:
        raise UserError(f"{field} {value} contradicts {where}, which records {recorded}")
