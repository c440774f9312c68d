"""An estimate of a step's time, from peak rates, counted kernels and stated assumptions. It is no measurement.

A device computes products and attention at a share of its peak, and moves the bytes that all other kernels were counted
to read and write (`counted`) at its memory's rate. Meanwhile the host launches the counted kernels. The slower of the
two is the time:

    compute = max(FLOPs / (peak x efficiency) + bytes / bandwidth, kernels x seconds of a launch)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tandem.models.config import ModelConfig
from tandem.models.flops import training_flops
from tandem.models.tensors import tensor_table
from tandem.planning.counted import Counted, counted
from tandem.planning.hardware import Hardware
from tandem.planning.job import Job
from tandem.planning.memory import expert_copies, layer_activations, loss_chunks, stage_memories, stage_weights
from tandem.planning.traffic import stage_traffic

LINEAR_LAYERS = 7  # of a layer, under Hugging Face's names: each can have an adapter
ASSUMPTIONS = "no communication overlaps with computation; every stage takes as long as the slowest"


@dataclass(frozen=True)
class Speed:
    """Seconds of one step, by part, and the rates that follow from them.

    Attributes:
        compute, tensor, pipeline: of the slowest stage, over all micro-batches: arithmetic, communication between
            tensor ranks, communication between stages.
        bubble: waiting for the pipeline to fill and to drain.
        experts: sending tokens to experts on other ranks, and back.
        data: summing gradients and gathering weights over data ranks; when fully sharded, in each micro-batch.
        optimizer: reading and writing weights, gradients and moments.
        tokens_per_second: of all devices together.
        mfu: the model's FLOPs without recomputation (`models.flops`) over the peak of all devices.
    """

    compute: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float
    tokens_per_second: float
    mfu: float
    experts: float = 0.0

    @property
    def step(self) -> float:
        return self.compute + self.tensor + self.experts + self.pipeline + self.bubble + self.data + self.optimizer


def bubble_share(job: Job) -> float:
    """What a pipeline's bubble adds, as a share of its micro-batches' time: (p - 1) / (v m) (arXiv 2104.04473, 2.2)."""
    return (job.pipeline_size - 1) / (job.chunks * job.micro_batches)


def estimate(job: Job, hardware: Hardware) -> Speed:
    stages = range(job.pipeline_size)
    traffic = [stage_traffic(job, stage) for stage in stages]
    tensor_bandwidth = hardware.bandwidth(job.tensor_size, 1)
    pipeline_bandwidth = hardware.bandwidth(job.pipeline_size, job.devices // job.pipeline_size)
    expert_bandwidth = hardware.bandwidth(job.layout.expert_size, job.layout.expert_tensor_size)
    data_bandwidth = hardware.bandwidth(*_ranks_of_gradients(job))

    def parts(stage: int) -> tuple[float, float, float, float]:
        sent = traffic[stage]
        experts = sent.experts / expert_bandwidth if sent.experts else 0.0
        pipeline = sent.pipeline / pipeline_bandwidth if sent.pipeline else 0.0
        tensor = sent.tensor / tensor_bandwidth if sent.tensor else 0.0
        return _compute(job, hardware, stage), tensor, pipeline, experts

    compute, tensor, pipeline, experts = max(map(parts, stages), key=sum)
    sent_data = max(sent.data for sent in traffic)
    data = sent_data / data_bandwidth if sent_data else 0.0
    passes = compute + tensor + pipeline + experts + (data if job.fully_sharded else 0.0)
    memories = stage_memories(job, hardware)
    optimizer = max(memory.gradients + 2 * memory.optimizer + memory.weights for memory in memories)
    speed = Speed(
        compute=compute,
        tensor=tensor,
        pipeline=pipeline,
        bubble=passes * bubble_share(job),
        data=data,
        optimizer=max(optimizer / hardware.memory_bandwidth, kernels(job, hardware)[1] * hardware.launch_seconds),
        tokens_per_second=0.0,
        mfu=0.0,
        experts=experts,
    )
    tokens = job.global_batch_size * job.documents * job.seq_length
    flops = job.global_batch_size * job.documents * training_flops(job.config, [job.seq_length])
    rate = flops / speed.step / job.devices
    return dataclasses.replace(speed, tokens_per_second=tokens / speed.step, mfu=rate / hardware.flops(job.half))


def _ranks_of_gradients(job: Job) -> tuple[int, int]:
    """How many ranks exchange gradients, and how far apart: data ranks, or tensor ranks that hold the same experts."""
    if job.data_parallel_size > 1:
        return job.data_parallel_size, job.tensor_size
    return expert_copies(job.layout, 1), 1


def _compute(job: Job, hardware: Hardware, stage: int) -> float:
    """Seconds of a stage's arithmetic in one step."""
    layers = job.layers_of_stages[stage]
    repeated = min(job.recompute_layers, layers) / 3  # a forward pass is a third of a layer's work
    layer, head = _flops(job.config, job.seq_length)
    sequences = job.global_batch_size / job.data_parallel_size / job.tensor_size
    last = head if stage == job.pipeline_size - 1 else 0
    flops = job.documents * sequences * ((layers + repeated) * layer + last)
    if job.config.lora is not None:
        flops *= 2 / 3  # of three products with a weight, that for its gradient is left out
    flops += job.scored_documents * sequences * (layers * layer + last) / 3
    products = flops / (hardware.flops(job.half) * hardware.efficiency)
    moved = job.micro_batches * _moved(job, hardware, stage)
    launched = kernels(job, hardware, stage)[0] * hardware.launch_seconds
    return max(products + moved / hardware.memory_bandwidth, launched)


def _moved(job: Job, hardware: Hardware, stage: int) -> float:
    """Bytes that a micro-batch moves besides those of products and attention."""
    counts, layers = counted(job.framework.name, hardware.maker), job.layers_of_stages[stage]
    passes = layers * counts.passes + min(job.recompute_layers, layers) * counts.passes_again
    moved = passes * layer_activations(job)
    moved += counts.gradient_bytes * stage_weights(job, stage, trained=True).inside
    if stage == job.pipeline_size - 1:
        of_weight = counts.head_bytes * job.config.hidden_size * loss_chunks(job, hardware)
        moved += (counts.logit_bytes * job.tokens + of_weight) * job.config.vocab_size / job.tensor_size
    return moved


def kernels(job: Job, hardware: Hardware, stage: int = 0) -> tuple[int, int]:
    """Kernels of a step's passes, and of its update. Those of communication are not counted."""
    counts, layers = counted(job.framework.name, hardware.maker), job.layers_of_stages[stage]
    of_micro_batch = (
        layers * _of_layer(job.config, counts) + min(job.recompute_layers, layers) * counts.again + counts.micro_batch
    )
    if job.scored_documents:
        of_micro_batch += layers * counts.again
    if stage == job.pipeline_size - 1:
        of_micro_batch += counts.chunk * loss_chunks(job, hardware)
    return round(job.micro_batches * of_micro_batch), layers * counts.update + counts.step


def _of_layer(config: ModelConfig, counts: Counted) -> float:
    """Kernels of a layer in a micro-batch: the mean over those with and without experts and adapters."""
    sparse = 0.0 if config.experts is None else 1 - config.dense_layers / config.num_layers
    adapted = 0.0
    if config.lora is not None:
        adapters = {spec.adapter.a for spec in tensor_table(config).values() if spec.adapter is not None}
        adapted = len(adapters) / (LINEAR_LAYERS * config.num_layers)
    return counts.layer + sparse * counts.experts + adapted * counts.adapters


def _flops(config: ModelConfig, seq_length: int) -> tuple[float, float]:
    """FLOPs of one sequence, forward and backward: of a layer, and of the head."""
    head = training_flops(dataclasses.replace(config, num_layers=0), [seq_length])
    return training_flops(dataclasses.replace(config, num_layers=1), [seq_length]) - head, head
