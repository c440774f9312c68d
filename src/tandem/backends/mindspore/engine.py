"""The train step on MindSpore: one rank of any number. See `tandem.backends.interface.Engine`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tandem.backends.interface import EngineSettings, StepResult, UntrainedError, is_trusted
from tandem.backends.loading import stream_fp32
from tandem.backends.memory import process_peak
from tandem.backends.mindspore.communication import Groups, make_groups
from tandem.backends.mindspore.compute.sets import kernels_for
from tandem.backends.mindspore.data_parallel import DataParallel
from tandem.backends.mindspore.device import device_name
from tandem.backends.mindspore.model import Decoder
from tandem.backends.mindspore.optimizer import AdamW, clip_coefficient
from tandem.backends.mindspore.passes import Passes
from tandem.backends.mindspore.pipeline import Pipeline
from tandem.backends.mindspore.tensor_parallel import TensorParallel
from tandem.backends.mindspore.weight import Weight
from tandem.checkpoints.formats.arrays import is_finite
from tandem.checkpoints.interface import TensorKind, TensorSource, kinds_to_load
from tandem.data.batch import MicroBatch
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, FINAL_NORM, tensor_table
from tandem.parallel.grid import counted_shards, held_shards, saved_shards
from tandem.parallel.layout import Shard, part_of
from tandem.parallel.slices import Part


def create(config: ModelConfig, settings: EngineSettings) -> MindSporeEngine:
    """An engine with undefined weights: load some before use; with several ranks, `communication.connect` comes first.

    Raises:
        UserError: MindSpore does not run on the device asked for, or the model cannot be laid out like this.
    """
    return MindSporeEngine(config, settings)


class MindSporeEngine:
    """See `tandem.backends.interface.Engine`, which documents every method."""

    def __init__(self, config: ModelConfig, settings: EngineSettings) -> None:
        check_settings(settings)
        self.config = config
        self.notices: list[str] = []
        self.optimizer_step = 0
        self._settings, self._grid = settings, settings.grid
        self._kernels = kernels_for(settings.device)
        self.device_name = device_name()
        self._dtype = self._choose_dtype()
        self.param_dtype = str(self._dtype).lower()
        self._grid.layout.check(config)
        self._place = self._grid.place(settings.rank)
        self._groups = make_groups(self._grid, settings.rank, tied=config.tied)
        by_rows = settings.use_distributed_optimizer and self._groups.data.group is not None
        self._data = DataParallel(self._groups.data, by_rows, self._kernels)
        self._tensor = make_tensor_parallel(config, settings, self._groups)
        self._shards = {shard.spec.name: shard for shard in held_shards(config, self._grid, self._place)}
        self._weights = {name: self._new_weight(shard.shape) for name, shard in self._shards.items()}
        self._passes = self._make_passes()
        self._optimizer = AdamW(self._weights, self._data, settings, self._kernels) if settings.training else None

    def load_weights(self, source: TensorSource) -> None:
        for name, weight in self._weights.items():
            kind, master_kind = kinds_to_load(source, name, self.param_dtype)
            values = _read(source, name, kind, self._shards[name].part)
            _fill(weight.value, values)
            if weight.master is not weight.value:
                same = master_kind == kind
                own = self._data.own_values(values) if same else _read(source, name, master_kind, self._own_part(name))
                _fill(weight.master, own)

    def load_optimizer(self, source: TensorSource, optimizer_step: int) -> None:
        optimizer = self._require_training()
        absent = {"exp_avg", "exp_avg_sq"} - set(source.kinds())
        if absent:
            raise UserError(f"{source.location} holds no optimizer state ({', '.join(sorted(absent))})")
        for name in optimizer.weights:
            _fill(optimizer.exp_avg[name], _read(source, name, "exp_avg", self._own_part(name)))
            _fill(optimizer.exp_avg_sq[name], _read(source, name, "exp_avg_sq", self._own_part(name)))
        self.optimizer_step = optimizer_step

    def _own_part(self, name: str) -> Part:
        """The rows of a weight's slice that this rank updates."""
        part = self._shards[name].part
        return part.rows(*self._data.own_rows(part.shape[0])) if self._data.by_rows else part

    def tensors(self, first_rank: int = 0) -> Iterator[tuple[TensorKind, Shard, np.ndarray]]:
        def saved(by_rows: bool) -> list[Shard]:
            return saved_shards(self.config, self._grid, self._settings.rank, by_rows=by_rows, first_rank=first_rank)

        for shard in saved(False):
            yield "model", shard, self._weights[shard.spec.name].value.asnumpy()
        if self._optimizer is None:
            return
        kinds: list[tuple[TensorKind, dict[str, Tensor]]] = []
        if self.param_dtype != "float32":
            kinds.append(("master", {name: weight.master for name, weight in self._weights.items()}))
        kinds += [("exp_avg", self._optimizer.exp_avg), ("exp_avg_sq", self._optimizer.exp_avg_sq)]
        for kind, tensors in kinds:
            for shard in saved(self._data.by_rows):
                yield kind, shard, tensors[shard.spec.name].asnumpy()

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        lr: float,
        weight_decay: float,
        loss_limit: float = math.inf,
        loss_scale: float = 1.0,
    ) -> StepResult:
        optimizer = self._require_training()
        loss, trained_tokens = self._forward_backward(micro_batches, loss_scale)
        total, norm = self._loss_and_norm(loss)
        norm /= loss_scale
        applied = is_trusted(total / trained_tokens, norm, loss_limit)
        if applied:
            self.optimizer_step += 1
            coefficient = clip_coefficient(norm, self._settings.clip_grad) / loss_scale
            optimizer.update(self.optimizer_step, lr, weight_decay, coefficient)
            self._data.share(list(self._weights.values()))
        return StepResult(total / trained_tokens, norm, trained_tokens, applied)

    def loss_and_gradients(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, dict[str, np.ndarray]]:
        self._require_training()
        loss, trained_tokens = self._forward_backward(micro_batches)
        (total,) = self._groups.everyone.sum_values(loss)
        gradients = {}
        for name, weight in self._weights.items():
            assert weight.gradient is not None
            gradients[name] = weight.gradient.asnumpy()
            weight.gradient = None  # it is the caller's now
        return total / trained_tokens, gradients

    def first_bad_output(self, micro_batches: Sequence[MicroBatch]) -> str | None:
        found: list[str] = []

        def look(name: str, output: Tensor) -> None:
            if not found and not is_finite(output.asnumpy()):
                found.append(name)

        self._passes.decoder.watchers.append(look)
        self.evaluate(micro_batches)
        self._passes.decoder.watchers.remove(look)
        return found[0] if found else None

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        with _non_finite_allowed():
            loss = self._reported(self._passes.evaluate(self._trained(micro_batches)))
        total, trained = self._groups.everyone.sum_values(loss, self._counted_tokens(micro_batches))
        return total, int(trained)

    def logits(self, micro_batch: MicroBatch, rows: np.ndarray | None = None) -> np.ndarray:
        assert self._grid.size == 1, "logits are computed in one process"
        micro_batch.check_vocabulary(self.config.vocab_size)
        rows = np.arange(len(micro_batch.tokens)) if rows is None else rows
        with _non_finite_allowed():
            hidden, head = self._passes.hidden(micro_batch, rows), self._passes.decoder.head
            logits = self._kernels.product(hidden, head.value, transpose_b=True)
        return logits.astype(ms.float32).asnumpy()

    def peak_memory(self) -> int:
        return process_peak() if self.device_name == "cpu" else int(ms.runtime.max_memory_allocated())

    def _choose_dtype(self) -> ms.Type:
        if self._settings.fp16:
            return ms.float16
        if self._settings.bf16 and self._kernels.bf16:
            return ms.bfloat16
        if self._settings.bf16:
            self.notices.append("bf16: MindSpore multiplies no bf16 matrices on CPU; computing in fp32 instead")
        if self._kernels.fp32_notice:
            self.notices.append(self._kernels.fp32_notice)
        return ms.float32

    def _new_weight(self, shape: tuple[int, ...]) -> Weight:
        value = self._kernels.zeros(shape)
        if self._dtype is ms.float32:
            return Weight(value, self._data.own(value))
        first, last = self._data.own_rows(shape[0])
        return Weight(value.astype(self._dtype), self._kernels.zeros((last - first, *shape[1:])))

    def _make_passes(self) -> Passes:
        config, size = self.config, self._grid.tensor_size
        (slots,) = self._grid.layout.stages(config.num_layers)[self._place.pipeline]
        pipeline = Pipeline(self._grid, self._place, self._groups.channels)
        decoder = Decoder(
            config=dataclasses.replace(
                config,
                num_attention_heads=config.num_attention_heads // size,
                num_query_groups=config.num_query_groups // size,
            ),
            layers=[slot.layer for slot in slots],
            first=pipeline.is_first,
            last=pipeline.is_last,
            weights=self._weights,
            kernels=self._kernels,
            tensor=self._tensor,
            recompute_layers=self._settings.recompute_layers,
        )
        return Passes(decoder, pipeline, self._tensor, self._kernels, self._dtype)

    def _forward_backward(self, micro_batches: Sequence[MicroBatch], loss_scale: float = 1.0) -> tuple[float, int]:
        """Leave the global batch's gradients, `loss_scale` times too large, in the weights. Returns this rank's part of
        the summed loss, and the trained tokens of all ranks."""
        batches = self._trained(micro_batches)
        trained_tokens = int(self._groups.everyone.sum_values(self._counted_tokens(batches))[0])
        if not trained_tokens:
            raise UntrainedError
        for weight in self._weights.values():
            weight.has_gradient = False
        with _non_finite_allowed():
            loss = self._reported(self._passes.accumulate(batches, loss_scale / trained_tokens))
        self._sum_gradients()
        return loss, trained_tokens

    def _sum_gradients(self) -> None:
        """Add up what several ranks hold parts of."""
        if self._grid.size == 1:
            return
        gradients = {name: self._gradient(weight) for name, weight in self._weights.items()}
        if self._groups.tensor.group is not None:
            self._kernels.sum_over(self._groups.tensor, [gradients[name] for name in self._partial_names()])
        self._data.reduce(list(gradients.values()))
        if self._groups.tied.group is not None:
            self._kernels.sum_over(self._groups.tied, [gradients[EMBEDDING]])

    def _gradient(self, weight: Weight) -> Tensor:
        """A weight's gradient, zeros where this rank had nothing to train."""
        if not weight.has_gradient:
            weight.add_gradient(self._kernels.zeros(weight.value.shape))
        assert weight.gradient is not None
        return weight.gradient

    def _partial_names(self) -> list[str]:
        """Replicated weights whose gradient on a tensor rank is a part of the sum: those that see only its heads, and,
        where tokens are split, those that see only its tokens."""
        return [
            name
            for name, shard in self._shards.items()
            if shard.spec.split.dim is None
            and name != FINAL_NORM
            and (self._tensor.sequence or "self_attention" in name)
        ]

    def _loss_and_norm(self, loss: float) -> tuple[float, float]:
        """The summed loss of all ranks, and the L2 norm of the whole model's gradient, each number of it counted once;
        not finite when any rank has a number that is not."""
        counted = [shard.spec.name for shard in counted_shards(self.config, self._grid, self._place)]
        if self._place.data > 0:  # the other data ranks have the same gradients
            counted = []

        def squares_of(names: Iterable[str]) -> float:
            return sum(self._kernels.sum_of_squares(self._gradient(self._weights[name])) for name in names)

        squares = squares_of(counted) + 0.0 * squares_of(name for name in self._weights if name not in counted)
        total, squares = self._groups.everyone.sum_values(loss, squares)
        return total, math.sqrt(squares) if math.isfinite(squares) else math.inf

    def _trained(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches that have trained tokens, after a look at all."""
        for micro_batch in micro_batches:
            micro_batch.check_vocabulary(self.config.vocab_size)
        return [micro_batch for micro_batch in micro_batches if micro_batch.trained_tokens]

    def _reported(self, loss: float) -> float:
        """The loss, on one of the tensor ranks that all computed it."""
        return loss if self._place.tensor == 0 else 0.0

    def _counted_tokens(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Trained tokens, on one of the ranks that share these micro-batches."""
        counts = self._place.tensor == 0 and self._place.pipeline == 0
        return sum(batch.trained_tokens for batch in micro_batches) if counts else 0

    def _require_training(self) -> AdamW:
        if self._optimizer is None:
            raise ValueError("this engine was built with training=False, so it has neither gradients nor an optimizer")
        return self._optimizer


def check_settings(settings: EngineSettings) -> None:
    """Raise UserError for what only the other backend can do."""
    only_torch = {
        "--use-torch-fsdp2": settings.use_torch_fsdp2,
        "--num-layers-per-virtual-pipeline-stage": settings.grid.layout.num_layers_per_virtual_pipeline_stage,
    }
    if wanted := [flag for flag, value in only_torch.items() if value]:
        raise UserError(
            f"{' and '.join(wanted)}: not on the MindSpore backend; leave it out, or take --ai-framework torch"
        )


def make_tensor_parallel(config: ModelConfig, settings: EngineSettings, groups: Groups) -> TensorParallel:
    ranks = groups.tensor
    rows = part_of(tensor_table(config)[EMBEDDING], ranks.size, 0).shape[0]
    sequence = settings.sequence_parallel and ranks.group is not None
    return TensorParallel(ranks, sequence, rows, kernels_for(settings.device))


def _read(source: TensorSource, name: str, kind: TensorKind, part: Part) -> np.ndarray:
    values = np.empty(part.shape, np.float32)
    for first, rows in stream_fp32(source, name, part, kind):
        values[first : first + len(rows)] = rows
    return values


def _fill(tensor: Tensor, values: np.ndarray) -> None:
    tensor.copy_(Tensor.from_numpy(values).astype(tensor.dtype))


def _non_finite_allowed() -> np.errstate:
    """Overflow is part of the mathematics here, and what is not finite shows in the loss and in the norm."""
    return np.errstate(all="ignore")
