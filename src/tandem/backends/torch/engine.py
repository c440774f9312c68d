"""The train step on PyTorch: one rank of any number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import torch
from torch import nn

from tandem.backends.engine import BaseEngine, ByRows
from tandem.backends.interface import EngineSettings, StepResult
from tandem.backends.passes import WeightedBatch
from tandem.backends.pipeline import recompute_counts
from tandem.backends.torch.communication import Groups, make_groups, maximum_over, sum_over
from tandem.backends.torch.compute.sets import kernels_of
from tandem.backends.torch.data_parallel import Apart, Replicated, Sharing
from tandem.backends.torch.device import choose_device, device_name, has_native_bf16
from tandem.backends.torch.experts import ExpertRanks, OfExperts
from tandem.backends.torch.functional import matmul
from tandem.backends.torch.model import Build, Chunk, GPTModel
from tandem.backends.torch.optimizer import AdamW, Decision, sum_of_squares
from tandem.backends.torch.overlap import Overlap, parts_of
from tandem.backends.torch.passes import Passes
from tandem.backends.torch.pipeline import Pipeline
from tandem.backends.torch.session import TorchSession
from tandem.backends.torch.tensor_parallel import TensorParallel
from tandem.checkpoints.interface import TensorKind
from tandem.data.batch import MicroBatch
from tandem.frameworks import TORCH
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING


def create(config: ModelConfig, settings: EngineSettings) -> TorchEngine:
    """Build an engine with undefined weights; with several ranks, `communication.connect` comes first.

    Raises:
        UserError: the device is unknown or not present, or the model cannot be laid out like this.
    """
    return TorchEngine(config, settings)


class TorchEngine(BaseEngine[torch.Tensor]):
    """`tandem.backends.interface.Engine` on PyTorch."""

    framework = TORCH
    readers = 2  # to hash a block takes longer than to read it

    def __init__(self, config: ModelConfig, settings: EngineSettings) -> None:
        super().__init__(config, settings)
        self._device = choose_device(settings.device)
        self.device_name = device_name(self._device)
        self.reads_ahead = kernels_of(self._device).reads_ahead
        self.param_dtype = self._choose_dtype(
            has_bf16=has_native_bf16(self._device),
            without_bf16=f"{self._device.type} does not compute in bfloat16 natively",
        )
        self._dtype: torch.dtype = getattr(torch, self.param_dtype)
        self._groups = make_groups(self._grid, settings.rank, interleaved=len(self._stage) > 1)
        self._tensor = make_tensor_parallel(settings, self._groups, self._vocabulary_rows)
        self._sharing: Sharing
        if settings.use_torch_fsdp2 and self._grid.data_size > 1:
            from tandem.backends.torch.fully_sharded import (
                FullySharded,
            )  # imported here, because PyTorch's part is slow to load

            self._sharing = sharded = FullySharded(self._groups.data, self._dtype, self._device)
            kept_dtype, shard = torch.float32, sharded.add
        else:
            self._sharing = self._replicated(by_rows=settings.use_distributed_optimizer)
            kept_dtype, shard = self._dtype, None
        self.by_rows = ByRows(self._sharing.weights_by_rows, self._sharing.by_rows, self._sharing.by_rows)
        pipeline = Pipeline(self._grid, self._place, len(self._stage), self._groups.pipelines)
        pipeline.open(self._device, ends=config.tied)
        chunks = [
            Chunk(slots, pipeline.source(number) is None, pipeline.target(number) is None)
            for number, slots in enumerate(self._stage)
        ]
        build = Build(
            self._local_config(),
            kept_dtype,
            self._device,
            self._tensor,
            self._adapters,
            self._adapters_switch,
            shard,
            ExpertRanks(self._groups.experts, self._share),
        )
        counts = recompute_counts(self._stage, settings.recompute_layers)
        models = [GPTModel(build, chunk, count) for chunk, count in zip(chunks, counts)]
        self._passes = Passes(config, models, pipeline, self._sharing, self._dtype, self._device, self._balancing)
        self._weights = self._name_weights(models)
        for name, weight in self._weights.items():
            weight.requires_grad_(name in self._trained)
        self._sharing.prepare(list(self._weights.values()), training=settings.training)
        if settings.training:
            self._sharing.overlap(parts_of(models))
            if settings.overlap_param_gather and not self._sharing.by_rows:
                self.notices.append(
                    "--overlap-param-gather: without effect, as there is no --use-distributed-optimizer"
                )
        self._adamw = self._make_adamw() if settings.training else None

    def _replicated(self, *, by_rows: bool) -> Sharing:
        data, copies = self._groups.data, self._groups.copies
        overlap = Overlap(self._settings.overlap_grad_reduce, self._settings.overlap_param_gather)
        rest = Replicated(data, by_rows=by_rows, overlap=overlap)
        if copies is data:
            return rest
        experts = Replicated(copies, by_rows=by_rows, overlap=overlap)
        return Apart(rest, experts, lambda weight: isinstance(weight, OfExperts))

    def _name_weights(self, models: Sequence[GPTModel]) -> dict[str, nn.Parameter]:
        """Weights by global name, in the tensor table's order."""
        built = {
            (number, name): weight for number, model in enumerate(models) for name, weight in model.named_parameters()
        }
        named = {name: built.pop((shard.chunk, shard.local_name)) for name, shard in self._shards.items()}
        assert not built, f"weights that the layout does not name: {sorted(built)}"
        for name, weight in named.items():
            assert weight.shape == self._shards[name].shape, name
        return named

    def _make_adamw(self) -> AdamW:
        updated = {name: self._sharing.updated(self._weights[name]) for name in self._trained}
        return AdamW(
            {name: rows for name, rows in updated.items() if len(rows)},
            lambda name: self._sharing.gradient(self._weights[name]),
            self._settings,
        )

    def _kept(self, kind: TensorKind) -> Mapping[str, torch.Tensor]:
        if kind == "model":
            return {name: self._sharing.kept(weight) for name, weight in self._weights.items()}
        if self._adamw is None or (kind == "master" and self._dtype == torch.float32):
            return {}
        return {"master": self._adamw.master, "exp_avg": self._adamw.exp_avg, "exp_avg_sq": self._adamw.exp_avg_sq}[
            kind
        ]

    @staticmethod
    def _fill(blocks: Iterator[tuple[int, np.ndarray]], *targets: tuple[torch.Tensor, int]) -> None:
        for first, block in blocks:
            rows = torch.from_numpy(block)
            for target, start in targets:
                low, high = max(first, start), min(first + len(rows), start + len(target))
                if low < high:
                    target[low - start : high - start].copy_(rows[low - first : high - first])

    def _to_numpy(self, kind: TensorKind, tensor: torch.Tensor) -> np.ndarray:
        host = (tensor.to(self._dtype) if kind == "model" else tensor).detach().cpu()
        if host.dtype == torch.bfloat16:
            return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return host.numpy()

    @staticmethod
    def _joined_on_host(values: Sequence[torch.Tensor]) -> np.ndarray:
        return torch.cat([value.flatten().float() for value in values]).cpu().numpy()

    def _sum_over_ranks(self, *values: torch.Tensor | float) -> list[float]:
        return self._totals(*values).tolist()

    def _totals(self, *values: torch.Tensor | float) -> torch.Tensor:
        """The sums over all ranks, on the device."""
        kept_in = kernels_of(self._device).sums
        wide = (
            value.to(kept_in)
            if isinstance(value, torch.Tensor)
            else torch.full((), value, dtype=kept_in, device=self._device)
            for value in values
        )
        return sum_over(self._groups.everyone, torch.stack(list(wide)))

    def _finish(
        self,
        totals: tuple[torch.Tensor | float, torch.Tensor | float, float],
        lr: float,
        weight_decay: float,
        loss_limit: float,
        loss_scale: float,
        loss: float | None,
    ) -> StepResult:
        # The decision stays on the device. It is read after all is launched, where the device can skip the update.
        assert self._adamw is not None
        decision = Decision.of(self._totals(*totals), loss_limit, loss_scale, self._settings.clip_grad, loss)
        known = None if kernels_of(self._device).update_skips else decision.read()
        if known is None or known.applied:
            self._adamw.update(self.optimizer_step + 1, lr, weight_decay, decision)
            self._sharing.share()
        result = known or decision.read()
        self.optimizer_step += result.applied
        return result

    def _largest_of_data_ranks(self, count: int) -> int:
        # Ranks of a stage, and of a tensor, have equally many, so all ranks have the same largest number.
        return maximum_over(self._groups.everyone, count)

    def _accumulate(self, batches: Sequence[WeightedBatch]) -> torch.Tensor | float:
        self._sharing.begin(gradients=True)
        loss = self._passes.accumulate(batches)
        self._sharing.end()
        return loss

    def _losses(
        self, batches: Sequence[MicroBatch], most_likely: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        self._sharing.begin(gradients=False)
        losses = self._passes.losses(batches, most_likely)
        self._sharing.end()
        return losses

    def _from_last_stage(self, values: np.ndarray) -> np.ndarray:
        if self._grid.pipeline_size == 1 or not len(values):
            return values
        shared = torch.from_numpy(values).to(self._device)
        self._passes.pipeline.copy_from_end(shared)
        return shared.cpu().numpy()

    def _sum_gradients(self) -> None:
        self._sharing.reduce()
        if self._tensor is not None:
            partial = self._partial_names(sequence_parallel=self._tensor.sequence)
            self._tensor.sum_all(self._sharing.gradient(self._weights[name]) for name in partial)
        if self.config.tied and self._grid.pipeline_size > 1 and EMBEDDING in self._trained:
            self._passes.pipeline.sum_over_ends(self._sharing.gradient(self._weights[EMBEDDING]))

    def _sum_of_squares(self, names: Iterable[str]) -> torch.Tensor | float:
        gradients = (self._sharing.gradient(self._weights[name]) for name in names)
        return sum_of_squares(gradient for gradient in gradients if len(gradient))

    def _gradients(self) -> dict[str, np.ndarray]:
        gradients = {name: self._sharing.whole_gradient(self._weights[name]) for name in self._trained}
        return {name: gradient.cpu().numpy().copy() for name, gradient in gradients.items()}

    @contextmanager
    def _watched_by(self, look: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        names = {module: name for name, module in self._passes.named_modules(self._shards.values())}

        def hook(module: nn.Module, _: object, output: torch.Tensor) -> None:
            look(names[module], output)

        hooks = [module.register_forward_hook(hook) for module in names]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _is_finite(self, tensor: torch.Tensor) -> bool:
        return bool(torch.isfinite(tensor).all())

    def _logits(self, micro_batch: MicroBatch, rows: np.ndarray) -> np.ndarray:
        hidden = self._passes.hidden(micro_batch, torch.from_numpy(rows.astype(np.int64)).to(self._device))
        assert hidden is not None
        return matmul(hidden, self._passes.chunks[0].head).detach().float().cpu().numpy()

    def _computes(self) -> TorchSession:
        return TorchSession(
            self._passes, self._groups.model, self._local_config(), self._own_layers(), *self._grid.sharer(self._place)
        )

    def _free_memory_of_device(self) -> int:
        device = getattr(torch, self._device.type)
        unused = device.memory_reserved(self._device) - device.memory_allocated(self._device)
        return int(device.mem_get_info(self._device)[0] + unused)

    def _peak_of_device(self) -> int:
        return int(getattr(torch, self._device.type).max_memory_allocated(self._device))


def make_tensor_parallel(
    settings: EngineSettings, groups: Groups, vocabulary_rows: Callable[[int], int]
) -> TensorParallel | None:
    ranks = groups.tensor
    if ranks.group is None:
        return None
    return TensorParallel(ranks.group, ranks.rank, ranks.size, settings.sequence_parallel, vocabulary_rows(0))
