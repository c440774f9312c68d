"""Bytes that one rank sends in a step, by the axis of the grid that they travel along.

Collectives are counted as rings. For an all-gather or a reduce-scatter of a tensor of S bytes, each of n ranks sends
(n - 1) / n S. An all-reduce is both, and sends twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.planning.job import Job
from tandem.planning.memory import expert_copies, stage_weights


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank of one stage sends in a step, along each axis; `experts`: to and from other ranks' experts."""

    tensor: float
    pipeline: float
    data: float
    experts: float = 0.0


def stage_traffic(job: Job, stage: int) -> Traffic:
    return Traffic(_tensor(job, stage), _pipeline(job, stage), _data(job, stage), _experts(job, stage))


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tensor(job: Job, stage: int) -> float:
    """Passes over the hidden states of a micro-batch, each an all-gather or a reduce-scatter of [t, h].

    A layer has two before and two after its tensor-parallel halves (arXiv 2205.05198, figure 5), and four in the
    backward pass. With sequence parallelism, the backward pass has two more, which gather what was kept split. A
    recomputed layer runs its forward pass twice. The embedding scatters and the head gathers; their backward passes do
    the opposite.
    """
    layers = job.layers_of_stages[stage]
    recomputed = min(job.recompute_layers, layers)
    passes = layers * (10 if job.sequence_parallel else 8) + 4 * recomputed
    passes += 2 * (stage == 0) + 2 * (stage == job.pipeline_size - 1)
    hidden = job.tokens * job.config.hidden_size * job.element_bytes
    return job.micro_batches * passes * hidden * _ring(job.tensor_size)


def _pipeline(job: Job, stage: int) -> float:
    """Outputs to the next stage, and gradients to the stage before.

    A tied embedding's gradient is summed over the two stages that hold it: the rows that a data rank updates.
    """
    if job.pipeline_size == 1:
        return 0.0
    is_first, is_last = stage == 0, stage == job.pipeline_size - 1
    sends = job.micro_batches * (2 * job.chunks - is_first - is_last)
    sent = sends * job.tokens * job.config.hidden_size * job.element_bytes / job.sequence_split
    if job.config.tied and (is_first or is_last):
        rows = job.tensor_size * job.optimizer_split
        sent += 4 * job.config.vocab_size * job.config.hidden_size / rows
    return sent


def _data(job: Job, stage: int) -> float:
    """Gradients in fp32 are summed. With the distributed optimizer they are scattered, and new weights are gathered.

    When fully sharded, every micro-batch gathers the weights of layers for its forward and for its backward pass, and
    scatters their gradients. That is three times the parameters, where data parallelism sends twice ("ZeRO", arXiv
    1910.02054, section 7.2.2). What is outside layers stays whole for a step (`tandem.backends.torch.fully_sharded`).
    Rows are padded, so that every rank sends equally many.
    """
    ranks = job.data_parallel_size
    if job.fully_sharded:
        rows, trained = stage_weights(job, stage, ranks), stage_weights(job, stage, ranks, trained=True)
        layers = job.micro_batches * (2 * job.element_bytes * rows.inside + 4 * trained.inside)
        return (ranks - 1) * (layers + job.element_bytes * rows.outside + 4 * trained.outside)
    passes = (4 + job.element_bytes) if job.use_distributed_optimizer else 2 * 4
    weights = stage_weights(job, stage, trained=True)
    copies = expert_copies(job.layout, ranks)
    return passes * ((weights.total - weights.experts) * _ring(ranks) + weights.experts * _ring(copies))


def _experts(job: Job, stage: int) -> float:
    """Rows of tokens that go to experts on other ranks and come back, when experts are equally busy.

    A row has the hidden size, and a factor on the way there. Each pass takes it there and back; a recomputed layer has
    a second forward pass. Tensor ranks that share experts each send a part of the tokens.
    """
    config, layout = job.config, job.layout
    if config.experts is None or layout.expert_size == 1:
        return 0.0
    sparse = job.layers_of_stages[stage] * (config.num_layers - config.dense_layers) / config.num_layers
    passes = 2 + min(1.0, job.recompute_layers / job.layers_of_stages[stage])
    parts = job.tensor_size // layout.expert_tensor_size
    rows = job.tokens * config.experts.moe_router_topk / parts
    row = (2 * config.hidden_size + 1) * job.element_bytes
    return job.micro_batches * sparse * passes * rows * row * _ring(layout.expert_size)
