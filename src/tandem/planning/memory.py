"""Bytes that one rank holds: what the engines in `tandem.backends` keep, counted.

Parameters are counted tensor by tensor from the layout. The rest follows the method of "Reducing Activation
Recomputation in Large Transformer Models" (arXiv 2205.05198) and of Megatron-LM's `theoretical_memory_usage`. A layer
keeps less here than there: both backends recompute norms, SwiGLU and rotary heads in backward passes of their own.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from tandem.frameworks import GRADIENT_PIECE
from tandem.models.config import ModelConfig
from tandem.models.families import ROUTER
from tandem.models.tensors import TensorSpec, is_trained, tensor_table
from tandem.parallel.layout import Layout, even_rows, shards
from tandem.parallel.pipeline import one_forward_one_backward
from tandem.planning.hardware import Hardware
from tandem.planning.job import Job


@dataclass(frozen=True)
class Gathered:
    """Bytes of whole weights and gradients, in addition to a rank's rows, at three moments of a step (`_gathered`).

    Attributes:
        loss: while there are logits.
        backward: in the backward pass of a layer.
        scatter: when the gradients of weights outside layers are scattered, and activations are freed.
    """

    loss: float = 0
    backward: float = 0
    scatter: float = 0


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage: the first tensor and data rank, since no other rank holds more.

    Attributes:
        layers: decoder layers.
        parameters: numbers, not bytes, of all weights that compute here.
        weights, gradients: of the rank's rows only when they are fully sharded. What is not trained has no gradient.
        optimizer: Adam's moments, and fp32 masters of bf16 or fp16 weights, of what is trained.
        activations: kept for the backward pass when most micro-batches are in flight.
        logits: what the loss adds while it has a chunk of logits.
        workspace: what the backward pass of a layer adds. It is never there together with the logits.
        gathered: whole weights and gradients; nothing unless they are fully sharded.
        retained: freed memory that the allocator keeps.
    """

    layers: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float
    gathered: Gathered
    retained: float

    @property
    def peak(self) -> float:
        state = self.weights + self.gradients + self.optimizer
        loss = self.activations + self.logits + self.gathered.loss
        backward = self.activations + self.workspace + self.gathered.backward
        return state + max(loss, backward, self.gathered.scatter) + self.retained

    @property
    def gathered_at_peak(self) -> float:
        """Bytes that `gathered` adds to the peak."""
        return self.peak - dataclasses.replace(self, gathered=Gathered()).peak


def stage_memories(job: Job, hardware: Hardware) -> list[StageMemory]:
    """What each pipeline stage holds."""
    return [_stage_memory(job, hardware, stage) for stage in range(job.pipeline_size)]


def peak_memory(job: Job, hardware: Hardware) -> float:
    """Bytes of the fullest rank."""
    return max(memory.peak for memory in stage_memories(job, hardware))


@dataclass(frozen=True)
class StageWeights:
    """Numbers in the weights of one tensor rank of a stage: inside layers, and outside, with a tied head's copy.

    Attributes:
        largest: the numbers of the largest tensor.
        experts: those inside layers that are experts'.
    """

    inside: int
    outside: int
    largest: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.inside + self.outside


def stage_weights(job: Job, stage: int, ranks: int = 1, *, trained: bool = False) -> StageWeights:
    """The weights of the first tensor rank: the rows of the first of `ranks` data ranks. No rank has more.

    Args:
        trained: only those that training changes.
    """
    return _stage_weights(job.config, job.layout, ranks, trained)[stage]


@lru_cache(maxsize=256)
def _stage_weights(config: ModelConfig, layout: Layout, ranks: int, trained: bool) -> list[StageWeights]:
    weights = [StageWeights(0, 0, 0)] * layout.pipeline_model_parallel_size
    for stage, spec, (rows, *rest) in _first_shapes(config, layout):
        if is_trained(config, spec) or not trained:
            of_experts = bool(spec.split.experts)
            copies = expert_copies(layout, ranks) if of_experts and ranks > 1 else ranks
            numbers = even_rows(rows, copies, 0)[1] * math.prod(rest)
            inside, outside = (0, numbers) if spec.layer is None else (numbers, 0)
            so_far = weights[stage]
            weights[stage] = StageWeights(
                so_far.inside + inside,
                so_far.outside + outside,
                max(so_far.largest, numbers),
                so_far.experts + numbers * of_experts,
            )
    return weights


@lru_cache(maxsize=8)
def _first_shapes(config: ModelConfig, layout: Layout) -> list[tuple[int, TensorSpec, tuple[int, ...]]]:
    """Stage, tensor and shape of all that the first rank of each stage holds."""
    held = shards(config, layout, tied_head_copy=True, first_ranks_only=True)
    return [(shard.pipeline_rank, shard.spec, shard.shape) for shard in held]


def expert_copies(layout: Layout, data_ranks: int) -> int:
    """How many of the ranks of a stage, with so many data ranks, hold the same experts."""
    return layout.tensor_model_parallel_size * data_ranks // (layout.expert_tensor_size * layout.expert_size)


def _stage_memory(job: Job, hardware: Hardware, stage: int) -> StageMemory:
    layers = job.layers_of_stages[stage]
    weights, trained = stage_weights(job, stage), stage_weights(job, stage, trained=True)
    optimized = stage_weights(job, stage, job.optimizer_split, trained=True).total
    # The rows of `fully_shard` are fp32: they need no masters.
    kept, kept_bytes = weights.total, job.element_bytes
    if job.fully_sharded:
        kept, kept_bytes = stage_weights(job, stage, job.optimizer_split).total, 4
    is_last = stage == job.pipeline_size - 1
    # The normalised hidden states and their gradient stay until the step's end, whole on each tensor rank.
    head = 2 * job.tokens * job.config.hidden_size * job.element_bytes if is_last else 0
    return StageMemory(
        layers=layers,
        parameters=weights.total,
        weights=kept_bytes * kept,
        gradients=4 * (optimized if job.fully_sharded else trained.total),
        optimizer=optimized * (job.moments.moment_bytes + (4 if kept_bytes < 4 else 0)),
        activations=_in_flight(job, stage) * _kept(job, layers) + head,
        logits=_logits(job, hardware) if is_last else 0,
        workspace=_workspace(job, layers) + _gradient_temporaries(job, trained),
        gathered=_gathered(job, layers, weights, trained) if job.fully_sharded else Gathered(),
        retained=hardware.retained,
    )


def _in_flight(job: Job, stage: int) -> float:
    """The most micro-batches whose activations a stage holds at once; a fraction where stages are interleaved."""
    # When a pipeline is full, more micro-batches change nothing.
    micro_batches = min(job.micro_batches, 2 * job.pipeline_size)
    return _chunks_in_flight(stage, job.pipeline_size, job.chunks, micro_batches) / job.chunks


@lru_cache(maxsize=4096)
def _chunks_in_flight(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    steps = one_forward_one_backward(stage, stages, chunks, micro_batches)
    return max(accumulate(1 if step.forward else -1 for step in steps))


def _kept(job: Job, layers: int) -> float:
    """Bytes that a stage of `layers` layers keeps of one micro-batch."""
    recomputed = min(job.recompute_layers, layers)
    residual = _residual(job)
    # The last layer's output is the input of the final norm, or of the next stage.
    return recomputed * residual + (layers - recomputed) * layer_activations(job) + residual


def _residual(job: Job) -> float:
    return job.tokens * job.config.hidden_size * job.element_bytes / job.sequence_split


def layer_activations(job: Job) -> float:
    """Bytes that a layer keeps of one micro-batch when it is not recomputed.

    Its input and the input of its second half, [t, h]; queries, keys and values; the output of attention; gate and
    up; and in fp32 attention's log-sum-exp and the two norms' scales.
    """
    config, split = job.config, job.tensor_size
    heads, groups = config.num_attention_heads, config.num_query_groups
    inner = (2 * heads + 2 * groups) * config.kv_channels + 2 * _mlp_width(config)
    scales = 4 * job.tokens * (heads / split + 2 / job.sequence_split)
    kept = 2 * _residual(job) + job.tokens * inner * job.element_bytes / split + scales
    if config.experts is not None:  # of each token, its probability for each expert
        kept += 4 * job.tokens * config.experts.num_experts
        if job.layout.expert_size > 1:  # and the rows that came from other ranks
            rows = job.tokens * config.experts.moe_router_topk * job.layout.expert_tensor_size / split
            kept += rows * config.hidden_size * job.element_bytes
    return kept + _adapter_activations(config) * job.tokens * job.element_bytes


@lru_cache(maxsize=8)
def _mlp_width(config: ModelConfig) -> int:
    """The inner numbers of a token in a layer's MLP, or in all of its experts; the larger where a model has both."""
    dense = config.ffn_hidden_size if config.dense_layers or config.experts is None else 0
    sparse = config.experts.moe_router_topk * config.experts.moe_ffn_hidden_size if config.experts else 0
    return max(dense, sparse)


@lru_cache(maxsize=256)
def _adapter_activations(config: ModelConfig) -> int:
    """Numbers that the adapters of a layer keep of each token: the products with A; with DoRA, also those with W.

    Those of experts keep a product for each of a token's experts. A router's keeps none.
    """
    table = tensor_table(config)
    products = [spec.adapter for name, spec in table.items() if spec.adapter is not None and name == spec.adapter.a]
    if config.lora is None or not products:
        return 0
    layers = len({adapter.layer for adapter in products})
    chosen = config.experts.moe_router_topk if config.experts else 0
    kept = sum(
        adapter.rank * (chosen if adapter.experts else 1) for adapter in products if not adapter.weight.endswith(ROUTER)
    )
    if config.lora.use_dora:
        kept += sum(table[weight].shape[0] for weight in {adapter.weight for adapter in products})
    return kept // layers


def loss_chunks(job: Job, hardware: Hardware) -> int:
    """Chunks of rows in the loss of a micro-batch."""
    return -(-job.tokens // _chunk_rows(job, hardware))


def _chunk_rows(job: Job, hardware: Hardware) -> int:
    framework = job.framework
    most = framework.logits_chunk_bytes if hardware.is_cpu else framework.device_logits_chunk_bytes
    return max(1, most // (4 * _vocabulary(job)))


def _vocabulary(job: Job) -> int:
    """Rows of the head on the first tensor rank."""
    return -(-job.config.vocab_size // job.tensor_size)


def _logits(job: Job, hardware: Hardware) -> float:
    """A chunk of rows in the loss: its logits, their gradient, and on a CPU the head's gradient in pieces."""
    vocabulary, rows = _vocabulary(job), min(job.tokens, _chunk_rows(job, hardware))
    if not hardware.is_cpu:
        return rows * vocabulary * (job.framework.device_logits_bytes if job.half else 8)
    # The product for a piece, and both its factors, which are copied into oneDNN's layout.
    hidden = job.config.hidden_size
    piece = min(vocabulary, max(1, GRADIENT_PIECE // hidden))
    pieces = 4 * piece * hidden + rows * (piece + hidden) * job.element_bytes
    return rows * vocabulary * (8 if job.half else 4) + pieces


def _workspace(job: Job, layers: int) -> float:
    """What the backward pass of one layer needs at once, beyond what the forward pass kept.

    The larger of its two halves counts. The MLP: the gradients of gate, up and their product, and one factor.
    Attention: the gradients of queries, keys and values, and of the fused tensor that they come from; three fp32 copies
    for the norm of the queries. To either, the gradient of the residual stream is added, whole where tensor ranks
    gathered it.
    """
    config = job.config
    heads, groups = config.num_attention_heads, config.num_query_groups
    mlp = 4 * _mlp_width(config) * job.element_bytes
    if config.experts is not None:  # a row for each of a token's experts: its input, and the gradient of its output
        mlp += (2 * config.experts.moe_router_topk * config.hidden_size * job.tensor_size) * job.element_bytes
    attention = ((3 * heads + 4 * groups) * job.element_bytes + 3 * heads * 4) * config.kv_channels
    gradients = 2 * job.tokens * config.hidden_size * job.element_bytes
    # A recomputed layer's activations come back. They add nothing if a later layer's have just been freed.
    recomputed = layer_activations(job) if job.recompute_layers >= layers else 0
    half = job.tokens * max(mlp, attention) / job.tensor_size
    return half + gradients + recomputed


def _gathered(job: Job, layers: int, weights: StageWeights, trained: StageWeights) -> Gathered:
    """Whole weights and fp32 gradients that `fully_shard` has gathered. A unit is a layer, or all outside layers.

    "PyTorch FSDP" (arXiv 2304.11277), section 3, counts the rows of all units and one whole unit. The code of PyTorch
    2.13 (torch/distributed/fsdp/_fully_shard) and of `tandem.backends.torch.fully_sharded` keeps more:

    - Weights and gradients outside layers stay whole from the first micro-batch to the end of the last one.
    - A layer's backward pass has its weights and gradients, and the gathered weights of the layer before it.
    - From the second backward pass on, it also has a copy of the previous layer's scattered gradients. That layer's
      activations are freed by then.
    - Gradients outside layers are copied to be scattered. Their weights are freed by then.
    """
    layer, trained_of_layer = weights.inside / layers, trained.inside / layers
    outside = job.element_bytes * weights.outside + 4 * trained.outside
    # A recomputed layer takes the memory of the activations of the layer after it.
    freed = layer_activations(job) if job.recompute_layers < layers - 1 else 0
    scattered = max(0.0, 4 * trained_of_layer - freed) if layers > 1 else 0
    return Gathered(
        loss=outside,
        backward=outside + min(layers, 2) * job.element_bytes * layer + 4 * trained_of_layer + scattered,
        scatter=2 * 4 * trained.outside,
    )


def _gradient_temporaries(job: Job, trained: StageWeights) -> float:
    """Bytes of a weight's new gradient, and of the sum with the old one, where the framework does not add in place."""
    if job.framework.adds_gradients_in_place:
        return 0
    return 4 * trained.largest * (2 if job.micro_batches > 1 else 1)
