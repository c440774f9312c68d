"""The kernels of each device. Devices differ only here and in their preparation (`device`)."""

from __future__ import annotations

from tandem.backends.mindspore.compute import (
    npu,
    npu_adapters,
    npu_experts,
    npu_feeding,
    npu_loss,
    npu_optimizer,
    npu_session,
)
from tandem.backends.mindspore.compute.cpu import (
    adapters,
    attention,
    buckets,
    experts,
    functional,
    loss,
    optimizer,
    session,
)
from tandem.backends.mindspore.device import prepare
from tandem.backends.mindspore.kernels import Kernels

CPU = Kernels(
    to_device=functional.to_device,
    angles=functional.angles,
    product=functional.product,
    weight_gradient=functional.weight_gradient,
    embedding=functional.embedding,
    select_rows=functional.select_rows,
    place_rows=functional.place_rows,
    rows=functional.rows,
    rms_norm=functional.rms_norm,
    swiglu=functional.swiglu,
    attention=attention.attention,
    new_cache=session.new_cache,
    attention_over_kept=session.attention_over_kept,
    token_losses=loss.token_losses,
    cross_entropy_and_gradient=loss.cross_entropy_and_gradient,
    zeros=functional.zeros,
    sum_of_squares=optimizer.sum_of_squares,
    totals=optimizer.totals,
    adamw=optimizer.adamw,
    sum_over=buckets.sum_over,
    gather_rows=buckets.gather_rows,
    scatter_rows=buckets.scatter_rows,
    scatters_gradients=False,
    route=experts.route,
    taken_choices=experts.taken_choices,
    limited=experts.limited,
    sort_choices=experts.sort_choices,
    groups=experts.groups,
    dispatch=experts.dispatch,
    expert_mlp=experts.expert_mlp,
    grouped=experts.grouped,
    grouped_backward=experts.grouped_backward,
    sum_rows=experts.sum_rows,
    exchange=experts.exchange,
    side_by_side=adapters.side_by_side,
    block=adapters.block,
    columns=adapters.columns,
    add_columns=adapters.add_columns,
    row_squares=adapters.row_squares,
    stretch=adapters.stretch,
    scale_columns=adapters.scale_columns,
    dot_columns=adapters.dot_columns,
    bf16=False,
    reads_ahead=False,
)


NPU = Kernels(
    to_device=npu_feeding.to_device,
    angles=npu_feeding.angles,
    product=npu.product,
    weight_gradient=npu.weight_gradient,
    embedding=npu.embedding,
    select_rows=npu.select_rows,
    place_rows=npu.place_rows,
    rows=npu.rows,
    rms_norm=npu.rms_norm,
    swiglu=npu.swiglu,
    attention=npu.attention,
    new_cache=npu_session.new_cache,
    attention_over_kept=npu_session.attention_over_kept,
    token_losses=npu_loss.token_losses,
    cross_entropy_and_gradient=npu_loss.cross_entropy_and_gradient,
    zeros=npu.zeros,
    sum_of_squares=npu_optimizer.sum_of_squares,
    totals=npu_feeding.totals,
    adamw=npu_optimizer.adamw,
    sum_over=npu.sum_over,
    gather_rows=npu.gather_rows,
    scatter_rows=npu.scatter_rows,
    scatters_gradients=True,
    route=npu_experts.route,
    taken_choices=npu_experts.taken_choices,
    limited=npu_experts.limited,
    sort_choices=npu_experts.sort_choices,
    groups=npu_experts.groups,
    dispatch=npu_experts.dispatch,
    expert_mlp=npu_experts.expert_mlp,
    grouped=npu_experts.grouped,
    grouped_backward=npu_experts.grouped_backward,
    sum_rows=npu_experts.sum_rows,
    exchange=npu_experts.exchange,
    side_by_side=npu_adapters.side_by_side,
    block=npu_adapters.block,
    columns=npu_adapters.columns,
    add_columns=npu_adapters.add_columns,
    row_squares=npu_adapters.row_squares,
    stretch=npu_adapters.stretch,
    scale_columns=npu_adapters.scale_columns,
    dot_columns=npu_adapters.dot_columns,
    bf16=True,
    reads_ahead=True,
    fp32_notice="fp32: flash attention on Ascend computes in bf16; the rest computes in fp32",
)


_KERNELS = {"cpu": CPU, "npu": NPU}


def kernels_for(device: str | None) -> Kernels:
    """Prepare MindSpore for a device (see `device.prepare`), and return its kernels."""
    return _KERNELS[prepare(device)]
