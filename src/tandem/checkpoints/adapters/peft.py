"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, which `peft` and vLLM open."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.formats.safetensors import SafetensorsFile, SafetensorsWriter
from tandem.checkpoints.hf.companions import companion_files
from tandem.checkpoints.hf.weights import TorchWeightFile, WeightFile
from tandem.checkpoints.interface import (
    PEFT,
    Companions,
    TensorKind,
    TensorSource,
    check_shape,
)
from tandem.checkpoints.name_lists import check_names
from tandem.errors import UserError
from tandem.files.lock import publishing
from tandem.models.adapters import Adapter, adapters
from tandem.models.config import ModelConfig
from tandem.models.lora import Lora
from tandem.models.tensors import tensor_table
from tandem.parallel.slices import Part, cut

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

# Fields that change what an adapter computes, with the values for which they change nothing.
UNCHANGED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "loftq"),  # others change the model's weights
}


def is_peft(folder: Path) -> bool:
    return (folder / CONFIG).exists()


class PeftSource(TensorSource):
    """The adapters of a PEFT folder, beside the model that they are for.

    Args:
        base: the config of the model.

    Raises:
        UserError: a file is missing or damaged; the adapter is of another kind, or does not fit the model.
    """

    format = PEFT
    folder: Path

    def __init__(self, folder: str | Path, base: ModelConfig) -> None:
        self.folder = Path(folder)
        self.location = str(folder)
        self.companions = Companions(files=[path for path in companion_files(folder) if path.name != CONFIG])
        self._file = open_weights(self.folder)
        self.config = dataclasses.replace(base, lora=read_lora(self.folder))
        self._names = peft_names(self.config)
        self._check()

    def kinds(self) -> tuple[TensorKind, ...]:
        return ("model",)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return self._file.entries[self._names[name]].dtype

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return self._file.read(self._names[name])

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return cut(self.read(name), part)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        yield self.read_part(name, part)

    def _check(self) -> None:
        expected = {self._names[name]: spec for name, spec in tensor_table(self.config).items() if spec.adapter}
        check_names(f"{self._file.path}, compared with {CONFIG}", set(self._file.entries), set(expected))
        for name, spec in expected.items():
            check_shape(str(self._file.path), name, self._file.entries[name].shape, spec.shape)


def open_weights(folder: Path) -> WeightFile:
    """The file of a folder's tensors."""
    if (folder / WEIGHTS).exists():
        return SafetensorsFile(folder / WEIGHTS)
    if (folder / TORCH_WEIGHTS).exists():
        return TorchWeightFile(folder / TORCH_WEIGHTS)
    raise UserError(f"{folder} has a {CONFIG}, but neither {WEIGHTS} nor {TORCH_WEIGHTS}")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, not a JSON object")
    return values


def read_lora(folder: Path) -> Lora:
    """The adapters that a folder's config describes.

    Raises:
        UserError: it describes what Tandem does not compute. Every such field is named.
    """
    values, path = read_config(folder), folder / CONFIG
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {values.get('peft_type')!r}; expected 'LORA'")
    wrong = [
        f"{name} {values[name]!r}" for name, same in UNCHANGED.items() if name in values and values[name] not in same
    ]
    if wrong:
        raise UserError(f"{path}: not supported: {', '.join(wrong)}")
    if (modules := values.get("target_modules")) is None:
        raise UserError(f"{path}: target_modules is missing")
    layers = values.get("layers_to_transform")
    try:
        return Lora(
            r=values.get("r", 8),
            lora_alpha=values.get("lora_alpha", 8),
            target_modules=modules if isinstance(modules, str) else tuple(sorted(modules)),
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
            lora_dropout=values.get("lora_dropout") or 0.0,
            rank_pattern=tuple((values.get("rank_pattern") or {}).items()),
            alpha_pattern=tuple((values.get("alpha_pattern") or {}).items()),
            layers_to_transform=None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
            exclude_modules=_names(values.get("exclude_modules")),
        )
    except (UserError, re.error) as error:
        raise UserError(f"{path}: {error}") from error


def _names(modules: Any) -> tuple[str, ...] | str | None:
    return modules if modules is None or isinstance(modules, str) else tuple(sorted(modules)) or None


def peft_names(config: ModelConfig) -> dict[str, str]:
    """The names in PEFT's file by global name, for adapters of Hugging Face modules."""
    return {
        name: f"{PREFIX}{adapter.path}.{suffix}"
        for layer in range(config.num_layers)
        for adapter in adapters(config, layer)
        for name, suffix in ((adapter.a, A), (adapter.b, B), (adapter.magnitude, MAGNITUDE))
    }


def write_peft(folder: str | Path, source: TensorSource, base_model: str) -> None:
    """Write the adapters of a source as a PEFT folder, which appears whole or not at all.

    An adapter of a whole Megatron weight becomes one for each of its Hugging Face modules, with the same A.

    Args:
        base_model: the path or name of the model, for the config.

    Raises:
        UserError: the folder exists, or a tensor is damaged.
    """
    tensors = dict(_tensors(source))
    with publishing(Path(folder)) as work:
        writer = SafetensorsWriter(
            work / WEIGHTS, {name: (value.dtype, value.shape) for name, value in tensors.items()}, {"format": "pt"}
        )
        for name, value in tensors.items():
            writer.write(name, value)
        writer.close()
        text = json.dumps(_config(source.config, base_model), indent=2, sort_keys=True)
        (work / CONFIG).write_text(text + "\n", encoding="utf-8")
        for path in source.companions.files:
            if path.name not in ("generation_config.json", CONFIG):
                (work / path.name).write_bytes(path.read_bytes())


def _tensors(source: TensorSource) -> Iterator[tuple[str, np.ndarray]]:
    table = tensor_table(source.config)
    for layer in range(source.config.num_layers):
        for adapter in adapters(source.config, layer):
            factor, rows = source.read(adapter.a), source.read(adapter.b)
            lengths = source.read(adapter.magnitude) if adapter.magnitude in table else None
            for path, ranges in _modules(adapter, len(rows), source.config):
                yield f"{PREFIX}{path}.{A}", factor
                yield f"{PREFIX}{path}.{B}", np.concatenate([rows[start:stop] for start, stop in ranges])
                if lengths is not None:
                    yield f"{PREFIX}{path}.{MAGNITUDE}", np.concatenate([lengths[start:stop] for start, stop in ranges])


def _modules(adapter: Adapter, rows: int, config: ModelConfig) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    """The Hugging Face modules of an adapter, and which rows of its B belong to each."""
    if adapter.part is not None:
        return [(adapter.path, ((0, rows),))]
    paths = [f"model.layers.{adapter.layer}.{name.removesuffix('.weight')}" for name in adapter.row.hf]
    return list(zip(paths, adapter.row.ranges(rows, config)))


def _config(config: ModelConfig, base_model: str) -> dict[str, Any]:
    """The content of `adapter_config.json`, with every module named."""
    lora = config.lora
    assert lora is not None
    table = tensor_table(config)
    modules: set[str] = set()
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer in range(config.num_layers):
        for adapter in adapters(config, layer):
            for path, _ in _modules(adapter, table[adapter.b].shape[0], config):
                modules.add(path)
                ranks |= {path: adapter.rank} if adapter.rank != lora.r else {}
                alphas |= {path: adapter.alpha} if adapter.alpha != lora.lora_alpha else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": _shortest(modules, config.num_layers),
        "exclude_modules": None,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
    }


def _shortest(paths: set[str], num_layers: int) -> list[str]:
    """The modules by their last names, where every layer has them; otherwise by their paths."""
    counts: dict[str, int] = {}
    for path in paths:
        counts[path.rpartition(".")[2]] = counts.get(path.rpartition(".")[2], 0) + 1
    return sorted({name if counts[name := path.rpartition(".")[2]] == num_layers else path for path in paths})
