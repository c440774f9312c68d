"""The train step on PyTorch: one rank of any number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import ml_dtypes
import numpy as np
import torch
from torch import nn

from tandem.backends.interface import EngineSettings, StepResult, UntrainedError, is_trusted
from tandem.backends.loading import load_each, stream_fp32
from tandem.backends.memory import process_peak
from tandem.backends.torch.communication import Groups, make_groups, maximum_over, sum_over
from tandem.backends.torch.data_parallel import Replicated, Sharing, own_rows
from tandem.backends.torch.device import choose_device, device_name, has_native_bf16
from tandem.backends.torch.functional import matmul
from tandem.backends.torch.model import Build, Chunk, GPTModel
from tandem.backends.torch.optimizer import AdamW, clip_coefficient, norm_of
from tandem.backends.torch.passes import Passes
from tandem.backends.torch.pipeline import Pipeline
from tandem.backends.torch.tensor_parallel import TensorParallel
from tandem.checkpoints.interface import TensorKind, TensorSource, kinds_to_load
from tandem.data.batch import IGNORE, MicroBatch
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.parallel.grid import counted_shards, held_shards, saved_shards
from tandem.parallel.layout import Shard, part_of
from tandem.parallel.slices import Part

# One token that predicts nothing.
UNTRAINED = MicroBatch(
    tokens=np.zeros(1, np.int32),
    labels=np.full(1, IGNORE, np.int32),
    position_ids=np.zeros(1, np.int32),
    cu_seqlens=np.array([0, 1], np.int32),
)


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
        elif settings.fp16:
            self._dtype = torch.float16
        self.param_dtype = str(self._dtype).removeprefix("torch.")
        self._grid.layout.check(config)
        self._place = self._grid.place(settings.rank)
        stage = self._grid.layout.stages(config.num_layers)[self._place.pipeline]
        self._groups = make_groups(self._grid, settings.rank, interleaved=len(stage) > 1)
        self._tensor = make_tensor_parallel(config, settings, self._groups)
        self._sharing: Sharing
        if settings.use_torch_fsdp2 and self._grid.data_size > 1:
            from tandem.backends.torch.fully_sharded import FullySharded  # here, because PyTorch's part is slow to load

            self._sharing = sharded = FullySharded(self._groups.data, self._dtype, self._device)
            kept_dtype, shard = torch.float32, sharded.add
        else:
            self._sharing = Replicated(self._groups.data, by_rows=settings.use_distributed_optimizer)
            kept_dtype, shard = self._dtype, None
        pipeline = Pipeline(self._grid, self._place, len(stage), self._groups.pipelines)
        slots = [tuple(slot.local for slot in chunk) for chunk in stage]
        chunks = [
            Chunk(own, pipeline.source(number) is None, pipeline.target(number) is None)
            for number, own in enumerate(slots)
        ]
        build = Build(self._local_config(), kept_dtype, self._device, self._tensor, shard)
        counts = recompute_counts(slots, settings.recompute_layers)
        models = [GPTModel(build, chunk, count) for chunk, count in zip(chunks, counts)]
        self._passes = Passes(config, models, pipeline, self._sharing, self._dtype, self._device)
        self._shards = {shard.spec.name: shard for shard in held_shards(config, self._grid, self._place)}
        self._weights = self._name_weights(models)
        self._sharing.prepare(list(self._weights.values()), training=settings.training)
        self._adamw = self._make_adamw() if settings.training else None

    @property
    def optimizer_step(self) -> int:
        return self._adamw.step if self._adamw else 0

    def load_weights(self, source: TensorSource) -> None:
        load_each(lambda name: self._load_weight(source, name), self._weights)

    def _load_weight(self, source: TensorSource, name: str) -> None:
        kind, master_kind = kinds_to_load(source, name, self.param_dtype)
        own, by_rows = self._own_part(name), self._sharing.weights_by_rows
        kept = self._sharing.kept(self._weights[name])
        masters = self._adamw.master if self._adamw and self._dtype != torch.float32 else {}
        also = [] if name not in masters else [(masters[name], 0 if by_rows else self._own_rows(name)[0])]
        blocks = stream_fp32(source, name, own if by_rows else self._shards[name].part, kind)
        if master_kind == kind:
            _fill(blocks, (kept, 0), *also)
        else:
            _fill(blocks, (kept, 0))
            for master, _ in also:
                _fill(stream_fp32(source, name, own, master_kind), (master, 0))

    def load_optimizer(self, source: TensorSource, optimizer_step: int) -> None:
        adamw = self._require_training()
        absent = {"exp_avg", "exp_avg_sq"} - set(source.kinds())
        if absent:
            raise UserError(f"{source.location} holds no optimizer state ({', '.join(sorted(absent))})")
        moments: dict[TensorKind, dict[str, torch.Tensor]] = {"exp_avg": adamw.exp_avg, "exp_avg_sq": adamw.exp_avg_sq}

        def load(item: tuple[TensorKind, str]) -> None:
            kind, name = item
            _fill(stream_fp32(source, name, self._own_part(name), kind), (moments[kind][name], 0))

        load_each(load, [(kind, name) for kind in moments for name in adamw.master])
        adamw.step = optimizer_step

    def _own_rows(self, name: str) -> tuple[int, int]:
        """The rows of a weight's slice that this rank updates."""
        return own_rows(self._sharing.ranks, self._shards[name].shape[0], by_rows=self._sharing.by_rows)

    def _own_part(self, name: str) -> Part:
        return self._shards[name].part.rows(*self._own_rows(name))

    def tensors(self, first_rank: int = 0) -> Iterator[tuple[TensorKind, Shard, np.ndarray]]:
        def saved(by_rows: bool) -> list[Shard]:
            return saved_shards(self.config, self._grid, self._settings.rank, by_rows=by_rows, first_rank=first_rank)

        for shard in saved(self._sharing.weights_by_rows):
            yield "model", shard, _to_numpy(self._sharing.kept(self._weights[shard.spec.name]).to(self._dtype))
        if self._adamw is None:
            return
        kinds: list[tuple[TensorKind, dict[str, torch.Tensor]]] = []
        if self._dtype != torch.float32:
            kinds.append(("master", self._adamw.master))
        kinds += [("exp_avg", self._adamw.exp_avg), ("exp_avg_sq", self._adamw.exp_avg_sq)]
        for kind, tensors in kinds:
            for shard in saved(self._sharing.by_rows):
                yield kind, shard, _to_numpy(tensors[shard.spec.name])

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        lr: float,
        weight_decay: float,
        loss_limit: float = math.inf,
        loss_scale: float = 1.0,
    ) -> StepResult:
        adamw = self._require_training()
        loss, trained = self._accumulate(micro_batches, loss_scale)
        self._sum_gradients()
        loss, norm = self._loss_and_norm(loss)
        norm /= loss_scale
        applied = is_trusted(loss / trained, norm, loss_limit)
        if applied:
            adamw.update(lr, weight_decay, clip_coefficient(norm, self._settings.clip_grad) / loss_scale)
            self._sharing.share()
        return StepResult(loss / trained, norm, trained, applied)

    def loss_and_gradients(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, dict[str, np.ndarray]]:
        self._require_training()
        loss, trained = self._accumulate(micro_batches)
        self._sum_gradients()
        (loss,) = sum_over(self._groups.everyone, [loss])
        gradients = {name: self._sharing.whole_gradient(weight) for name, weight in self._weights.items()}
        return loss / trained, {name: gradient.cpu().numpy().copy() for name, gradient in gradients.items()}

    def first_bad_output(self, micro_batches: Sequence[MicroBatch]) -> str | None:
        found: list[str] = []

        def look(module: nn.Module, _: object, output: torch.Tensor) -> None:
            if not found and not bool(torch.isfinite(output).all()):
                found.append(names[module])

        names = {module: name for name, module in self._passes.named_modules(self._shards.values())}
        hooks = [module.register_forward_hook(look) for module in names]
        self.evaluate(micro_batches)
        for hook in hooks:
            hook.remove()
        return found[0] if found else None

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        self._sharing.begin(gradients=False)
        total = self._reported(self._passes.evaluate(self._to_run(micro_batches)))
        self._sharing.end()
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

    def _name_weights(self, models: Sequence[GPTModel]) -> dict[str, nn.Parameter]:
        """Weights by global name, in the tensor table's order."""
        built = {
            (number, name): weight for number, model in enumerate(models) for name, weight in model.named_parameters()
        }
        named = {name: built.pop((shard.chunk, shard.local_name)) for name, shard in self._shards.items()}
        assert not built, f"not laid out: {sorted(built)}"
        for name, weight in named.items():
            assert weight.shape == self._shards[name].shape, name
        return named

    def _make_adamw(self) -> AdamW:
        updated = {name: self._sharing.updated(weight) for name, weight in self._weights.items()}
        return AdamW(
            {name: rows for name, rows in updated.items() if len(rows)},
            lambda name: self._sharing.gradient(self._weights[name]),
            self._settings,
        )

    def _accumulate(self, micro_batches: Sequence[MicroBatch], loss_scale: float = 1.0) -> tuple[float, int]:
        """Fill the gradient buffers, `loss_scale` times too large. Returns this rank's part of the summed loss, and the
        trained tokens of all ranks."""
        (trained,) = sum_over(self._groups.everyone, [self._counted_tokens(micro_batches)])
        if not trained:
            raise UntrainedError
        self._sharing.begin(gradients=True)
        loss = self._reported(self._passes.accumulate(self._to_run(micro_batches), loss_scale / trained))
        self._sharing.end()
        return loss, int(trained)

    def _to_run(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Those with something to train. But interleaved stages need whole rounds of micro-batches, and ranks that
        gather weights from each other must run equally many."""
        batches = [batch for batch in micro_batches if batch.trained_tokens or len(self._passes.chunks) > 1]
        if self._sharing.weights_by_rows:
            batches += [UNTRAINED] * (maximum_over(self._sharing.ranks, len(batches)) - len(batches))
        return batches

    def _sum_gradients(self) -> None:
        """Add up what several ranks hold parts of, for what this rank updates."""
        self._sharing.reduce()
        if self._tensor is not None:
            self._tensor.sum_all(self._sharing.gradient(self._weights[name]) for name in self._partial_names())
        if self.config.tied and self._grid.pipeline_size > 1 and EMBEDDING in self._weights:
            self._passes.pipeline.sum_over_ends(self._sharing.gradient(self._weights[EMBEDDING]))

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
        """The summed loss of all ranks, and the norm of the whole model's gradient, each number of it counted once; not
        finite when any rank has a number that is not."""
        if self._grid.size == 1:
            return loss, norm_of(self._sharing.gradient(weight) for weight in self._weights.values())
        counted = [shard.spec.name for shard in counted_shards(self.config, self._grid, self._place)]
        if not self._sharing.by_rows and self._place.data > 0:
            counted = []

        def norm(names: Iterable[str]) -> float:
            gradients = (self._sharing.gradient(self._weights[name]) for name in names)
            return norm_of(gradient for gradient in gradients if len(gradient))

        squares = norm(counted) ** 2 + 0.0 * norm(name for name in self._weights if name not in counted)
        total, squares = sum_over(self._groups.everyone, [loss, squares])
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


def recompute_counts(chunks: Sequence[Sequence[int]], layers: int) -> list[int]:
    """How many layers of each chunk belong to the first `layers` of this rank."""
    starts = accumulate((len(chunk) for chunk in chunks), initial=0)
    return [min(max(layers - start, 0), len(chunk)) for start, chunk in zip(starts, chunks)]


def make_tensor_parallel(config: ModelConfig, settings: EngineSettings, groups: Groups) -> TensorParallel | None:
    ranks = groups.tensor
    if ranks.group is None:
        return None
    rows = part_of(tensor_table(config)[EMBEDDING], ranks.size, 0).shape[0]
    return TensorParallel(ranks.group, ranks.rank, ranks.size, settings.sequence_parallel, rows)


def _fill(blocks: Iterator[tuple[int, np.ndarray]], *targets: tuple[torch.Tensor, int]) -> None:
    """Put rows into tensors, each of which begins at a row of its own."""
    for first, block in blocks:
        rows = torch.from_numpy(block)
        for target, start in targets:
            low, high = max(first, start), min(first + len(rows), start + len(target))
            if low < high:
                target[low - start : high - start].copy_(rows[low - first : high - first])


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    host = tensor.detach().cpu()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()
