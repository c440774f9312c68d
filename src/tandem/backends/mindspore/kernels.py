"""The functions that a device computes with. Devices differ only here and in their preparation (`device`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tandem.backends.capacity import Capacity
from tandem.backends.experts import Dispatch, Sorted
from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.weight import Pullback, Weight
from tandem.models.rows import Ranges

Differentiable = Callable[..., "tuple[Tensor, Pullback]"]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions that are different on each device. Signatures and shapes are documented in the CPU's.

    Attributes:
        to_device: host arrays of a micro-batch, by name -> what the kernels take, in one transfer.
        angles: of the rotary embedding, in the form that attention takes.
        product, weight_gradient: of matrices of one dtype. On an NPU the gradient has that dtype, too.
        new_cache, attention_over_kept: of sessions. What a cache is, only the two know.
        rows: some rows of a tensor. On CPU they share its memory.
        place_rows: the transpose of `select_rows`, without a pullback.
        sum_over, gather_rows: collectives over many tensors.
        scatter_rows: this rank's rows (`even_rows`) of a sum over ranks.
        scatters_gradients: whether ranks get their rows of gradients in that way. Else they get all of them.
        route, taken_choices, limited, sort_choices, groups, dispatch, expert_mlp, grouped, grouped_backward, sum_rows,
            exchange: of mixtures of experts. Numbers of experts, and what is sorted by them, are where the device wants
            them.
        side_by_side, block, columns, add_columns, row_squares, stretch, scale_columns, dot_columns: of adapters.
        bf16: whether matrix products in bfloat16 exist.
        reads_ahead: whether the host is free for the next step's batches while the device computes.
        fp32_notice: a message for the user when computing in fp32.
    """

    to_device: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
    angles: Callable[..., tuple[Tensor, Tensor]]
    product: Callable[..., Tensor]
    weight_gradient: Callable[[Tensor, Tensor], Tensor]
    embedding: Differentiable
    select_rows: Differentiable
    place_rows: Callable[[Tensor, Any, int], Tensor]
    rows: Callable[[Tensor, int, int], Tensor]
    rms_norm: Differentiable
    swiglu: Differentiable
    attention: Differentiable
    new_cache: Callable[[tuple[int, ...], ms.Type], Any]
    attention_over_kept: Callable[..., Tensor]
    token_losses: Callable[..., np.ndarray]
    cross_entropy_and_gradient: Callable[..., tuple[Any, Tensor]]
    zeros: Callable[[tuple[int, ...]], Tensor]
    sum_of_squares: Callable[[Sequence[Tensor]], Any]
    totals: Callable[[Ranks, Sequence[Any]], list[float]]
    adamw: Callable[..., None]
    sum_over: Callable[[Ranks, Sequence[Tensor]], None]
    gather_rows: Callable[[Ranks, Sequence[Weight]], None]
    scatter_rows: Callable[[Ranks, Tensor], Tensor]
    scatters_gradients: bool
    route: Callable[..., tuple[Tensor, Any, Callable[[Tensor, Tensor], Tensor]]]
    taken_choices: Callable[[Capacity, Any, Tensor, int], tuple[Any, Any]]
    limited: Callable[[Tensor, Any], Tensor]
    sort_choices: Callable[[Any, int, int, int], Sorted]
    groups: Callable[[Any], Any]
    dispatch: Callable[[Ranks, Any], Dispatch]
    expert_mlp: Callable[..., tuple[Tensor, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]]
    grouped: Callable[..., Tensor]
    grouped_backward: Callable[[Tensor, Tensor, Weight, Any], Tensor]
    sum_rows: Callable[[Tensor, Sorted, int], Tensor]
    exchange: Callable[[Ranks, Tensor, np.ndarray], Tensor]
    side_by_side: Callable[..., Tensor]
    block: Callable[..., Tensor]
    columns: Callable[[Tensor, Ranges], Tensor]
    add_columns: Callable[[Tensor, Tensor, Ranges], Tensor]
    row_squares: Callable[[Tensor, Tensor], Tensor]
    stretch: Callable[..., Tensor]
    scale_columns: Callable[[Tensor, Tensor], Tensor]
    dot_columns: Callable[[Tensor, Tensor], Tensor]
    bf16: bool
    reads_ahead: bool
    fp32_notice: str = ""
