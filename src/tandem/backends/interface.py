"""What the training loop and a framework agree on: one optimizer step over a global batch, NumPy in and out.

A backend knows no files, schedules, logs or commands; the loop knows no devices, no tensors on them and no
parallelism. `tandem.backends.torch` and `tandem.backends.mindspore` implement `Engine` under the same file and
function names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import numpy as np

from tandem.checkpoints.interface import TensorKind, TensorSource
from tandem.config.settings import AdamSettings, ComputeSettings, RouterSettings, ShardingSettings
from tandem.data.batch import AskedBatch, MicroBatch
from tandem.models.config import ModelConfig
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Shard


@dataclass(frozen=True, kw_only=True)
class EngineSettings(AdamSettings, ComputeSettings, ShardingSettings, RouterSettings):
    """What a backend must know to build a model and its optimizer: some settings of a run, and these.

    `bf16` computes in bfloat16 only where the device does. Elsewhere the engine computes in fp32 and says so in its
    `notices`. With `fp16` the caller scales the loss.
    """

    recompute_layers: int = 0
    """How many of a rank's decoder layers, from the first, keep only their input in the forward pass and are computed
    again in the backward pass."""
    training: bool = True
    """Allocate gradients and optimizer state."""
    grid: Grid = field(default_factory=Grid)
    """All processes of the job. With more than one, `connect` comes first."""
    rank: int = 0
    """Which of them this one is."""


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, the same on every rank.

    Attributes:
        loss: the weighted sum over the trained tokens of the whole global batch, or the loss that was given.
        grad_norm: global L2 norm of the gradients, before clipping.
        trained_tokens: how many labels of the whole global batch counted.
        applied: False when a number was not finite, or the loss was 0 or above its limit. Weights and optimizer state
            are then unchanged.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    applied: bool


@dataclass
class ExpertLoad:
    """How one rank's share of a step's tokens was routed. What all ranks have adds up to the whole.

    Attributes:
        counts: layer -> how many tokens each expert got, [E].
        load_balancing, z: sums of the losses that balance experts, without their coefficients. They are noted also
            where the gradient has no part of them.
        terms: of how many layers and micro-batches the z-loss is a sum.
        balanced: of how many the load-balancing loss is. The pooled form is one for all layers.
        dropped: choices of tokens that experts with a capacity did not take; None where they have none.
    """

    counts: dict[int, list[int]] = field(default_factory=dict)
    load_balancing: float = 0.0
    z: float = 0.0
    terms: int = 0
    balanced: int = 0
    dropped: int | None = None


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence: its prompt, a part of it, or the token that was chosen last.

    Attributes:
        rows: after which of the tokens logits are wanted, counted within the piece, ascending.
    """

    sequence: int
    tokens: Sequence[int]
    rows: Sequence[int]


class Session(Protocol):
    """Sequences that an engine continues. The keys and values of their tokens are kept, in the model's dtype.

    Of the ranks that hold a copy of the model together, the first one leads: it alone calls `begin`, `copy`, `rewind`,
    `end` and `step`, while the others are in `follow`. Data ranks have sessions of their own, which know nothing of
    each other. Leaving a session as a context closes it.

    Attributes:
        leads: whether this rank leads.
        room: how many tokens all sequences together may have; where data ranks share experts, those of each.
        free: how many of them no sequence has reserved; where data ranks share experts, on the one with most.
    """

    room: int

    @property
    def leads(self) -> bool: ...

    @property
    def free(self) -> int: ...

    def begin(self, room: int) -> int:
        """Reserve memory for a new sequence of up to `room` tokens. Returns the number of the sequence.

        Raises:
            UserError: less is free.
        """
        ...

    def free_next_to(self, sequence: int) -> int:
        """How many tokens a copy of this sequence could have. Ranks that share experts have memory of their own."""
        ...

    def copy(self, sequence: int, room: int | None = None, tokens: int | None = None) -> int:
        """A new sequence with the first `tokens` tokens of another; default: with all. Returns its number.

        Args:
            room: default: that of the other.

        Raises:
            UserError: less is free.
        """
        ...

    def rewind(self, sequence: int, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of a sequence."""
        ...

    def end(self, sequence: int) -> None:
        """Free a sequence's memory."""
        ...

    def step(self, pieces: Sequence[Piece]) -> Iterator[np.ndarray]:
        """Compute new tokens, of each sequence at most one piece, and keep their keys and values.

        Yields:
            The wanted rows of logits, fp32 [vocabulary], in order. All must be taken before the next call. A row is
            valid until the next one is asked for.

        Raises:
            UserError: a token is not in the model's vocabulary.
        """
        ...

    def follow(self) -> None:
        """On ranks that do not lead: do as the first does, until it closes the session."""
        ...

    def close(self) -> None:
        """Free all memory. On the first rank this ends the `follow` of the others."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Engine(Protocol):
    """One rank's share of a model with its optimizer.

    With several ranks every method but `tensors` and `peak_memory` is collective: all ranks call it, in the same
    order, and a rank's micro-batches are those of its data rank.
    """

    config: ModelConfig
    notices: list[str]  # messages for the user, such as a fall-back
    device_name: str  # as the framework calls it; "cpu"
    param_dtype: str  # dtype of the "model" kind, a key of tandem.checkpoints.interface.DTYPES
    moment_dtypes: Mapping[TensorKind, str]  # of "exp_avg" and "exp_avg_sq", likewise
    optimizer_step: int  # updates applied so far (Adam's t)
    reads_ahead: bool  # whether the host is free for the next step's batches while the device computes

    def load_weights(self, source: TensorSource) -> None:
        """Load this rank's slice of every weight, and its masters, from the kinds that `kinds_to_load` names."""
        ...

    def load_optimizer(self, source: TensorSource, optimizer_step: int) -> None:
        """Load this rank's share of Adam's moments."""
        ...

    def tensors(
        self, first_rank: int = 0, wanted: Callable[[TensorKind, Shard], bool] | None = None
    ) -> Iterator[tuple[TensorKind, Shard, np.ndarray]]:
        """Everything that a checkpoint takes from this rank, as (kind, part of a tensor, host array), "model" first.

        The parts are those of `saved_shards`, by rows where the settings shard that kind. An array is valid until the
        next one is asked for.

        Args:
            first_rank: the first rank that writes to this rank's disk.
            wanted: whether to yield a part; default: all.
        """
        ...

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        weights: Sequence[np.ndarray],
        lr: float,
        weight_decay: float,
        loss_limit: float = math.inf,
        loss_scale: float = 1.0,
        loss: float | None = None,
    ) -> StepResult:
        """Forward and backward over all micro-batches, then clipping and AdamW.

        The update is applied only when loss and norm are finite, and the loss is above 0 and at most `loss_limit`. A
        loss that is given may be 0 or less.

        The loss is the sum of weight * -log p(label) over the tokens of all ranks' micro-batches. So the split into
        micro-batches and over data ranks does not matter. AdamW: "Decoupled Weight Decay Regularization" (arXiv
        1711.05101), bias corrected, no decay on 1-D tensors.

        Args:
            weights: of the tokens of each micro-batch, float64 [t] (`tandem.training.objectives`). The weight of a
                token whose label is IGNORE does not count.
            loss_scale: the loss is multiplied by it for the backward pass, and the gradients are divided by it later.
            loss: what the gradients are of, the same on every rank, where it is not the weighted sum.

        Raises:
            ValueError: the number of weights is not the number of tokens.
        """
        ...

    def expert_load(self) -> ExpertLoad:
        """How the tokens of the last step, padding aside, were routed on this rank. Not collective.

        Empty for a model without experts, and on ranks that routed what another one counts.
        """
        ...

    def loss_and_gradients(
        self, micro_batches: Sequence[MicroBatch], weights: Sequence[np.ndarray]
    ) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and the gradients of this rank's shards by global name. Changes no state.

        These are the gradients that `train_step` would use, before clipping.
        """
        ...

    def first_bad_output(self, micro_batches: Sequence[MicroBatch]) -> str | None:
        """The global name of the first module on this rank whose output in the forward pass is not finite; or None."""
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """The sum of the losses of all ranks' trained tokens, and the number of these tokens.

        Data ranks may have different numbers of micro-batches.
        """
        ...

    def log_probabilities(self, micro_batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """log p(label) of each token of each micro-batch, float64 [t]; 0 where the label is IGNORE. Without dropout.

        They are computed in chunks, in fp32, and every rank gets those of its own micro-batches. Data ranks may have
        different numbers of micro-batches.
        """
        ...

    def label_scores(self, batches: Sequence[AskedBatch]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each row of each batch: log p(label), float64 [n], and the most likely token, int64 [n].

        Of equally likely tokens it is the first. Otherwise as `log_probabilities`. Each batch has a row.
        """
        ...

    def without_adapters(self) -> AbstractContextManager[None]:
        """Inside this context, passes are those of the weights alone. Without adapters it changes nothing.

        For `log_probabilities` and `evaluate`; not for training. Not collective, but all ranks must do the same.
        """
        ...

    def peak_memory(self) -> int:
        """The most bytes in use so far on this rank's device; on CPU, in its process. Not collective."""
        ...

    def logits(self, micro_batch: MicroBatch, rows: np.ndarray | None = None) -> np.ndarray:
        """Logits, fp32 [len(rows), vocabulary], at positions `rows` (None: all) of the batch. One process only."""
        ...

    def session(self, room: int, other: Session | None = None) -> Session:
        """Begin to continue sequences that have up to `room` tokens together. Weights must not change meanwhile.

        Args:
            other: of another engine of the same job. Ranks that do not lead follow both, by following one of them.

        Raises:
            UserError: the layout has no sessions, or the memory of the keys and values is not there.
        """
        ...

    def bytes_per_cached_token(self) -> int:
        """Memory on this rank for the keys and values of one token."""
        ...

    def free_memory(self) -> int:
        """Bytes that this rank can still allocate on its device; on CPU, where ranks share memory, its part of them.

        Not collective.
        """
        ...


class Profiler(Protocol):
    """The framework's profiler. It runs from its creation on."""

    def stop(self) -> tuple[dict[str, float], str]:
        """Stop profiling. Returns seconds by module, and the path of the framework's trace."""
        ...

    def counts(self) -> dict[str, int]:
        """After `stop`: what was launched, and how often the host waited for the device, by name."""
        ...
