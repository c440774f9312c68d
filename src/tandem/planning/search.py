"""Layouts for a number of devices: those that fit, fastest first, and why the others do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from tandem.errors import UserError
from tandem.models.experts import Experts
from tandem.parallel.layout import Layout
from tandem.planning.hardware import GIB, Hardware
from tandem.planning.job import Job
from tandem.planning.memory import peak_memory
from tandem.planning.speed import Speed, estimate

MICRO_BATCH_SIZES = (1, 2, 4, 8)
CHUNKS = (2, 4)  # virtual stages of an interleaved pipeline stage


@dataclass(frozen=True)
class Plan:
    """A job that fits, with what it takes."""

    job: Job
    peak: float
    speed: Speed


def suggest(base: Job, hardware: Hardware, devices: int) -> tuple[list[Plan], dict[str, list[tuple[int, int]]]]:
    """The fastest plan of each tensor and pipeline size, fastest first; and reason -> the sizes that have no plan.

    The model, the global batch and the precision come from `base`. The search tries layouts, micro-batch sizes,
    recomputation and, where the backend has them, fully sharded weights; with experts also how ranks share them.
    Sequence parallelism and the distributed optimizer are always on.
    """
    plans: list[Plan] = []
    rejected: dict[str, list[tuple[int, int]]] = {}
    for tensor_size, pipeline_size in _sizes(devices):
        try:
            plans.append(_best(base, hardware, devices, tensor_size, pipeline_size))
        except UserError as error:
            rejected.setdefault(str(error), []).append((tensor_size, pipeline_size))
    return sorted(plans, key=lambda plan: plan.speed.step), rejected


def _sizes(devices: int) -> Iterator[tuple[int, int]]:
    """Tensor and pipeline sizes whose product divides the devices; tensor sizes are powers of two."""
    tensor_size = 1
    while devices % tensor_size == 0 and tensor_size <= devices:
        for pipeline_size in range(1, devices // tensor_size + 1):
            if devices // tensor_size % pipeline_size == 0:
                yield tensor_size, pipeline_size
        tensor_size *= 2


def _best(base: Job, hardware: Hardware, devices: int, tensor_size: int, pipeline_size: int) -> Plan:
    """The fastest plan of one tensor and pipeline size. Raises UserError, with the reason, when there is none."""
    if tensor_size > hardware.devices_per_node:
        raise UserError(f"tensor ranks must share one node, which has {hardware.devices_per_node} devices")
    if pipeline_size > base.config.num_layers:
        raise UserError(f"more stages than the {base.config.num_layers} layers")
    candidates, reasons = [], []
    for job in _variants(base, devices, tensor_size, pipeline_size):
        try:
            job.check()
        except UserError as error:
            reasons.append(str(error))
        else:
            candidates.append(job)
    if not candidates:
        raise UserError(reasons[0])
    measured = [(peak_memory(job, hardware), job) for job in candidates]
    fitting = [(peak, job) for peak, job in measured if peak <= hardware.capacity]
    if not fitting:
        smallest = min(peak for peak, _ in measured)
        raise UserError(f"needs {smallest / GIB:.1f} GiB at least, and {hardware.capacity / GIB:.1f} may be used")
    return min((Plan(job, peak, estimate(job, hardware)) for peak, job in fitting), key=lambda plan: plan.speed.step)


def _variants(base: Job, devices: int, tensor_size: int, pipeline_size: int) -> Iterator[Job]:
    layers = -(-base.config.num_layers // pipeline_size)
    data_size = devices // (tensor_size * pipeline_size)
    choices = product(
        _layouts(base, tensor_size, pipeline_size, data_size),
        (False, True) if data_size > 1 and base.framework.shards_weights else (False,),
        MICRO_BATCH_SIZES,
        sorted({0, layers // 2, layers}),
    )
    for layout, use_torch_fsdp2, micro_batch_size, recompute_layers in choices:
        yield dataclasses.replace(
            base,
            layout=layout,
            data_parallel_size=data_size,
            sequence_parallel=tensor_size > 1,
            use_distributed_optimizer=True,
            use_torch_fsdp2=use_torch_fsdp2,
            micro_batch_size=micro_batch_size,
            recompute_layers=recompute_layers,
        )


def _layouts(base: Job, tensor_size: int, pipeline_size: int, data_size: int) -> Iterator[Layout]:
    layers, rest = divmod(base.config.num_layers, pipeline_size)
    for shared, cut in _shared_experts(base.config.experts, tensor_size, data_size):
        plain = Layout(
            tensor_model_parallel_size=tensor_size,
            pipeline_model_parallel_size=pipeline_size,
            expert_model_parallel_size=shared,
            expert_tensor_parallel_size=cut,
        )
        yield plain.balanced(base.config.num_layers)
        if pipeline_size > 1 and not rest:
            for chunks in CHUNKS:
                if layers % chunks == 0:
                    yield dataclasses.replace(plain, num_layers_per_virtual_pipeline_stage=layers // chunks)


def _shared_experts(experts: Experts | None, tensor_size: int, data_size: int) -> Iterator[tuple[int, int | None]]:
    """How the ranks of a stage may share experts: how many do, a power of two, and how many cut each.

    None stands for all tensor ranks. Where they hold whole experts instead (1), they share them, too.
    """
    yield 1, None
    if experts is None:
        return
    for cut in (None, 1) if tensor_size > 1 else (None,):
        ranks = data_size * (tensor_size if cut else 1)
        shared = 1 if cut else 2
        while ranks % shared == 0 and experts.num_experts % shared == 0:
            yield shared, cut
            shared *= 2
