"""The train step on MindSpore: one rank of any number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tandem.backends.engine import BaseEngine, ByRows
from tandem.backends.experts import sliced
from tandem.backends.interface import EngineSettings, StepResult
from tandem.backends.mindspore.adapters import Factors, Linear
from tandem.backends.mindspore.communication import Groups, make_groups
from tandem.backends.mindspore.compute.sets import kernels_for
from tandem.backends.mindspore.data_parallel import DataParallel
from tandem.backends.mindspore.device import device_name, free_memory
from tandem.backends.mindspore.expert_adapters import RouterWeight, Stack
from tandem.backends.mindspore.experts import Mixture
from tandem.backends.mindspore.model import Decoder
from tandem.backends.mindspore.optimizer import AdamW
from tandem.backends.mindspore.passes import Passes
from tandem.backends.mindspore.pipeline import Pipeline
from tandem.backends.mindspore.session import MindSporeSession
from tandem.backends.mindspore.tensor_parallel import TensorParallel
from tandem.backends.mindspore.weight import Weight
from tandem.backends.passes import WeightedBatch
from tandem.backends.pipeline import recompute_counts
from tandem.backends.update import clip_coefficient, is_trusted
from tandem.checkpoints.formats.arrays import is_finite
from tandem.checkpoints.interface import TensorKind
from tandem.data.batch import MicroBatch
from tandem.frameworks import MINDSPORE
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts
from tandem.models.families import EXPERTS_FC1, EXPERTS_FC2, LINEARS, ROUTER
from tandem.models.tensors import EMBEDDING, ROW, layer_prefix


def create(config: ModelConfig, settings: EngineSettings) -> MindSporeEngine:
    """Build an engine with undefined weights; with several ranks, `communication.connect` comes first.

    Raises:
        UserError: MindSpore does not run on the device, or the model cannot be laid out like this.
    """
    return MindSporeEngine(config, settings)


class MindSporeEngine(BaseEngine[Tensor]):
    """`tandem.backends.interface.Engine` on MindSpore."""

    framework = MINDSPORE
    readers = 1

    def __init__(self, config: ModelConfig, settings: EngineSettings) -> None:
        super().__init__(config, settings)
        if notice := self.framework.version_notice():
            self.notices.append(notice)
        asked = {"--overlap-grad-reduce": settings.overlap_grad_reduce}
        asked["--overlap-param-gather"] = settings.overlap_param_gather
        self.notices += [f"{flag}: without effect on MindSpore" for flag, given in asked.items() if given]
        self._kernels = kernels_for(settings.device)
        self.device_name = device_name()
        self.reads_ahead = self._kernels.reads_ahead
        self.param_dtype = self._choose_dtype(
            has_bf16=self._kernels.bf16, without_bf16="MindSpore multiplies no bf16 matrices on CPU"
        )
        if self.param_dtype == "float32" and self._kernels.fp32_notice:
            self.notices.append(self._kernels.fp32_notice)
        self._dtype: ms.Type = getattr(ms, self.param_dtype)
        self._groups = make_groups(self._grid, settings.rank, tied=config.tied, chunks=len(self._stage))
        self._data, self._copies = (
            DataParallel(ranks, settings.use_distributed_optimizer and ranks.group is not None, self._kernels)
            for ranks in (self._groups.data, self._groups.copies)
        )
        both = (self._data, self._copies)
        by_rows, scatters = any(data.by_rows for data in both), any(data.scatters for data in both)
        self.by_rows = ByRows(weights=False, gradients=scatters, optimizer_state=by_rows)
        self._tensor = make_tensor_parallel(settings, self._groups, self._vocabulary_rows)
        self._weights = {
            name: self._new_weight(shard.shape, self._data_of(name), trained=name in self._trained)
            for name, shard in self._shards.items()
        }
        self._trained_weights = {name: self._weights[name] for name in self._trained}
        self._watchers: list[Callable[[str, Tensor], None]] = []
        self._passes = self._make_passes()
        self._adamw = (
            AdamW(self._trained_weights, self._data_of, settings, self._kernels) if settings.training else None
        )

    def _data_of(self, name: str) -> DataParallel:
        """The ranks that hold the same part of a weight and share its updates."""
        return self._copies if self._is_of_experts(name) else self._data

    def _new_weight(self, shape: tuple[int, ...], data: DataParallel, *, trained: bool) -> Weight:
        value = self._kernels.zeros(shape)
        if not trained:
            value = value.astype(self._dtype)
            return Weight(value, value, trained=False)
        if self._dtype is ms.float32:
            return Weight(value, data.own_rows_of(value))
        first, last = data.own_rows(shape[0])
        return Weight(value.astype(self._dtype), self._kernels.zeros((last - first, *shape[1:])))

    def _make_passes(self) -> Passes:
        pipeline = Pipeline(self._grid, self._place, len(self._stage), self._groups.channels)
        linears, mixtures = self._make_linears(), self._make_mixtures(self._own_layers())
        counts = recompute_counts(self._stage, self._settings.recompute_layers)
        chunks = [
            Decoder(
                config=self._local_config(),
                layers=[slot.layer for slot in slots],
                first=pipeline.source(number) is None,
                last=pipeline.target(number) is None,
                weights=self._weights,
                linears=linears,
                mixtures=mixtures,
                kernels=self._kernels,
                tensor=self._tensor,
                recompute_layers=count,
                watchers=self._watchers,
            )
            for number, (slots, count) in enumerate(zip(self._stage, counts))
        ]
        return Passes(chunks, pipeline, self._tensor, self._kernels, self._dtype, self._balancing)

    def _make_mixtures(self, layers: Sequence[int]) -> dict[int, Mixture]:
        experts = sliced(self.config.experts, self._grid.layout)

        def mixture(layer: int, experts: Experts) -> Mixture:
            names = [layer_prefix(layer) + name for name in (ROUTER, EXPERTS_FC1, EXPERTS_FC2)]
            shared = (self._kernels, self._adapters_switch)
            of_router, *of_experts = ((self._weights[name], self._factors(name)) for name in names)
            router = RouterWeight(*of_router, *shared) if of_router[1] else of_router[0]
            fc1, fc2 = (Stack(*of_stack, *shared) for of_stack in of_experts)
            return Mixture(layer, experts, router, fc1, fc2, self._kernels, self._groups.experts, self._share)

        return {layer: mixture(layer, experts) for layer in layers if experts is not None and experts.are_in(layer)}

    def _make_linears(self) -> dict[str, Linear]:
        """The layers' linear layers. Ranks share the columns of those whose weight is cut along them."""
        return {
            name: Linear(
                name,
                weight,
                self._weights.get(name.removesuffix("weight") + "bias"),
                self._factors(name),
                self._groups.tensor if self._shards[name].spec.split == ROW else None,
                self._kernels,
                self._adapters_switch,
            )
            for name, weight in self._weights.items()
            if name.endswith(LINEARS)
        }

    def _factors(self, name: str) -> list[Factors]:
        """The weights of the adapters of a weight."""
        return [
            Factors(adapter, self._weights[adapter.a], self._weights[adapter.b], self._weights.get(adapter.magnitude))
            for adapter in self._adapters.get(name, [])
        ]

    def _kept(self, kind: TensorKind) -> Mapping[str, Tensor]:
        if kind == "model":
            return {name: weight.value for name, weight in self._weights.items()}
        if kind == "master":
            return {
                name: weight.master
                for name, weight in self._trained_weights.items()
                if weight.master is not weight.value
            }
        return {} if self._adamw is None else getattr(self._adamw, kind)

    @staticmethod
    def _fill(blocks: Iterator[tuple[int, np.ndarray]], *targets: tuple[Tensor, int]) -> None:
        values = np.empty(targets[0][0].shape, np.float32)
        for first, rows in blocks:
            values[first : first + len(rows)] = rows
        for target, start in targets:
            rows = values[start : start + target.shape[0]]
            target.copy_(Tensor.from_numpy(rows).astype(target.dtype))

    def _to_numpy(self, kind: TensorKind, tensor: Tensor) -> np.ndarray:
        return tensor.asnumpy()

    @staticmethod
    def _joined_on_host(values: Sequence[Any]) -> np.ndarray:
        if not isinstance(values[0], Tensor):
            return np.concatenate([np.ravel(value) for value in values])
        return ms.mint.cat([value.astype(ms.float32).reshape(-1) for value in values]).asnumpy()

    def _sum_over_ranks(self, *values: Any) -> list[float]:
        return self._groups.everyone.sum_values(*map(_number, values))

    def _largest_of_data_ranks(self, count: int) -> int:
        return max(self._groups.data.gather_values(count))

    def _accumulate(self, batches: Sequence[WeightedBatch]) -> Any:
        for weight in self._trained_weights.values():
            weight.has_gradient = False
        with _non_finite_allowed():
            return self._passes.accumulate(batches)

    def _losses(
        self, batches: Sequence[MicroBatch], most_likely: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        with _non_finite_allowed():
            return self._passes.losses(batches, most_likely)

    def _from_last_stage(self, values: np.ndarray) -> np.ndarray:
        if self._grid.pipeline_size == 1 or not len(values):
            return values
        return self._passes.pipeline.copied_from_end(Tensor(values)).asnumpy()

    def _sum_gradients(self) -> None:
        if self._grid.size == 1:
            return
        gradients = {name: self._gradient(weight) for name, weight in self._trained_weights.items()}
        if self._groups.tensor.group is not None:
            partial = self._partial_names(sequence_parallel=self._tensor.sequence)
            self._kernels.sum_over(self._groups.tensor, [gradients[name] for name in partial])
        for data in (self._data, self._copies):
            data.reduce([weight for name, weight in self._trained_weights.items() if self._data_of(name) is data])
        if self._groups.tied.group is not None and EMBEDDING in gradients:
            self._kernels.sum_over(self._groups.tied, [self._gradient(self._weights[EMBEDDING])])

    def _gradient(self, weight: Weight) -> Tensor:
        """A weight's gradient, zeros where this rank had nothing to train."""
        if not weight.has_gradient:
            weight.add_gradient(self._kernels.zeros(weight.value.shape))
        assert weight.gradient is not None
        return weight.gradient

    def _sum_of_squares(self, names: Iterable[str]) -> Any:
        return self._kernels.sum_of_squares([self._gradient(self._weights[name]) for name in names])

    def _finish(
        self,
        totals: tuple[Any, Any, float],
        lr: float,
        weight_decay: float,
        loss_limit: float,
        loss_scale: float,
        loss: float | None,
    ) -> StepResult:
        weighted, squares, trained = self._kernels.totals(self._groups.everyone, totals)
        norm = math.sqrt(squares) / loss_scale
        reported = weighted / loss_scale if loss is None else loss
        applied = is_trusted(reported, norm, loss_limit, may_be_zero=loss is not None)
        if applied:
            self.optimizer_step += 1
            self._update(lr, weight_decay, clip_coefficient(norm, self._settings.clip_grad) / loss_scale)
        return StepResult(reported, norm, int(trained), applied)

    def _update(self, lr: float, weight_decay: float, coefficient: float) -> None:
        assert self._adamw is not None
        self._adamw.update(self.optimizer_step, lr, weight_decay, coefficient)
        for data in (self._data, self._copies):
            data.share([weight for name, weight in self._trained_weights.items() if self._data_of(name) is data])

    def _gradients(self) -> dict[str, np.ndarray]:
        gradients = {}
        for name, weight in self._trained_weights.items():
            self._gradient(weight)  # zeros where this rank had nothing to train
            gradients[name] = self._data_of(name).whole_gradient(weight).asnumpy()
        for weight in self._trained_weights.values():
            weight.gradient = None  # it is the caller's now
        return gradients

    @contextmanager
    def _watched_by(self, look: Callable[[str, Tensor], None]) -> Iterator[None]:
        self._watchers.append(look)
        try:
            yield
        finally:
            self._watchers.remove(look)

    def _is_finite(self, tensor: Tensor) -> bool:
        return is_finite(tensor.asnumpy())

    def _logits(self, micro_batch: MicroBatch, rows: np.ndarray) -> np.ndarray:
        with _non_finite_allowed():
            hidden, head = self._passes.hidden(micro_batch, rows), self._passes.head
            assert hidden is not None
            logits = self._kernels.product(hidden, head.value, transpose_b=True)
        return logits.astype(ms.float32).asnumpy()

    def _computes(self) -> MindSporeSession:
        return MindSporeSession(
            self._passes,
            self._groups.model,
            self._local_config(),
            self._own_layers(),
            *self._grid.sharer(self._place),
            self.config.vocab_size,
        )

    def _free_memory_of_device(self) -> int:
        return free_memory()

    def _peak_of_device(self) -> int:
        return int(ms.runtime.max_memory_allocated())


def make_tensor_parallel(
    settings: EngineSettings, groups: Groups, vocabulary_rows: Callable[[int], int]
) -> TensorParallel:
    ranks = groups.tensor
    sequence = settings.sequence_parallel and ranks.group is not None
    rows = (vocabulary_rows(0), vocabulary_rows(ranks.rank))
    return TensorParallel(ranks, sequence, *rows, kernels_for(settings.device))


def _number(value: Any) -> float:
    return float(value.asnumpy()) if isinstance(value, Tensor) else value


def _non_finite_allowed() -> np.errstate:
    """Allow overflow without warnings: numbers that are not finite show in the loss and in the norm."""
    return np.errstate(all="ignore")
