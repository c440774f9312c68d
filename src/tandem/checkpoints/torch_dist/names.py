"""Under which names, and how stacked, a `torch_dist` checkpoint holds the tensors of a model.

Megatron-core stacks equal layers: `decoder.layers.mlp.linear_fc2.weight` is [layers, hidden, ffn]. With layers of
several kinds, and in plain distributed checkpoints of torch, every layer has a name of its own. Norms may have the
names of Transformer Engine's fused layers, and the two halves of `linear_fc1` may stand apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tandem.checkpoints.interface import DTYPES, check_shape
from tandem.checkpoints.megatron.names import EXTRA_STATE, FUSED_NORMS
from tandem.checkpoints.torch_dist.metadata import Chunk, StoredTensor
from tandem.errors import UserError
from tandem.models.tensors import EMBEDDING, TensorSpec, layer_prefix
from tandem.parallel.slices import Box, Part, tiles

# What stands before the names of a model's tensors: nothing in Megatron-LM, and wrappers of other trainers.
PREFIXES = ("", "module.", "model.", "model.module.", "module.module.")
LAYERS = "decoder.layers."
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
UNFUSED = {norm: fused for fused, norm in FUSED_NORMS.items()}
HALVES = ("_w", "_v")  # after the name of linear_fc1 whose halves stand apart: gate and up
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Piece:
    """A chunk as a box of a model's tensor. `row` is the layer's row in the chunk, None where layers do not stack."""

    tensor: StoredTensor
    chunk: Chunk
    box: Box
    row: int | None


@dataclass(frozen=True)
class Home:
    """Where a model's tensor is: all pieces of it, and the names of the stored tensors that they belong to."""

    dtype: np.dtype
    pieces: tuple[Piece, ...]
    stored_names: tuple[str, ...]


def prefix_of(where: str, names: Iterable[str]) -> str:
    """What stands before the names of the model's tensors.

    Raises:
        UserError: no tensor has the name of Megatron-core's embedding.
    """
    names = set(names)
    for prefix in PREFIXES:
        if prefix + EMBEDDING in names:
            return prefix
    found = ", ".join(sorted(name for name in names if not OPTIMIZER.match(name))[:SHOWN])
    raise UserError(
        f"{where}: no tensor is named {EMBEDDING}: not a model of Megatron-core. It holds {len(names)} tensors, such "
        f"as {found or 'none'}"
    )


def model_names(names: Iterable[str], prefix: str) -> set[str]:
    """The names of a model's tensors, without the optimizer's."""
    return {
        name
        for name in names
        if name.startswith(prefix) and not OPTIMIZER.match(name) and EXTRA_STATE not in name.removeprefix(prefix)
    }


def find(
    where: str, tensors: Mapping[str, StoredTensor], prefix: str, spec: TensorSpec, slot: int | None, slots: int
) -> Home | None:
    """Where a tensor of the model is; None when it is nowhere.

    Args:
        slot, slots: its layer's number among all layers of the stack, with empty ones; None outside the stack.

    Raises:
        UserError: it has another shape, or its chunks do not make it up.
    """
    for stems, stacked in _candidates(spec, slot):
        for suffixes in (("",), HALVES):
            names = [f"{prefix}{stem}{suffix}" for stem in stems for suffix in suffixes]
            if all(name in tensors for name in names):
                return _home(where, [tensors[name] for name in names], spec, slot if stacked else None, slots)
    return None


def _candidates(spec: TensorSpec, slot: int | None) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Names under which a tensor may be stored, and whether it is stacked there."""
    if slot is None or spec.layer is None:
        yield (spec.name,), False
        return
    own = spec.name.removeprefix(layer_prefix(spec.layer))
    for name in (own, UNFUSED.get(own, own)):
        yield (LAYERS + name,), True
        yield (layer_prefix(slot) + name,), False


def _home(where: str, stored: list[StoredTensor], spec: TensorSpec, row: int | None, rows: int) -> Home:
    lead = () if row is None else (rows,)
    share = spec.shape[0] // len(stored)
    pieces: list[Piece] = []
    for number, tensor in enumerate(stored):
        check_shape(where, tensor.name, tensor.shape, (*lead, share, *spec.shape[1:]))
        pieces += [piece for chunk in tensor.chunks if (piece := _piece(tensor, chunk, row, number * share))]
    names = tuple(tensor.name for tensor in stored)
    if not tiles([Part((piece.box,)) for piece in pieces], spec.shape):
        raise UserError(f"{where}: the chunks of {' and '.join(names)} do not make up {spec.name}: some are missing")
    return Home(_dtype(where, stored), tuple(pieces), names)


def _dtype(where: str, stored: list[StoredTensor]) -> np.dtype:
    dtype = stored[0].dtype
    for tensor in stored:
        if tensor.dtype is None or tensor.dtype != dtype or tensor.dtype.name not in DTYPES:
            found = tensor.dtype or "of a dtype that is not known"
            raise UserError(f"{where}: {tensor.name} is {found}; supported: {', '.join(DTYPES)}")
    assert dtype is not None
    return dtype


def _piece(tensor: StoredTensor, chunk: Chunk, row: int | None, first: int) -> Piece | None:
    box = chunk.box
    if row is not None:
        (start, stop), *rest = box
        if not start <= row < stop:
            return None
        row, box = row - start, tuple(rest)
    (start, stop), *rest = box
    return Piece(tensor, chunk, ((start + first, stop + first), *rest), row)
