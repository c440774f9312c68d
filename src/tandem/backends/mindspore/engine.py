"""One process's train step on MindSpore: `tandem.backends.interface.Engine`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tandem.backends.interface import EngineSettings, StepResult
from tandem.backends.memory import process_peak
from tandem.backends.mindspore.device import device_name, kernels_for
from tandem.backends.mindspore.model import Decoder, linear
from tandem.backends.mindspore.optimizer import AdamW, clip_coefficient, global_norm
from tandem.backends.mindspore.weight import Weight
from tandem.checkpoints.interface import Kind, TensorSource, check_shape
from tandem.data.batch import IGNORE, MicroBatch
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.parallel.grid import saved_shards
from tandem.parallel.layout import Shard


def create(config: ModelConfig, settings: EngineSettings) -> MindSporeEngine:
    """An engine with undefined weights: load some before use.

    Raises:
        UserError: MindSpore does not run on the device asked for.
    """
    return MindSporeEngine(config, settings)


class MindSporeEngine:
    """See `tandem.backends.interface.Engine`, which documents every method."""

    def __init__(self, config: ModelConfig, settings: EngineSettings) -> None:
        self.config = config
        self.settings = settings
        self.notices: list[str] = []
        self.optimizer_step = 0
        self._kernels = kernels_for(settings.device)
        self.device_name = device_name()
        bf16 = settings.bf16 and self._kernels.bf16
        if settings.bf16 and not bf16:
            self.notices.append("bf16: MindSpore multiplies no bf16 matrices on CPU; computing in fp32 instead")
        if not bf16 and self._kernels.fp32_notice:
            self.notices.append(self._kernels.fp32_notice)
        self.param_dtype = "bfloat16" if bf16 else "float32"
        self._weights = {name: self._new_weight(spec.shape, bf16) for name, spec in tensor_table(config).items()}
        self._saved = saved_shards(config, settings.grid, settings.grid.place(settings.rank), by_rows=False)
        self._decoder = Decoder(config, self._weights, self._kernels, settings.recompute_layers)
        self._optimizer = AdamW(self._weights, settings, self._kernels) if settings.training else None

    def _new_weight(self, shape: tuple[int, ...], bf16: bool) -> Weight:
        master = self._kernels.zeros(shape)
        return Weight(master.astype(ms.bfloat16) if bf16 else master, master)

    def load_weights(self, source: TensorSource) -> None:
        kind: Kind = "master" if "master" in source.kinds() else "model"
        for name, weight in self._weights.items():
            _fill(weight.master, source, name, kind)
            weight.refresh()

    def load_optimizer(self, source: TensorSource, optimizer_step: int) -> None:
        optimizer = self._require_training()
        absent = {"exp_avg", "exp_avg_sq"} - set(source.kinds())
        if absent:
            raise UserError(f"{source.location} holds no optimizer state ({', '.join(sorted(absent))})")
        for name in self._weights:
            _fill(optimizer.exp_avg[name], source, name, "exp_avg")
            _fill(optimizer.exp_avg_sq[name], source, name, "exp_avg_sq")
        self.optimizer_step = optimizer_step

    def tensors(self) -> Iterator[tuple[Kind, Shard, np.ndarray]]:
        kinds: list[tuple[Kind, dict[str, Tensor]]] = [("model", {n: w.value for n, w in self._weights.items()})]
        if self._optimizer is not None:
            if self.param_dtype != "float32":
                kinds.append(("master", {name: weight.master for name, weight in self._weights.items()}))
            kinds += [("exp_avg", self._optimizer.exp_avg), ("exp_avg_sq", self._optimizer.exp_avg_sq)]
        for kind, tensors in kinds:
            for shard in self._saved:
                yield kind, shard, tensors[shard.spec.name].asnumpy()

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, weight_decay: float) -> StepResult:
        optimizer = self._require_training()
        loss, trained_tokens = self._forward_backward(micro_batches)
        norm = global_norm(self._weights.values(), self._kernels)
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            self.optimizer_step += 1
            optimizer.update(self.optimizer_step, lr, weight_decay, clip_coefficient(norm, self.settings.clip_grad))
        return StepResult(loss, norm, trained_tokens, applied)

    def loss_and_gradients(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, dict[str, np.ndarray]]:
        self._require_training()
        loss, _ = self._forward_backward(micro_batches)
        gradients = {}
        for name, weight in self._weights.items():
            assert weight.gradient is not None
            gradients[name] = weight.gradient.asnumpy()
            weight.gradient = None  # it is the caller's now
        return loss, gradients

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        total, trained = 0.0, 0
        for micro_batch in micro_batches:
            rows = self._trained_rows(micro_batch)
            if len(rows):
                with _non_finite_allowed():
                    hidden, _ = self._decoder.forward(micro_batch, rows, differentiable=False)
                    total += self._kernels.cross_entropy(hidden, self._decoder.head, micro_batch.labels[rows])
            trained += len(rows)
        return total, trained

    def logits(self, micro_batch: MicroBatch, rows: np.ndarray | None = None) -> np.ndarray:
        micro_batch.check_vocabulary(self.config.vocab_size)
        rows = np.arange(len(micro_batch.tokens)) if rows is None else rows
        with _non_finite_allowed():
            hidden, _ = self._decoder.forward(micro_batch, rows, differentiable=False)
            logits, _ = linear(hidden, self._decoder.head)
        return logits.astype(ms.float32).asnumpy()

    def peak_memory(self) -> int:
        return process_peak() if self.device_name == "cpu" else int(ms.runtime.max_memory_allocated())

    def _forward_backward(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Loss over the global batch and its trained tokens; leaves the gradients in the weights."""
        rows = [self._trained_rows(micro_batch) for micro_batch in micro_batches]
        trained_tokens = sum(map(len, rows))
        if not trained_tokens:
            raise ValueError("no label of the global batch is trained: every one of them is masked")
        for weight in self._weights.values():
            weight.has_gradient = False
        total = 0.0
        with _non_finite_allowed():
            for micro_batch, trained in zip(micro_batches, rows):
                if len(trained):
                    total += self._accumulate(micro_batch, trained, 1 / trained_tokens)
        return total / trained_tokens, trained_tokens

    def _accumulate(self, micro_batch: MicroBatch, rows: np.ndarray, scale: float) -> float:
        """Add `scale` times the gradients of one micro-batch's summed loss, which is returned."""
        hidden, backward = self._decoder.forward(micro_batch, rows, differentiable=True)
        head, labels = self._decoder.head, micro_batch.labels[rows]
        loss, gradient = self._kernels.cross_entropy_and_gradient(hidden, head, labels, scale)
        backward(gradient)
        return loss

    def _trained_rows(self, micro_batch: MicroBatch) -> np.ndarray:
        rows = np.flatnonzero(micro_batch.labels != IGNORE)
        micro_batch.check_vocabulary(self.config.vocab_size)
        return rows

    def _require_training(self) -> AdamW:
        if self._optimizer is None:
            raise ValueError("this engine was built with training=False, so it has neither gradients nor an optimizer")
        return self._optimizer


def _fill(tensor: Tensor, source: TensorSource, name: str, kind: Kind) -> None:
    array = source.read(name, kind)
    check_shape(source.location, name, array.shape, tensor.shape)
    tensor.copy_(Tensor.from_numpy(np.ascontiguousarray(array, np.float32)))


def _non_finite_allowed() -> np.errstate:
    """Overflow is part of the mathematics here, and what is not finite shows in the loss and in the norm."""
    return np.errstate(all="ignore")
