"""What the engines of both frameworks share: bookkeeping in NumPy, and the order of a step.

A framework's engine adds what it computes: passes, sums over ranks, updates.
"""

from __future__ import annotations

import dataclasses
import math
import resource
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from tandem.backends.adapters import Switch, local_adapters
from tandem.backends.checks import check_engine
from tandem.backends.experts import Balancing, Share, sliced
from tandem.backends.interface import EngineSettings, ExpertLoad, Session, StepResult
from tandem.backends.loading import load_each, moment_dtypes, notices_of_dtypes, stream_fp32
from tandem.backends.partial import partial_names
from tandem.backends.passes import UNTRAINED, WeightedBatch, trained_rows
from tandem.backends.session import Computes, EngineSession, check_layout, check_memory
from tandem.backends.update import moments_that_stand_still
from tandem.checkpoints.interface import DTYPES, TENSOR_KINDS, TensorKind, TensorSource, kinds_to_load
from tandem.data.batch import AskedBatch, MicroBatch
from tandem.errors import UserError
from tandem.frameworks import Framework
from tandem.machine import available_bytes
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, is_trained, tensor_table
from tandem.parallel.grid import counted_shards, held_shards, saved_shards
from tandem.parallel.layout import Shard, even_rows, part_of
from tandem.parallel.slices import Part

T = TypeVar("T")  # the framework's tensor
Batch = TypeVar("Batch", MicroBatch, WeightedBatch)

MOMENTS: tuple[TensorKind, ...] = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class ByRows:
    """The state of which a data rank keeps only some rows (`even_rows`)."""

    weights: bool
    gradients: bool
    optimizer_state: bool


class BaseEngine(ABC, Generic[T]):
    """`tandem.backends.interface.Engine`, which documents every public method.

    Attributes:
        framework: the engine's framework.
        readers: how many threads load tensors into it at the same time.
        by_rows: set by the framework's engine, like the interface's `device_name`, `param_dtype` and `reads_ahead`.
    """

    framework: ClassVar[Framework]
    readers: ClassVar[int]

    device_name: str
    param_dtype: str
    reads_ahead: bool
    by_rows: ByRows

    def __init__(self, config: ModelConfig, settings: EngineSettings) -> None:
        layout = settings.grid.layout
        check_engine(self.framework, config, settings)
        self.config = config
        self.notices = list(moments_that_stand_still(settings)) if settings.training else []
        self.moment_dtypes = moment_dtypes(settings)
        self.optimizer_step = 0
        self._settings, self._grid = settings, settings.grid
        self._place = self._grid.place(settings.rank)
        self._stage = layout.stages(config.num_layers)[self._place.pipeline]
        self._shards = {shard.spec.name: shard for shard in held_shards(config, self._grid, self._place)}
        self._trained = [name for name, shard in self._shards.items() if is_trained(config, shard.spec)]
        self._balancing = Balancing(settings, config, self._grid.tensor_size, settings.sequence_parallel)
        self._share = Share.of(layout, self._place.tensor)
        self._adapters = local_adapters(self._shards, self._local_config())
        self._adapters_switch = Switch()

    # --- what is kept, loaded and saved

    def load_weights(self, source: TensorSource) -> None:
        weights, masters = self._kept("model"), self._kept("master")

        def load(name: str) -> None:
            kind, master_kind = kinds_to_load(source, name, self.param_dtype)
            part = self._updated_part(name) if self.by_rows.weights else self._shards[name].part
            targets = [(weights[name], 0)]
            if name in masters and master_kind == kind:
                targets.append((masters[name], 0 if self.by_rows.weights else self._updated_rows(name)[0]))
            self._fill(stream_fp32(source, name, part, kind), *targets)
            if name in masters and master_kind != kind:
                self._fill(stream_fp32(source, name, self._updated_part(name), master_kind), (masters[name], 0))

        load_each(load, self._shards, self.readers)

    def load_optimizer(self, source: TensorSource, optimizer_step: int) -> None:
        self._require_training()
        if absent := set(MOMENTS) - set(source.kinds()):
            raise UserError(f"{source.location} holds no optimizer state ({', '.join(sorted(absent))})")
        moments = {kind: self._kept(kind) for kind in MOMENTS}
        self.notices += notices_of_dtypes(source, moments, self.moment_dtypes)

        def load(item: tuple[TensorKind, str]) -> None:
            kind, name = item
            self._fill(stream_fp32(source, name, self._updated_part(name), kind), (moments[kind][name], 0))

        load_each(load, [(kind, name) for kind, tensors in moments.items() for name in tensors], self.readers)
        self.optimizer_step = optimizer_step

    def tensors(
        self, first_rank: int = 0, wanted: Callable[[TensorKind, Shard], bool] | None = None
    ) -> Iterator[tuple[TensorKind, Shard, np.ndarray]]:
        for kind in self._saved_kinds():
            tensors = self._kept(kind)
            by_rows = self.by_rows.weights if kind == "model" else self.by_rows.optimizer_state
            for shard in saved_shards(
                self.config, self._grid, self._settings.rank, by_rows=by_rows, first_rank=first_rank
            ):
                is_kept = kind == "model" or is_trained(self.config, shard.spec)
                if is_kept and (wanted is None or wanted(kind, shard)):
                    yield kind, shard, self._to_numpy(kind, tensors[shard.spec.name])

    def _saved_kinds(self) -> list[TensorKind]:
        if not self._settings.training:
            return ["model"]
        return [kind for kind in TENSOR_KINDS if kind != "master" or self.param_dtype != "float32"]

    def _updated_rows(self, name: str) -> tuple[int, int]:
        """The rows of a weight's slice that this rank updates."""
        shard = self._shards[name]
        rows = shard.shape[0]
        if not self.by_rows.optimizer_state:
            return 0, rows
        return even_rows(rows, *self._grid.copies(shard.spec, self._place))

    def _updated_part(self, name: str) -> Part:
        return self._shards[name].part.rows(*self._updated_rows(name))

    # --- a step

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
        weighted = self._forward_backward(micro_batches, [of_batch * loss_scale for of_batch in weights], loss_scale)
        totals = (weighted, self._squares(), self._counted_tokens(micro_batches))
        return self._finish(totals, lr, weight_decay, loss_limit, loss_scale, loss)

    def loss_and_gradients(
        self, micro_batches: Sequence[MicroBatch], weights: Sequence[np.ndarray]
    ) -> tuple[float, dict[str, np.ndarray]]:
        (loss,) = self._sum_over_ranks(self._forward_backward(micro_batches, weights))
        return loss, self._gradients()

    def _forward_backward(
        self, micro_batches: Sequence[MicroBatch], weights: Sequence[np.ndarray], loss_scale: float = 1.0
    ) -> Any:
        """Compute the global batch's gradients, for `_update`. Returns this rank's part of the loss."""
        self._require_training()
        # Losses that balance experts are means over micro-batches. All data ranks have equally many.
        balance = loss_scale / max(1, len(micro_batches) * self._grid.data_size)
        pairs = zip(micro_batches, weights, strict=True)
        batches = [WeightedBatch.of(*pair, self.optimizer_step, balance) for pair in pairs]
        self._balancing.of_step.clear()
        loss = self._reported(self._accumulate(self._to_run(batches)))
        self._sum_gradients()
        return loss

    def expert_load(self) -> ExpertLoad:
        # Tensor ranks route the same tokens.
        return self._balancing.load(self._joined_on_host) if self._place.tensor == 0 else ExpertLoad()

    def _squares(self) -> Any:
        """This rank's part of the square of the gradient's L2 norm, in which each number of the model counts once.

        It is not finite when any number on this rank is not.
        """
        counted = [
            shard.spec.name
            for shard in counted_shards(self.config, self._grid, self._place)
            if is_trained(self.config, shard.spec)
            # Otherwise the first of the copies has the same gradients.
            and (self.by_rows.gradients or self._grid.copies(shard.spec, self._place)[1] == 0)
        ]
        rest = [name for name in self._trained if name not in counted]
        return self._sum_of_squares(counted) + 0.0 * self._sum_of_squares(rest)

    def _partial_names(self, *, sequence_parallel: bool) -> list[str]:
        """Of the trained weights, those whose gradients are sums over the tensor ranks."""
        return partial_names(self._shards, self._trained, self._grid.layout, sequence_parallel=sequence_parallel)

    # --- computing without a step

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        losses = self._losses(self._to_run(micro_batches))
        loss = self._reported(sum(float(np.sum(of_batch, dtype=np.float64)) for of_batch in losses))
        total, trained = self._sum_over_ranks(loss, self._counted_tokens(micro_batches))
        return total, int(trained)

    def log_probabilities(self, micro_batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        batches = self._to_run(micro_batches)
        counts = [batch.trained_tokens for batch in batches]
        losses = self._losses(batches) or [np.zeros(count, np.float32) for count in counts]
        shared = self._from_last_stage(np.concatenate([np.empty(0, np.float32), *losses]))
        by_batch = dict(zip(map(id, batches), np.split(shared, np.cumsum(counts)[:-1])))

        def of_tokens(batch: MicroBatch) -> np.ndarray:
            values = np.zeros(len(batch.labels))
            if batch.trained_tokens:
                values[trained_rows(batch)] = -by_batch[id(batch)].astype(np.float64)
            return values

        return [of_tokens(batch) for batch in micro_batches]

    def label_scores(self, batches: Sequence[AskedBatch]) -> list[tuple[np.ndarray, np.ndarray]]:
        assert all(len(batch.rows) for batch in batches), "a batch that asks nothing would have no scores"
        to_run = self._to_run(list[MicroBatch](batches))  # those, and perhaps others that keep ranks together
        sizes = [batch.trained_tokens for batch in to_run]
        most_likely = [np.zeros(size, np.int64) for size in sizes]
        losses = self._losses(to_run, most_likely) or [np.zeros(size, np.float32) for size in sizes]
        # ids of tokens are exact in fp32: no vocabulary has 2**24 of them
        both = [np.stack([of_batch, tokens]).astype(np.float32) for of_batch, tokens in zip(losses, most_likely)]
        shared = self._from_last_stage(np.concatenate([np.empty((2, 0), np.float32), *both], axis=1).ravel())
        values, tokens = np.split(shared, 2)
        ends = np.cumsum(sizes[: len(batches)])
        parts = list(zip(np.split(values, ends), np.split(tokens, ends)))[: len(batches)]
        return [(-of_labels.astype(np.float64), of_tokens.astype(np.int64)) for of_labels, of_tokens in parts]

    def without_adapters(self) -> AbstractContextManager[None]:
        return self._adapters_switch.off()

    def first_bad_output(self, micro_batches: Sequence[MicroBatch]) -> str | None:
        bad: list[str] = []

        def look(name: str, output: T) -> None:
            if not bad and not self._is_finite(output):
                bad.append(name)

        with self._watched_by(look):
            self.evaluate(micro_batches)
        return bad[0] if bad else None

    def logits(self, micro_batch: MicroBatch, rows: np.ndarray | None = None) -> np.ndarray:
        assert self._grid.size == 1, "logits are computed in one process"
        micro_batch.check_vocabulary(self.config.vocab_size)
        return self._logits(micro_batch, np.arange(len(micro_batch.tokens)) if rows is None else np.asarray(rows))

    def session(self, room: int, other: Session | None = None) -> Session:
        check_layout(self._grid, self._settings)
        check_memory(room, self.bytes_per_cached_token(), self.free_memory())
        assert other is None or isinstance(other, EngineSession)
        return EngineSession(self._computes(), self.config.vocab_size, room, other)

    def bytes_per_cached_token(self) -> int:
        numbers = len(self._own_layers()) * 2 * self._local_config().num_query_groups * self.config.kv_channels
        return numbers * DTYPES[self.param_dtype].itemsize

    def _own_layers(self) -> list[int]:
        """The layers on this rank, by their numbers in the whole model."""
        return [slot.layer for chunk in self._stage for slot in chunk]

    def free_memory(self) -> int:
        if self.device_name == "cpu":
            return available_bytes() // self._grid.size  # all ranks may be on this machine
        return self._free_memory_of_device()

    def peak_memory(self) -> int:
        if self.device_name == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        return self._peak_of_device()

    # --- this rank's share

    def _to_run(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches that have tokens to train. All are checked first.

        But interleaved stages need whole rounds of micro-batches. And ranks that gather weights from each other, or
        send tokens to each other's experts, must run equally many.
        """
        for batch in micro_batches:
            batch.check_vocabulary(self.config.vocab_size)
        batches = [batch for batch in micro_batches if len(self._stage) > 1 or batch.trained_tokens]
        if self.by_rows.weights or self._grid.layout.expert_size > 1:
            batches += [UNTRAINED] * (self._largest_of_data_ranks(len(batches)) - len(batches))
        return batches

    def _reported(self, loss: Any) -> Any:
        """The loss on the first tensor rank, and 0 on the others, which computed the same."""
        return loss if self._place.tensor == 0 else 0.0

    def _counted_tokens(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Trained tokens on the first of the ranks that share these micro-batches; 0 on the others."""
        counts = self._place.tensor == 0 and self._place.pipeline == 0
        return float(sum(batch.trained_tokens for batch in micro_batches)) if counts else 0.0

    def _local_config(self) -> ModelConfig:
        """The config with the sizes of this rank's slices."""
        config, size = self.config, self._grid.tensor_size
        return dataclasses.replace(
            config,
            num_attention_heads=config.num_attention_heads // size,
            num_query_groups=config.num_query_groups // size,
            ffn_hidden_size=config.ffn_hidden_size // size,
            vocab_size=self._vocabulary_rows(self._place.tensor),
            experts=sliced(config.experts, self._grid.layout),
        )

    def _is_of_experts(self, name: str) -> bool:
        return bool(self._shards[name].spec.split.experts)

    def _vocabulary_rows(self, tensor_rank: int) -> int:
        """Rows of embedding and head on a tensor rank."""
        return part_of(tensor_table(self.config)[EMBEDDING], self._grid.tensor_size, tensor_rank).shape[0]

    def _choose_dtype(self, *, has_bf16: bool, without_bf16: str) -> str:
        """The dtype to compute in. A notice says why, when bfloat16 was asked for and is not taken."""
        if self._settings.fp16:
            return "float16"
        if self._settings.bf16 and has_bf16:
            return "bfloat16"
        if self._settings.bf16:
            self.notices.append(f"bf16: {without_bf16}; computing in fp32")
        return "float32"

    def _require_training(self) -> None:
        if not self._settings.training:
            raise ValueError("this engine was built with EngineSettings(training=False): it cannot train")

    # --- what the framework does

    @abstractmethod
    def _kept(self, kind: TensorKind) -> Mapping[str, T]:
        """The tensors of a kind that this rank keeps, by name. Masters are listed if they have their own memory."""

    @staticmethod
    @abstractmethod
    def _fill(blocks: Iterator[tuple[int, np.ndarray]], *targets: tuple[T, int]) -> None:
        """Copy blocks of rows, as `stream_fp32` yields them, into the targets.

        A target is a tensor and the number of its first row in the stream. The first target takes all rows.
        """

    @abstractmethod
    def _to_numpy(self, kind: TensorKind, tensor: T) -> np.ndarray:
        """A kept tensor as a checkpoint stores it."""

    @staticmethod
    @abstractmethod
    def _joined_on_host(values: Sequence[Any]) -> np.ndarray:
        """The numbers of these arrays that experts noted, one after the other."""

    @abstractmethod
    def _sum_over_ranks(self, *values: Any) -> list[float]:
        """The sums over all ranks, in double precision. Values are numbers, or the framework's."""

    @abstractmethod
    def _largest_of_data_ranks(self, count: int) -> int:
        """The largest of the data ranks' counts."""

    @abstractmethod
    def _accumulate(self, batches: Sequence[WeightedBatch]) -> Any:
        """Run forward and backward passes. Then this rank has the gradients of the sum of the weighted losses.

        Returns that sum, as a number or the framework's; 0 on ranks without the model's end.
        """

    @abstractmethod
    def _losses(
        self, batches: Sequence[MicroBatch], most_likely: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Run forward passes. Returns the losses of each batch's judged labels; nothing on ranks without the end.

        Each is fp32 [judged labels]. `most_likely`, int64 of these shapes, gets the most likely tokens.
        """

    @abstractmethod
    def _from_last_stage(self, values: np.ndarray) -> np.ndarray:
        """The last pipeline stage's values, fp32 [n], on every stage. The other stages give as many of any value."""

    @abstractmethod
    def _sum_gradients(self) -> None:
        """Sum the gradients that several ranks hold parts of, for the weights that this rank updates."""

    @abstractmethod
    def _sum_of_squares(self, names: Iterable[str]) -> Any:
        """The sum over the gradients that this rank updates with, as a number or the framework's."""

    @abstractmethod
    def _finish(
        self,
        totals: tuple[Any, Any, float],
        lr: float,
        weight_decay: float,
        loss_limit: float,
        loss_scale: float,
        loss: float | None,
    ) -> StepResult:
        """Update the weights and count the step, if it can be trusted, and share the new weights.

        Args:
            totals: this rank's part of the loss, of the square of the gradient's norm, and of the trained tokens.
            loss: as in `train_step`.
        """

    @abstractmethod
    def _gradients(self) -> dict[str, np.ndarray]:
        """The whole gradients of the shards that this rank holds. The caller may change them."""

    @abstractmethod
    def _watched_by(self, look: Callable[[str, T], None]) -> AbstractContextManager[None]:
        """Inside this context, `look` is called after each module's forward pass, with its global name and output."""

    @abstractmethod
    def _is_finite(self, tensor: T) -> bool: ...

    @abstractmethod
    def _logits(self, micro_batch: MicroBatch, rows: np.ndarray) -> np.ndarray:
        """fp32 [len(rows), vocabulary]"""

    @abstractmethod
    def _computes(self) -> Computes[Any]:
        """What a new session computes with."""

    @abstractmethod
    def _free_memory_of_device(self) -> int:
        """Bytes that a device other than a CPU has left."""

    @abstractmethod
    def _peak_of_device(self) -> int:
        """The most bytes in use so far, on a device other than a CPU."""
