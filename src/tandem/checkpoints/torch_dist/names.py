"""Under which names, and how stacked, a `torch_dist` checkpoint holds the tensors of a model.

Megatron-core stacks equal layers: `decoder.layers.mlp.linear_fc2.weight` is [layers, hidden, ffn]. With layers of
several kinds, and in plain distributed checkpoints of torch, every layer has a name of its own. Norms may have the
names of Transformer Engine's fused layers, and the two halves of `linear_fc1` may stand apart.
Experts are stacked, too, or have names of their own: `decoder.layers.mlp.experts.experts.linear_fc2.weight` is [layers,
experts, hidden, width].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tandem.checkpoints.interface import DTYPES, check_shape
from tandem.checkpoints.megatron.names import EXTRA_STATE, FUSED_NORMS
from tandem.checkpoints.torch_dist.metadata import Chunk, StoredTensor
from tandem.errors import UserError
from tandem.models.families import EXPERTS_FC1, EXPERTS_FC2
from tandem.models.tensors import EMBEDDING, TensorSpec, layer_prefix
from tandem.parallel.slices import Box, Part, tiles

# What stands before the names of a model's tensors: nothing in Megatron-LM, and wrappers of other trainers.
PREFIXES = ("", "module.", "model.", "model.module.", "module.module.")
LAYERS = "decoder.layers."
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
UNFUSED = {norm: fused for fused, norm in FUSED_NORMS.items()}
HALVES = ("_w", "_v")  # after the name of linear_fc1 whose halves stand apart: gate and up
OF_EXPERTS = {EXPERTS_FC1: "linear_fc1.weight", EXPERTS_FC2: "linear_fc2.weight"}
EXPERTS = "mlp.experts.experts."  # before these names, and before the number of an expert that has a name of its own
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Piece:
    """A box of a model's tensor, and where it is in a chunk: `index` has a number for each dimension that stacks."""

    tensor: StoredTensor
    chunk: Chunk
    box: Box
    index: tuple[int, ...]


@dataclass(frozen=True)
class Stacking:
    """How a stored tensor stacks tensors of the model: its dimension of layers, and that of experts.

    Attributes:
        layer, layers: the layer's number among those of the stack; None where layers do not stack.
        experts: None where they do not stack.
    """

    layer: int | None = None
    layers: int | None = None
    experts: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for size in (self.layers, self.experts) if size is not None)


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
    for stems, stacking in _candidates(spec, slot, slots):
        for suffixes in (("",), HALVES):
            names = [f"{prefix}{stem}{suffix}" for stem in stems for suffix in suffixes]
            if all(name in tensors for name in names):
                return _home(where, [tensors[name] for name in names], spec, stacking)
    return None


def _candidates(spec: TensorSpec, slot: int | None, slots: int) -> Iterator[tuple[list[str], Stacking]]:
    """Names under which a tensor may be stored, and how it is stacked there."""
    if slot is None or spec.layer is None:
        yield [spec.name], Stacking()
        return
    own = spec.name.removeprefix(layer_prefix(spec.layer))
    for prefix, stacking in ((LAYERS, Stacking(slot, slots)), (layer_prefix(slot), Stacking())):
        if own in OF_EXPERTS:
            experts, name = spec.split.experts, OF_EXPERTS[own]
            yield [f"{prefix}{EXPERTS}{name}"], replace(stacking, experts=experts)
            yield [f"{prefix}{EXPERTS}{expert}.{name}" for expert in range(experts)], stacking
        for name in (own, UNFUSED.get(own, own)):
            yield [prefix + name], stacking


def _home(where: str, stored: list[StoredTensor], spec: TensorSpec, stacking: Stacking) -> Home:
    share = spec.shape[0] // len(stored) // (stacking.experts or 1)
    pieces: list[Piece] = []
    for number, tensor in enumerate(stored):
        check_shape(where, tensor.name, tensor.shape, (*stacking.sizes, share, *spec.shape[1:]))
        pieces += [piece for chunk in tensor.chunks for piece in _pieces(tensor, chunk, stacking, number * share)]
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


def _pieces(tensor: StoredTensor, chunk: Chunk, stacking: Stacking, first: int) -> Iterator[Piece]:
    """What a chunk has of a tensor of the model, in which the stored tensor's rows begin at row `first`."""
    dimensions = len(stacking.sizes)
    stacked, ((start, stop), *rest) = list(chunk.box[:dimensions]), chunk.box[dimensions:]
    index: tuple[int, ...] = ()
    if stacking.layer is not None:
        (low, high), *stacked = stacked
        if not low <= stacking.layer < high:
            return
        index = (stacking.layer - low,)
    if stacking.experts is None:
        yield Piece(tensor, chunk, ((start + first, stop + first), *rest), index)
        return
    ((low, high),) = stacked
    for expert in range(low, high):
        row = expert * tensor.shape[-2] + first
        yield Piece(tensor, chunk, ((row + start, row + stop), *rest), (*index, expert - low))
