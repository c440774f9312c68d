"""A micro-batch as the kernels take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mindspore as ms
import numpy as np

from tandem.backends.adapters import Dropout
from tandem.backends.experts import Routing
from tandem.backends.loss import split_scale
from tandem.backends.mindspore.documents import Documents
from tandem.backends.passes import WeightedBatch
from tandem.data.batch import MicroBatch, padded
from tandem.models.config import ModelConfig

if TYPE_CHECKING:  # both take what is here
    from tandem.backends.mindspore.kernels import Kernels
    from tandem.backends.mindspore.tensor_parallel import TensorParallel

# An array of the host where the kernels compute on it, otherwise a tensor on the device (`Kernels.to_device`).
Array = Any


@dataclass(frozen=True)
class Lookup:
    """The tokens whose vectors this rank has.

    Attributes:
        tokens: their numbers among this rank's rows of the embedding, [n].
        here: their places in the micro-batch, [n]; None for all in order.
        count: tokens of the micro-batch.
    """

    tokens: Array
    here: Array | None
    count: int


@dataclass(frozen=True)
class Targets:
    """What the loss needs besides logits.

    Attributes:
        labels: of the rows that count, [n].
        local: the same counted from this rank's first row of the vocabulary, and 0 where another rank has the label.
        present: 1 where this rank has the label, else 0, [n, 1]; None where it has all.
        weights: of the rows in the loss, [n]; undefined in evaluation.
        scale, shares: the same as one factor times shares between -1 and 1, [n, 1] (`split_scale`).
    """

    labels: Array
    local: Array
    present: Array | None
    weights: Array
    scale: float
    shares: Array

    def part(self, rows: slice) -> Targets:
        """The targets of some of the rows."""
        present = None if self.present is None else self.present[rows]
        of_rows = (self.labels[rows], self.local[rows], present, self.weights[rows])
        return Targets(*of_rows, self.scale, self.shares[rows])


@dataclass(frozen=True)
class Inputs:
    """What the passes of a micro-batch need of it.

    Attributes:
        tokens: how many there are, padding included.
        rows: the positions whose labels count; None for all in order.
        dropout: of adapters' inputs.
        routing: of tokens to experts; None in a model without.
    """

    tokens: int
    lookup: Lookup
    documents: Documents
    rows: Array | None
    targets: Targets
    dropout: Dropout | None
    routing: Routing | None


def prepare(
    config: ModelConfig,
    batch: MicroBatch,
    rows: np.ndarray,
    labels: np.ndarray,
    dtype: ms.Type,
    kernels: Kernels,
    tensor: TensorParallel,
    routing: Routing | None = None,
) -> Inputs:
    """A micro-batch for the model, in one transfer.

    Args:
        rows, labels: the positions that the head judges, and their labels.
    """
    longer = padded(batch, tensor.ranks.size) if tensor.sequence else batch
    tokens, here = tensor.own_tokens(longer.tokens)
    local, present = tensor.own_labels(labels)
    weights = batch.weights[rows] if isinstance(batch, WeightedBatch) else np.zeros(len(rows))
    scale, shares = split_scale(weights)
    host = {
        "tokens": tokens,
        "positions": longer.position_ids,
        "labels": labels,
        "local": local,
        "weights": weights,
        "shares": shares[:, None],
    }
    if here is not None:
        host["here"] = here
    if present is not None:
        host["present"] = present[:, None]
    if not np.array_equal(rows, np.arange(len(longer.tokens))):
        host["rows"] = rows
    there = kernels.to_device(host)
    angles = kernels.angles(config, longer.position_ids, there["positions"], dtype)
    return Inputs(
        len(longer.tokens),
        Lookup(there["tokens"], there.get("here"), len(longer.tokens)),
        Documents(longer.cu_seqlens, *angles),
        there.get("rows"),
        Targets(there["labels"], there["local"], there.get("present"), there["weights"], scale, there["shares"]),
        Dropout.of(config.lora, batch),
        routing,
    )
