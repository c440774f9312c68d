"""`tandem inspect checkpoint`: what a folder holds, in any of the formats, and whether it is undamaged."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from tandem.checkpoints.copy import Progress
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.formats.arrays import is_finite
from tandem.checkpoints.interface import DTYPES, TensorKind, TensorSource, dtype_name
from tandem.checkpoints.native.source import NativeSource
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.parallel.layout import Layout

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".distcp")
BLOCK = 1 << 22  # bytes hashed at a time


@dataclass(frozen=True)
class Content:
    """All tensors of one kind and dtype."""

    kind: TensorKind
    dtype: str
    tensors: int
    numbers: int
    bytes: int


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds.

    Attributes:
        iteration: name of its folder, `iter_0000001` or `release`; None for a format without iterations.
        others: names of the other iterations next to it.
        layout: None where files hold whole tensors.
        weights: in words, where the weights of adapters are; None where the folder holds them.
        optimizer: in words, whether the optimizer's state is there, and where.
        trainer_state: names of what a trainer stored next to the model.
        files: weight files, relative to `folder`, with their sizes in bytes.
        integrity: in words, what was checked.
        digests: sha256 of each file that was read.
    """

    source: TensorSource
    format: str
    folder: Path
    config: ModelConfig
    layout: Layout | None
    iteration: str | None
    others: tuple[str, ...]
    contents: tuple[Content, ...]
    weights: str | None
    optimizer: str
    trainer_state: tuple[str, ...]
    files: dict[str, int]
    integrity: str = "headers and shapes are in order; tensors were not read"
    digests: dict[str, str] = field(default_factory=dict)


def describe(path: str | Path, iteration: int | None = None) -> Description:
    """Open a checkpoint and describe what it holds. Headers and shapes are checked; tensors are not read.

    Raises:
        UserError: the folder holds no checkpoint, or a damaged one.
    """
    source = open_source(path, iteration, adapters_alone=True)
    folder, has_iterations = source.folder, source.format.has_iterations
    assert folder is not None
    files = sorted(file for file in folder.rglob("*") if file.suffix in WEIGHT_SUFFIXES)
    return Description(
        source,
        format=source.format.name,
        folder=folder,
        config=source.config,
        layout=source.layout,
        iteration=folder.name if has_iterations else None,
        others=_other_iterations(folder) if has_iterations else (),
        contents=_contents(source),
        weights=_weights(source),
        optimizer=_optimizer(source),
        trainer_state=source.trainer_state(),
        files={str(file.relative_to(folder)): file.stat().st_size for file in files},
    )


def with_integrity(description: Description, progress: Progress | None = None) -> Description:
    """Read and check the whole checkpoint. Returns its description with the results.

    Raises:
        UserError: a tensor is damaged, or holds NaN or infinity.
    """
    source, done = description.source, 0
    total = sum(content.bytes for content in description.contents) + sum(description.files.values())
    for kind in source.kinds():
        for name in tensor_table(source.config):
            if kind not in source.kinds_of(name):
                continue
            tensor = source.read(name, kind)
            if not is_finite(tensor):
                raise UserError(f"{source.location}: tensor {name} ({kind}) holds NaN or infinity")
            done += tensor.nbytes
            if progress:
                progress(done, total)
    digests = {}
    for file, size in description.files.items():
        digests[file] = _sha256(description.folder / file)
        done += size
        if progress:
            progress(done, total)
    checksums = source.format.checksums
    proved = f"{checksums}, and" if checksums else "this format records no checksums;"
    return replace(description, integrity=f"{proved} every number is finite", digests=digests)


def _contents(source: TensorSource) -> tuple[Content, ...]:
    sizes_of: dict[tuple[TensorKind, str], list[int]] = defaultdict(list)
    table = tensor_table(source.config)
    for kind in source.kinds():
        for name, spec in table.items():
            if kind not in source.kinds_of(name):
                continue
            sizes_of[kind, dtype_name(source.dtype(name, kind))].append(spec.numel)
    return tuple(
        Content(kind, dtype, len(sizes), sum(sizes), sum(sizes) * DTYPES[dtype].itemsize)
        for (kind, dtype), sizes in sizes_of.items()
    )


def _weights(source: TensorSource) -> str | None:
    if source.kinds_of(EMBEDDING):
        return None
    if not isinstance(source, NativeSource) or source.record is None:
        return "not here: adapters alone"
    iteration = "" if source.record.iteration is None else f", iteration {source.record.iteration}"
    return f"not here: in {source.record.folder}{iteration}"


def _optimizer(source: TensorSource) -> str:
    if places := source.unread_optimizer():
        return f"yes, in {' and '.join(places)}; it is not read here"
    kept = [kind for kind in source.kinds() if kind != "model"]
    return f"yes: {', '.join(kept)}" if kept else "no"


def _other_iterations(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.parent.glob("iter_*") if path != folder))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
