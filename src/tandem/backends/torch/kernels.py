"""The functions that a kind of device computes with. Devices differ only here and in `device`.

`compute/sets.py` says which device has which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions that are different on each kind of device. Signatures and shapes are documented in the CPU's.

    Attributes:
        product: of x and a transposed weight.
        add_product: adds a product to the gradient of a weight.
        groups: what the next three need to know, from the number of rows of each expert [E].
        parts: the groups of as many experts as are computed at a time, as many in each part.
        grouped_product: of each expert's rows and its weight.
        add_grouped_product: adds each expert's product to the gradient of a stack of weights.
        weighted_swiglu: of rows with factors, with its backward pass.
        route, route_backward: what a router's logits give, once experts are chosen.
        sum_rows: sums the rows of each token.
        rms_norm, swiglu, rotary_heads: with their backward passes.
        to_device: copies of arrays.
        early: begins to copy, where the device can copy while it computes.
        angles: cos and sin of each token's rotary angles.
        documents: what `attention` needs to know of the documents that a batch is made of.
        attention_over_kept: of the new tokens of a sequence that goes on.
        losses_and_gradient: of the logits of a chunk of rows.
        logits_chunk_bytes: largest size of the fp32 logits of a chunk.
        weight_piece: numbers of a weight that are computed with in fp32 at a time.
        norm: over several tensors, a tensor of no dimensions.
        adamw: updates several weights.
        update_skips: whether `adamw` itself leaves out what is skipped; otherwise the host must know before.
        sums: the dtype that long sums of fp32 numbers are kept in.
        reads_ahead: whether the host is free for the next step's batches while the device computes.
    """

    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    add_product: Callable[[torch.Tensor, bool, torch.Tensor, torch.Tensor, float], None]
    groups: Callable[[torch.Tensor], Any]
    parts: Callable[[Any], list[Any]]
    grouped_product: Callable[..., torch.Tensor]
    add_grouped_product: Callable[[torch.Tensor, bool, torch.Tensor, torch.Tensor, Any], None]
    weighted_swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weighted_swiglu_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    route: Callable[..., tuple[torch.Tensor, ...]]
    route_backward: Callable[..., torch.Tensor]
    sum_rows: Callable[..., torch.Tensor]
    rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rms_norm_backward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    swiglu: Callable[[torch.Tensor], torch.Tensor]
    swiglu_backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rotary_heads: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rotary_heads_backward: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
    to_device: Callable[[Sequence[np.ndarray], torch.device], list[torch.Tensor]]
    early: Callable[[Callable[[], list[torch.Tensor]], torch.device], Callable[[], list[torch.Tensor]]]
    angles: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    documents: Callable[[Sequence[int], torch.Tensor], Any]
    attention: Callable[..., torch.Tensor]
    attention_over_kept: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    losses_and_gradient: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    logits_chunk_bytes: int
    weight_piece: int
    norm: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    adamw: Callable[..., None]
    update_skips: bool
    sums: torch.dtype
    reads_ahead: bool
