"""A micro-batch as the kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms
import numpy as np

from tandem.backends.adapters import Dropout
from tandem.backends.experts import Routing
from tandem.backends.loss import split_scale
from tandem.backends.mindspore.documents import Array, Documents, Lookup, Targets
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.tensor_parallel import TensorParallel
from tandem.backends.passes import WeightedBatch
from tandem.data.batch import MicroBatch, padded
from tandem.models.config import ModelConfig


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
