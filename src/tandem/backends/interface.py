"""The seam between the training loop and a framework: one optimizer step over a global batch, NumPy in and out.

A backend knows no files, schedules, logs or commands; the loop knows no devices, no tensors on them and no
parallelism. `tandem.backends.torch` and `tandem.backends.mindspore` implement `Engine` under the same file and
function names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tandem.checkpoints.interface import TensorKind, TensorSource
from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Shard


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What a backend must know to build a model and its optimizer.

    Attributes:
        fp16: compute in float16 with fp32 master weights; the caller scales the loss.
        bf16: compute in bfloat16 with fp32 master weights, where the device computes it natively; elsewhere the
            engine computes in fp32 and says so in `notices`.
        recompute_layers: how many of a rank's decoder layers, from the first, keep only their input in the forward
            pass and are computed again in the backward pass.
        training: allocate gradients and optimizer state.
        device: "cpu", "cuda", "npu"; None takes the best one present.
        grid, rank: all processes of the job, and which of them this one is. With more than one, `connect` comes first.
        sequence_parallel: between tensor ranks, split norms and residuals along the tokens.
        use_distributed_optimizer: each data rank keeps the rows of masters and moments that `even_rows` gives it.
        use_torch_fsdp2: a data rank keeps these rows of everything, weights and gradients, too, and has a layer's whole
            weights only while it computes (PyTorch's `fully_shard`).
    """

    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    bf16: bool = False
    fp16: bool = False
    recompute_layers: int = 0
    training: bool = True
    device: str | None = None
    grid: Grid = field(default_factory=Grid)
    rank: int = 0
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    use_torch_fsdp2: bool = False


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on every rank.

    Attributes:
        loss: the weighted sum over the trained tokens of the whole global batch.
        grad_norm: global L2 norm of the gradients, before clipping.
        trained_tokens: labels that counted, over the whole global batch.
        applied: False when a number was not finite, or the loss 0 or above its limit: weights and optimizer state are
            as before.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    applied: bool


class Engine(Protocol):
    """One rank's share of a model with its optimizer.

    With several ranks every method but `tensors` and `peak_memory` is collective: all ranks call it, in the same
    order, and a rank's micro-batches are those of its data rank.
    """

    config: ModelConfig
    notices: list[str]  # what the user should be told once, such as a fall-back
    device_name: str  # as the framework calls it; "cpu"
    param_dtype: str  # dtype of the "model" kind, a key of tandem.checkpoints.interface.DTYPES
    optimizer_step: int  # updates applied so far (Adam's t)

    def load_weights(self, source: TensorSource) -> None:
        """Take this rank's slice of every weight, and its masters, from the kinds that `kinds_to_load` names."""
        ...

    def load_optimizer(self, source: TensorSource, optimizer_step: int) -> None:
        """Take this rank's share of Adam's moments."""
        ...

    def tensors(self, first_rank: int = 0) -> Iterator[tuple[TensorKind, Shard, np.ndarray]]:
        """Everything a checkpoint must hold of this rank, as (kind, which part of which tensor, host array): what
        `saved_shards` lists, by rows where the settings shard that kind, "model" first. `first_rank` is the first that
        writes to this rank's disk. An array is valid until the next one is asked for."""
        ...

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        weights: Sequence[np.ndarray],
        lr: float,
        weight_decay: float,
        loss_limit: float = math.inf,
        loss_scale: float = 1.0,
    ) -> StepResult:
        """Forward and backward over all micro-batches, clip, AdamW; the update only when loss and norm are finite, and
        the loss is above 0 and at most `loss_limit`.

        The loss is the sum of weight * -log p(label) over the tokens of all ranks' micro-batches, so the split into
        micro-batches and over data ranks does not matter. AdamW: "Decoupled Weight Decay Regularization" (arXiv
        1711.05101), bias corrected, no decay on 1-D tensors.

        Args:
            weights: of the tokens of each micro-batch, float64 [t] (`tandem.training.objectives`). A token whose label
                is IGNORE weighs nothing, whatever stands there.
            loss_scale: the gradients of so many times the loss are computed, and divided by it before they are used.

        Raises:
            ValueError: there is not one weight for each token.
        """
        ...

    def loss_and_gradients(
        self, micro_batches: Sequence[MicroBatch], weights: Sequence[np.ndarray]
    ) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and the gradients that `train_step` would use, before clipping, of the shards that this rank
        holds, by global name; changes no state."""
        ...

    def first_bad_output(self, micro_batches: Sequence[MicroBatch]) -> str | None:
        """The first module of this rank, by its global name, whose output in the forward pass is not finite."""
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Sum of the losses of the trained tokens of all ranks' micro-batches, and their number. Data ranks may bring
        different numbers of micro-batches."""
        ...

    def peak_memory(self) -> int:
        """Bytes of this rank's device that were in use at the worst moment so far; on CPU, of its process. Not
        collective."""
        ...

    def logits(self, micro_batch: MicroBatch, rows: np.ndarray | None = None) -> np.ndarray:
        """Logits, fp32 [len(rows), vocabulary], of the given positions of the micro-batch (all when None). One
        process only."""
        ...


class Profiler(Protocol):
    """The framework's profiler, running since it was made."""

    def stop(self) -> tuple[dict[str, float], str]:
        """End it. Returns seconds by module, and where the framework's own trace lies."""
        ...
