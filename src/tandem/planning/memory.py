"""Bytes that one rank holds: what the engines in `tandem.backends` keep, counted.

Parameters are counted tensor by tensor from the layout. The rest follows the method of "Reducing Activation
Recomputation in Large Transformer Models" (arXiv 2205.05198) and of Megatron-LM's `theoretical_memory_usage`, for what
a layer keeps here: both backends write their backward passes by hand, and recompute norms, SwiGLU and rotary heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from tandem.models.config import ModelConfig
from tandem.parallel.layout import Layout, even_rows, shards
from tandem.parallel.pipeline import one_forward_one_backward
from tandem.planning.hardware import Hardware
from tandem.planning.job import Job

# Logits of one chunk, fp32: `LOGITS_CHUNK_BYTES` of each backend's loss.
LOGITS_CHUNK_BYTES = {"torch": 64 * 2**20, "mindspore": 128 * 2**20}
# Numbers of a weight gradient that PyTorch forms at a time: `PIECE` of its functional.
PIECE = 2**20


@dataclass(frozen=True)
class StageMemory:
    """One rank of one pipeline stage: the first tensor and data rank, of which none holds more. Bytes.

    Attributes:
        layers: decoder layers.
        parameters: numbers, not bytes.
        optimizer: Adam's moments, and fp32 masters of bf16 weights.
        activations: kept for the backward pass when most micro-batches are in flight.
        logits: what the loss adds while it has a chunk of logits.
        workspace: what the backward pass of a layer adds. Either this or the logits are there.
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
    retained: float

    @property
    def peak(self) -> float:
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + max(self.logits, self.workspace) + self.retained


def stage_memories(job: Job, hardware: Hardware) -> list[StageMemory]:
    """What each pipeline stage holds."""
    return [_stage_memory(job, hardware, stage) for stage in range(job.pipeline_size)]


def peak_memory(job: Job, hardware: Hardware) -> float:
    """Bytes of the fullest rank."""
    return max(memory.peak for memory in stage_memories(job, hardware))


def stage_shapes(job: Job) -> list[list[tuple[int, ...]]]:
    """Shapes of the weights that the first tensor rank of each stage holds, a tied head's copy among them."""
    return _stage_shapes(job.config, job.layout)


@lru_cache(maxsize=256)
def _stage_shapes(config: ModelConfig, layout: Layout) -> list[list[tuple[int, ...]]]:
    shapes: list[list[tuple[int, ...]]] = [[] for _ in range(layout.pipeline_model_parallel_size)]
    for shard in shards(config, layout, tied_head_copy=True):
        if shard.tensor_rank == 0:
            shapes[shard.pipeline_rank].append(shard.shape)
    return shapes


def _stage_memory(job: Job, hardware: Hardware, stage: int) -> StageMemory:
    shapes = stage_shapes(job)[stage]
    layers = job.layers_of_stages[stage]
    parameters = sum(math.prod(shape) for shape in shapes)
    sharing = job.data_parallel_size if job.use_distributed_optimizer else 1
    optimized = sum(even_rows(shape[0], sharing, 0)[1] * math.prod(shape[1:]) for shape in shapes)
    is_last = stage == job.pipeline_size - 1
    # The normalised hidden states and their gradient are there, whole on each tensor rank, until the step's end.
    head = 2 * job.tokens * job.config.hidden_size * job.element_bytes if is_last else 0
    return StageMemory(
        layers=layers,
        parameters=parameters,
        weights=parameters * job.element_bytes,
        gradients=4 * parameters,
        optimizer=optimized * (12 if job.bf16 else 8),
        activations=_in_flight(job, stage) * _kept(job, layers) + head,
        logits=_logits(job) if is_last else 0,
        workspace=_workspace(job, layers) + _gradient_temporaries(job, shapes),
        retained=hardware.retained,
    )


def _in_flight(job: Job, stage: int) -> float:
    """Micro-batches whose activations a stage holds at most; parts of one where stages are interleaved."""
    # Once a pipeline is full, more micro-batches change nothing.
    micro_batches = min(job.micro_batches, 2 * job.pipeline_size)
    return _chunks_in_flight(stage, job.pipeline_size, job.chunks, micro_batches) / job.chunks


@lru_cache(maxsize=4096)
def _chunks_in_flight(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    steps = one_forward_one_backward(stage, stages, chunks, micro_batches)
    return max(accumulate(1 if step.forward else -1 for step in steps))


def _kept(job: Job, layers: int) -> float:
    """What a stage of so many layers keeps of one micro-batch."""
    recomputed = min(job.recompute_layers, layers)
    residual = _residual(job)
    # Every layer's output is the next one's input, or what the final norm, or a neighbour, is given.
    return recomputed * residual + (layers - recomputed) * layer_activations(job) + residual


def _residual(job: Job) -> float:
    return job.tokens * job.config.hidden_size * job.element_bytes / job.sequence_split


def layer_activations(job: Job) -> float:
    """What a layer that is not recomputed keeps of one micro-batch.

    Its input and the input of its second half, [t, h]; queries, keys and values; the output of attention; gate and
    up; and in fp32 attention's log-sum-exp and the two norms' scales.
    """
    config, split = job.config, job.tensor_size
    heads, groups = config.num_attention_heads, config.num_query_groups
    inner = (2 * heads + 2 * groups) * config.kv_channels + 2 * config.ffn_hidden_size
    scales = 4 * job.tokens * (heads / split + 2 / job.sequence_split)
    return 2 * _residual(job) + job.tokens * inner * job.element_bytes / split + scales


def _logits(job: Job) -> float:
    """A chunk's logits (in bf16 also as they come and as their gradient goes), and the head's gradient in pieces."""
    vocabulary = -(-job.config.vocab_size // job.tensor_size)
    rows = min(job.tokens, max(1, LOGITS_CHUNK_BYTES[job.ai_framework] // (4 * vocabulary)))
    # The product for a piece, and both its factors, which are copied as oneDNN wants them.
    hidden = job.config.hidden_size
    piece = min(vocabulary, max(1, PIECE // hidden))
    pieces = 4 * piece * hidden + rows * (piece + hidden) * job.element_bytes
    return rows * vocabulary * (8 if job.bf16 else 4) + pieces


def _workspace(job: Job, layers: int) -> float:
    """What the backward pass of one layer needs at once, beyond what the forward pass kept.

    The larger of its halves. The MLP: gate's and up's gradient, the product's gradient and one factor. Attention: the
    gradients of queries, keys and values, and of the fused tensor that they come from; for the norm of the queries
    three fp32 copies. Besides, the gradient of the residual stream, whole where tensor ranks gathered it.
    """
    config = job.config
    heads, groups = config.num_attention_heads, config.num_query_groups
    mlp = 4 * config.ffn_hidden_size * job.element_bytes
    attention = ((3 * heads + 4 * groups) * job.element_bytes + 3 * heads * 4) * config.kv_channels
    gradients = 2 * job.tokens * config.hidden_size * job.element_bytes
    # A recomputed layer's activations come back, unless those of a later one that was kept have just been freed.
    again = layer_activations(job) if job.recompute_layers >= layers else 0
    half = job.tokens * max(mlp, attention) / job.tensor_size
    return half + gradients + again


def _gradient_temporaries(job: Job, shapes: list[tuple[int, ...]]) -> float:
    """On MindSpore a weight's new gradient is a tensor of its own: beside the last step's, and beside their sum."""
    if job.ai_framework != "mindspore":
        return 0
    return 4 * max(math.prod(shape) for shape in shapes) * (2 if job.micro_batches > 1 else 1)
