"""A micro-batch on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tandem.backends.adapters import Dropout
from tandem.backends.experts import Routing
from tandem.backends.loss import split_scale
from tandem.backends.passes import WeightedBatch
from tandem.backends.torch.attention import Attention
from tandem.backends.torch.compute.sets import kernels_of
from tandem.backends.torch.loss import Targets
from tandem.backends.torch.tensor_parallel import TensorParallel
from tandem.data.batch import MicroBatch, padded
from tandem.models.config import ModelConfig


@dataclass(frozen=True)
class Inputs:
    """What the passes of a micro-batch need of it.

    Attributes:
        tokens: [t].
        cos, sin: of each token's rotary angles, [t, 1, kv_channels / 2].
        attention: how they attend.
        real: how many tokens are of the batch; the rest is padding.
        rows: the positions whose labels count, None for all in order.
        targets: of these rows.
        dropout: of adapters' inputs.
        routing: of tokens to experts; None in a model without.
    """

    tokens: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    attention: Attention
    real: int
    rows: torch.Tensor | None
    targets: Targets
    dropout: Dropout | None = None
    routing: Routing | None = None


@dataclass(frozen=True)
class Sent:
    """A micro-batch on its way to the device.

    Attributes:
        longer: the batch with its padding.
        rows, scale: of `Inputs.rows` and `Targets.scale`, on the host.
        arrived: waits for the tensors that `arrive` takes.
    """

    batch: MicroBatch
    longer: MicroBatch
    rows: np.ndarray
    scale: float
    arrived: Callable[[], list[torch.Tensor]]


def send(batch: MicroBatch, device: torch.device, tensor: TensorParallel | None) -> Sent:
    """Send a micro-batch to the device, in one transfer."""
    kernels = kernels_of(device)
    rows, labels = batch.judged
    weights = batch.weights[rows] if isinstance(batch, WeightedBatch) else np.empty(0)
    scale, shares = split_scale(weights)
    longer = padded(batch, tensor.size) if tensor is not None and tensor.sequence else batch
    wide = str(kernels.sums).removeprefix("torch.")  # a device without float64 gets none
    arrays = [
        longer.tokens,
        longer.position_ids,
        longer.cu_seqlens.astype(np.int32),
        rows,
        labels.astype(np.int64),
        weights[:, None].astype(wide),
        shares[:, None].astype(wide),
    ]
    return Sent(batch, longer, rows, scale, kernels.early(lambda: kernels.to_device(arrays, device), device))


def arrive(
    config: ModelConfig,
    sent: Sent,
    dtype: torch.dtype,
    device: torch.device,
    attention: Attention | None = None,
    routing: Routing | None = None,
) -> Inputs:
    """A micro-batch that was sent, for the model. `attention` default: within documents."""
    kernels, batch, longer = kernels_of(device), sent.batch, sent.longer
    tokens, positions, starts, rows, labels, column, shares = sent.arrived()
    if attention is None:
        documents = kernels.documents(longer.lengths.tolist(), starts)
        attention = lambda layer, q, k, v: kernels.attention(q, k, v, documents)  # noqa: E731
    cos, sin = kernels.angles(config, longer.position_ids, positions, dtype)
    return Inputs(
        tokens,
        cos,
        sin,
        attention,
        len(batch.tokens),
        None if np.array_equal(sent.rows, np.arange(len(batch.labels))) else rows,
        Targets(labels, column.to(kernels.sums), sent.scale, shares),
        Dropout.of(config.lora, batch),
        routing,
    )
