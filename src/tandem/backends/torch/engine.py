"""The train step on PyTorch, for one process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from tandem.backends.interface import EngineSettings, StepResult
from tandem.backends.memory import process_peak
from tandem.backends.torch.functional import GradientBuffer, Weight, matmul
from tandem.backends.torch.loss import cross_entropy, cross_entropy_and_gradient
from tandem.backends.torch.model import GPTModel, prepare
from tandem.backends.torch.optimizer import AdamW, clip_coefficient, global_norm
from tandem.checkpoints.interface import Kind, TensorSource, check_shape
from tandem.data.batch import IGNORE, MicroBatch
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.parallel.grid import saved_shards
from tandem.parallel.layout import Shard

DEVICES = ("npu", "cuda", "cpu")  # best first


def create(config: ModelConfig, settings: EngineSettings) -> TorchEngine:
    """Build an engine with undefined weights.

    Raises:
        UserError: the device is unknown or not present.
    """
    return TorchEngine(config, settings)


class TorchEngine:
    """`tandem.backends.interface.Engine` on PyTorch."""

    def __init__(self, config: ModelConfig, settings: EngineSettings) -> None:
        self.config = config
        self.notices: list[str] = []
        self._settings = settings
        self._device = choose_device(settings.device)
        self.device_name = _name(self._device)
        self._dtype = torch.float32
        if settings.bf16 and has_native_bf16(self._device):
            self._dtype = torch.bfloat16
        elif settings.bf16:
            self.notices.append(f"bf16: {self._device.type} does not compute in bfloat16 natively; computing in fp32")
        self.param_dtype = str(self._dtype).removeprefix("torch.")
        self._model = GPTModel(config, settings.recompute_layers, self._dtype, self._device)
        by_name = dict(self._model.weights())
        self._weights: dict[str, Weight] = {name: by_name[name] for name in tensor_table(config)}
        self._saved = saved_shards(config, settings.grid, settings.grid.place(settings.rank), by_rows=False)
        self._buffers: dict[str, GradientBuffer] = {}
        self._adamw: AdamW | None = None
        if settings.training:
            for name, weight in self._weights.items():
                self._buffers[name] = weight.main_grad = GradientBuffer(weight)
            self._adamw = AdamW(self._weights, settings)

    @property
    def optimizer_step(self) -> int:
        return self._adamw.step if self._adamw else 0

    def load_weights(self, source: TensorSource) -> None:
        kind: Kind = "master" if "master" in source.kinds() else "model"
        for name, weight in self._weights.items():
            values = _read(source, name, kind, tuple(weight.shape))
            weight.data.copy_(values)
            if self._adamw:
                self._adamw.master[name].copy_(values)

    def load_optimizer(self, source: TensorSource, optimizer_step: int) -> None:
        adamw = self._require_training()
        absent = {"exp_avg", "exp_avg_sq"} - set(source.kinds())
        if absent:
            raise UserError(f"{source.location} holds no optimizer state ({', '.join(sorted(absent))})")
        for name, weight in self._weights.items():
            adamw.exp_avg[name].copy_(_read(source, name, "exp_avg", tuple(weight.shape)))
            adamw.exp_avg_sq[name].copy_(_read(source, name, "exp_avg_sq", tuple(weight.shape)))
        adamw.step = optimizer_step

    def tensors(self) -> Iterator[tuple[Kind, Shard, np.ndarray]]:
        kinds: list[tuple[Kind, dict[str, torch.Tensor]]] = [("model", dict(self._weights))]
        if self._adamw:
            if self._dtype != torch.float32:
                kinds.append(("master", self._adamw.master))
            kinds += [("exp_avg", self._adamw.exp_avg), ("exp_avg_sq", self._adamw.exp_avg_sq)]
        for kind, tensors in kinds:
            for shard in self._saved:
                yield kind, shard, _to_numpy(tensors[shard.spec.name])

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, weight_decay: float) -> StepResult:
        adamw = self._require_training()
        loss, trained = self._accumulate(micro_batches)
        norm = global_norm(self._buffers.values())
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            adamw.update(lr, weight_decay, clip_coefficient(norm, self._settings.clip_grad))
        return StepResult(loss, norm, trained, applied)

    def loss_and_gradients(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, dict[str, np.ndarray]]:
        self._require_training()
        loss, _ = self._accumulate(micro_batches)
        return loss, {name: buffer.value.cpu().numpy().copy() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        total = 0.0
        for batch in micro_batches:
            if batch.trained_tokens:
                rows, labels = self._trained(batch)
                total += cross_entropy(self._hidden(batch, rows), self._model.head, labels)
        return total, sum(batch.trained_tokens for batch in micro_batches)

    @torch.no_grad()
    def logits(self, micro_batch: MicroBatch, rows: np.ndarray | None = None) -> np.ndarray:
        chosen = None if rows is None else torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(self._device)
        logits = matmul(self._hidden(micro_batch, chosen), self._model.head)
        return logits.float().cpu().numpy()

    def peak_memory(self) -> int:
        if self._device.type == "cpu":
            return process_peak()
        return int(getattr(torch, self._device.type).max_memory_allocated(self._device))

    def _accumulate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Fill the gradient buffers. Returns the mean loss, and the number of trained tokens that it is over."""
        trained = sum(batch.trained_tokens for batch in micro_batches)
        if not trained:
            raise ValueError(f"none of the {len(micro_batches)} micro-batches has a trained token")
        for buffer in self._buffers.values():
            buffer.clear()
        total = 0.0
        for batch in micro_batches:
            if batch.trained_tokens:
                rows, labels = self._trained(batch)
                hidden = self._hidden(batch, rows)
                loss, dhidden = cross_entropy_and_gradient(hidden.detach(), self._model.head, labels, 1 / trained)
                hidden.backward(dhidden)
                total += loss
        return total / trained, trained

    def _hidden(self, batch: MicroBatch, rows: torch.Tensor | None) -> torch.Tensor:
        batch.check_vocabulary(self.config.vocab_size)
        return self._model(prepare(self.config, batch, self._dtype, self._device), rows)

    def _trained(self, batch: MicroBatch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The positions whose labels count (None for all), and those labels."""
        rows = np.flatnonzero(batch.labels != IGNORE)
        labels = torch.from_numpy(batch.labels[rows].astype(np.int64)).to(self._device)
        return (None if len(rows) == len(batch.labels) else torch.from_numpy(rows).to(self._device)), labels

    def _require_training(self) -> AdamW:
        if self._adamw is None:
            raise ValueError("this engine was built with EngineSettings(training=False): it cannot train")
        return self._adamw


def choose_device(name: str | None) -> torch.device:
    """The named device, or the best one present."""
    present = [device for device in DEVICES if _is_present(device)]
    if name is None:
        return torch.device(present[0])
    if name not in present:
        raise UserError(f"device {name!r} is not available to PyTorch here; available: {', '.join(present)}")
    return torch.device(name)


def has_native_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run in hardware. On a CPU that is for Linux to say."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
        return bool(flags & {"avx512_bf16", "amx_bf16"})
    return True


def _name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(getattr(torch, device.type).get_device_name(device))


def _is_present(device: str) -> bool:
    if device == "npu":
        try:
            import torch_npu  # type: ignore[import-not-found] # noqa: F401
        except ImportError:
            return False
        return bool(torch.npu.is_available())  # type: ignore[attr-defined]
    return device == "cpu" or torch.cuda.is_available()


def _read(source: TensorSource, name: str, kind: Kind, shape: tuple[int, ...]) -> torch.Tensor:
    values = source.read(name, kind)
    check_shape(source.location, name, values.shape, shape)
    return torch.from_numpy(np.require(values, dtype=np.float32, requirements=["C", "W"]))


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    host = tensor.detach().cpu()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()
