"""The train step on PyTorch: one rank of any number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist

from tandem.backends.interface import EngineSettings, StepResult
from tandem.backends.memory import process_peak
from tandem.backends.torch.communication import Groups, make_groups, sum_over
from tandem.backends.torch.data_parallel import DataParallel
from tandem.backends.torch.device import choose_device, device_name, has_native_bf16
from tandem.backends.torch.functional import GradientBuffer, Weight, matmul
from tandem.backends.torch.model import Build, Chunk, GPTModel
from tandem.backends.torch.optimizer import AdamW, clip_coefficient, norm_of
from tandem.backends.torch.passes import Passes
from tandem.backends.torch.pipeline import Pipeline
from tandem.backends.torch.tensor_parallel import TensorParallel
from tandem.checkpoints.interface import Kind, TensorSource, check_shape
from tandem.data.batch import MicroBatch
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.parallel.grid import counted_shards, held_shards, saved_shards
from tandem.parallel.layout import Shard, part_of
from tandem.parallel.slices import Part


def create(config: ModelConfig, settings: EngineSettings) -> TorchEngine:
    """Build an engine with undefined weights; with several ranks, `communication.connect` comes first.

    Raises:
        UserError: the device is unknown or not present, or the model cannot be laid out like this.
    """
    return TorchEngine(config, settings)


class TorchEngine:
    """`tandem.backends.interface.Engine` on PyTorch."""

    def __init__(self, config: ModelConfig, settings: EngineSettings) -> None:
        self.config = config
        self.notices: list[str] = []
        self._settings, self._grid = settings, settings.grid
        self._device = choose_device(settings.device)
        self.device_name = device_name(self._device)
        self._dtype = torch.float32
        if settings.bf16 and has_native_bf16(self._device):
            self._dtype = torch.bfloat16
        elif settings.bf16:
            self.notices.append(f"bf16: {self._device.type} does not compute in bfloat16 natively; computing in fp32")
        self.param_dtype = str(self._dtype).removeprefix("torch.")
        self._grid.layout.check(config)
        self._place = self._grid.place(settings.rank)
        stage = self._grid.layout.stages(config.num_layers)[self._place.pipeline]
        self._groups = make_groups(self._grid, settings.rank, tied=config.tied, chunks=len(stage))
        self._tensor = make_tensor_parallel(config, settings, self._groups)
        self._data = DataParallel(self._groups.data, by_rows=settings.use_distributed_optimizer)
        pipeline = Pipeline(self._grid, self._place, len(stage), self._groups.channels)
        slots = [tuple(slot.local for slot in chunk) for chunk in stage]
        chunks = [
            Chunk(own, pipeline.source(number) is None, pipeline.target(number) is None)
            for number, own in enumerate(slots)
        ]
        build = Build(self._local_config(), self._dtype, self._device, self._tensor)
        models = [GPTModel(build, chunk, settings.recompute_layers) for chunk in chunks]
        self._passes = Passes(config, models, pipeline, self._dtype, self._device)
        self._shards = {shard.spec.name: shard for shard in held_shards(config, self._grid, self._place)}
        self._weights = self._name_weights(models)
        self._buffers: dict[str, GradientBuffer] = {}
        self._adamw = self._prepare_training() if settings.training else None

    @property
    def optimizer_step(self) -> int:
        return self._adamw.step if self._adamw else 0

    def load_weights(self, source: TensorSource) -> None:
        kind: Kind = "master" if "master" in source.kinds() else "model"
        for name, weight in self._weights.items():
            values = _read(source, name, kind, self._shards[name].part)
            weight.data.copy_(values)
            if self._adamw and name in self._adamw.master:
                self._adamw.master[name].copy_(self._own(values))

    def load_optimizer(self, source: TensorSource, optimizer_step: int) -> None:
        adamw = self._require_training()
        absent = {"exp_avg", "exp_avg_sq"} - set(source.kinds())
        if absent:
            raise UserError(f"{source.location} holds no optimizer state ({', '.join(sorted(absent))})")
        for name in adamw.master:
            part = self._shards[name].part
            own = part.rows(*self._data.own(part.shape[0]))
            adamw.exp_avg[name].copy_(_read(source, name, "exp_avg", own))
            adamw.exp_avg_sq[name].copy_(_read(source, name, "exp_avg_sq", own))
        adamw.step = optimizer_step

    def tensors(self) -> Iterator[tuple[Kind, Shard, np.ndarray]]:
        for shard in saved_shards(self.config, self._grid, self._place, by_rows=False):
            yield "model", shard, _to_numpy(self._weights[shard.spec.name])
        if self._adamw is None:
            return
        kinds: list[tuple[Kind, dict[str, torch.Tensor]]] = []
        if self._dtype != torch.float32:
            kinds.append(("master", self._adamw.master))
        kinds += [("exp_avg", self._adamw.exp_avg), ("exp_avg_sq", self._adamw.exp_avg_sq)]
        saved = saved_shards(self.config, self._grid, self._place, by_rows=self._data.by_rows)
        for kind, tensors in kinds:
            for shard in saved:
                yield kind, shard, _to_numpy(tensors[shard.spec.name])

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, weight_decay: float) -> StepResult:
        adamw = self._require_training()
        loss, trained = self._accumulate(micro_batches)
        self._sum_gradients(everywhere=False)
        loss, norm = self._loss_and_norm(loss)
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            adamw.update(lr, weight_decay, clip_coefficient(norm, self._settings.clip_grad))
            self._data.share(self._weights.values())
        return StepResult(loss / trained, norm, trained, applied)

    def loss_and_gradients(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, dict[str, np.ndarray]]:
        self._require_training()
        loss, trained = self._accumulate(micro_batches)
        self._sum_gradients(everywhere=True)
        (loss,) = sum_over(self._groups.everyone, [loss])
        return loss / trained, {name: buffer.value.cpu().numpy().copy() for name, buffer in self._buffers.items()}

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        total = self._reported(self._passes.evaluate([batch for batch in micro_batches if batch.trained_tokens]))
        total, trained = sum_over(self._groups.everyone, [total, self._counted_tokens(micro_batches)])
        return total, int(trained)

    def logits(self, micro_batch: MicroBatch, rows: np.ndarray | None = None) -> np.ndarray:
        assert self._grid.size == 1, "logits are computed in one process"
        chosen = None if rows is None else torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(self._device)
        hidden = self._passes.hidden(micro_batch, chosen)
        return matmul(hidden, self._passes.chunks[0].head).detach().float().cpu().numpy()

    def peak_memory(self) -> int:
        if self._device.type == "cpu":
            return process_peak()
        return int(getattr(torch, self._device.type).max_memory_allocated(self._device))

    def _local_config(self) -> ModelConfig:
        """The config of this rank's slices."""
        config, size = self.config, self._grid.tensor_size
        rows = part_of(tensor_table(config)[EMBEDDING], size, self._place.tensor).shape[0]
        return dataclasses.replace(
            config,
            num_attention_heads=config.num_attention_heads // size,
            num_query_groups=config.num_query_groups // size,
            ffn_hidden_size=config.ffn_hidden_size // size,
            vocab_size=rows,
        )

    def _name_weights(self, models: Sequence[GPTModel]) -> dict[str, Weight]:
        """Weights by global name, in the tensor table's order."""
        built = {(number, name): weight for number, model in enumerate(models) for name, weight in model.weights()}
        named = {name: built.pop((shard.chunk, shard.local_name)) for name, shard in self._shards.items()}
        assert not built, f"not laid out: {sorted(built)}"
        for name, weight in named.items():
            assert weight.shape == self._shards[name].shape, name
        return named

    def _prepare_training(self) -> AdamW:
        for name, weight in self._weights.items():
            self._data.make_room(weight)
            self._buffers[name] = weight.main_grad = GradientBuffer(weight, self._data.room(len(weight)))
        own = {name: self._own(weight.data) for name, weight in self._weights.items()}
        return AdamW(
            {name: rows for name, rows in own.items() if len(rows)},
            lambda name: self._own(self._buffers[name].value),
            self._settings,
        )

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a weight, or of anything of its shape, that this rank updates."""
        start, stop = self._data.own(len(tensor))
        return tensor[start:stop]

    def _accumulate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Fill the gradient buffers. Returns this rank's part of the summed loss, and all ranks' trained tokens."""
        (trained,) = sum_over(self._groups.everyone, [self._counted_tokens(micro_batches)])
        if not trained:
            raise ValueError(f"none of the {len(micro_batches)} micro-batches has a trained token")
        for buffer in self._buffers.values():
            buffer.clear()
        # Interleaved stages need whole rounds of micro-batches, trained or not.
        batches = [b for b in micro_batches if b.trained_tokens or len(self._passes.chunks) > 1]
        return self._reported(self._passes.accumulate(batches, 1 / trained)), int(trained)

    def _sum_gradients(self, *, everywhere: bool) -> None:
        """Add up what several ranks hold parts of; of data ranks' sums each gets its own rows, or `everywhere` all."""
        if self._tensor is not None:
            self._tensor.sum_all(self._buffers[name].value for name in self._partial_names())
        self._data.reduce(self._buffers.values(), everywhere=everywhere)
        if self._groups.tied.group is not None:
            gradient = self._buffers[EMBEDDING].value
            dist.all_reduce(gradient if everywhere else self._own(gradient), group=self._groups.tied.group)

    def _partial_names(self) -> list[str]:
        """Replicated weights whose gradient on a tensor rank is a part of the sum: those that see only its heads, and,
        where tokens are split, those that see only its tokens."""
        assert self._tensor is not None
        return [
            name
            for name, shard in self._shards.items()
            if shard.spec.split.dim is None and (self._tensor.sequence or "self_attention" in name)
        ]

    def _loss_and_norm(self, loss: float) -> tuple[float, float]:
        """The summed loss of all ranks, and the norm of the whole model's gradient, each number of it counted once."""
        if self._grid.size == 1:
            return loss, norm_of(buffer.value for buffer in self._buffers.values())
        counted = [shard.spec.name for shard in counted_shards(self.config, self._grid, self._place)]
        if not self._data.by_rows and self._place.data > 0:
            counted = []
        gradients = [self._own(self._buffers[name].value) for name in counted]
        norm = norm_of(gradient for gradient in gradients if len(gradient))
        total, squares = sum_over(self._groups.everyone, [loss, norm**2])
        return total, math.sqrt(squares) if squares >= 0 else math.nan

    def _reported(self, loss: float) -> float:
        """The loss, on one of the tensor ranks that all computed it."""
        return loss if self._place.tensor == 0 else 0.0

    def _counted_tokens(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Trained tokens, on one of the ranks that share these micro-batches."""
        counts = self._place.tensor == 0 and self._place.pipeline == 0
        return float(sum(batch.trained_tokens for batch in micro_batches)) if counts else 0.0

    def _require_training(self) -> AdamW:
        if self._adamw is None:
            raise ValueError("this engine was built with EngineSettings(training=False): it cannot train")
        return self._adamw


def make_tensor_parallel(config: ModelConfig, settings: EngineSettings, groups: Groups) -> TensorParallel | None:
    ranks = groups.tensor
    if ranks.group is None:
        return None
    rows = part_of(tensor_table(config)[EMBEDDING], ranks.size, 0).shape[0]
    return TensorParallel(ranks.group, ranks.rank, ranks.size, settings.sequence_parallel, rows)


def _read(source: TensorSource, name: str, kind: Kind, part: Part) -> torch.Tensor:
    values = source.read_part(name, part, kind)
    check_shape(source.location, name, values.shape, part.shape)
    return torch.from_numpy(np.require(values, dtype=np.float32, requirements=["C", "W"]))


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    host = tensor.detach().cpu()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()
