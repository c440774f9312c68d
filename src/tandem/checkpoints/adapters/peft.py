"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, which `peft` and vLLM open."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.adapters.peft_config import BASE, CONFIG, MERGE, is_for, read_config, read_lora, unknown_fields
from tandem.checkpoints.adapters.peft_tensors import any_expert, stored_in, to_store
from tandem.checkpoints.formats.safetensors import SafetensorsFile, SafetensorsWriter
from tandem.checkpoints.hf.companions import companion_files, write_files
from tandem.checkpoints.hf.weights import TorchWeightFile, WeightFile
from tandem.checkpoints.interface import (
    PEFT,
    Companions,
    TensorKind,
    TensorSource,
    check_shape,
)
from tandem.checkpoints.name_lists import check_names, in_a_line
from tandem.errors import UserError
from tandem.files.lock import publishing
from tandem.models.adapters import adapters
from tandem.models.config import ModelConfig
from tandem.models.end_tokens import GENERATION_CONFIG
from tandem.models.families import DENSE_MLP
from tandem.models.tensors import tensor_table
from tandem.parallel.slices import Part, cut

WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"

OF_VOCABULARY = ("embed_tokens.", "lm_head.")
GATE_AND_UP = {"gate_proj", "up_proj"}


def is_peft(folder: Path) -> bool:
    return (folder / CONFIG).exists()


class PeftSource(TensorSource):
    """The adapters of a PEFT folder, next to the model that they are for.

    Args:
        base: the config of the model.
        base_folder: of the model, for errors.

    Raises:
        UserError: a file is missing or damaged; the adapter is of another kind, or does not fit the model.
    """

    format = PEFT
    folder: Path

    def __init__(self, folder: str | Path, base: ModelConfig, base_folder: Path | None = None) -> None:
        self.folder, self._base_folder = Path(folder), base_folder
        self.location = str(folder)
        self.companions = Companions(files=[path for path in companion_files(folder) if path.name != CONFIG])
        self._file = open_weights(self.folder)
        self.config = dataclasses.replace(base, lora=read_lora(self.folder))
        self.notices = tuple(notices_of(self.folder))
        check_parameters(self.config, self.folder)
        self._stored = stored_in(self.config)
        self._check()

    def kinds(self) -> tuple[TensorKind, ...]:
        return ("model",)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return self._file.entries[self._stored[name].names[0]].dtype

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return self._stored[name].read(self._file)

    def read_part(self, name: str, part: Part, kind: TensorKind = "model") -> np.ndarray:
        return cut(self.read(name), part)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        yield self.read_part(name, part)

    def _check(self) -> None:
        table = {name: spec for name, spec in tensor_table(self.config).items() if spec.adapter}
        shapes = {
            n: self._stored[name].shape(spec.shape) for name, spec in table.items() for n in self._stored[name].names
        }
        if others := [name for name in self._file.entries if any(part in name for part in OF_VOCABULARY)]:
            raise UserError(
                f"{self._file.path}: not supported: weights or adapters of the embeddings or the head: "
                f"{in_a_line(others)}: {MERGE}"
            )
        try:
            check_names(f"{self._file.path}, compared with {CONFIG}", set(self._file.entries), set(shapes))
            for name, shape in shapes.items():
                check_shape(str(self._file.path), name, self._file.entries[name].shape, shape)
        except UserError as error:
            if self._base_folder is None or is_for(self.folder, self._base_folder):
                raise
            model = read_config(self.folder)[BASE]
            raise UserError(
                f"{error}. The adapters name {model} as their model, and the weights are {self._base_folder}: give "
                f"theirs with --load"
            ) from error


def open_weights(folder: Path) -> WeightFile:
    """The file of a folder's tensors."""
    if (folder / WEIGHTS).exists():
        return SafetensorsFile(folder / WEIGHTS)
    if (folder / TORCH_WEIGHTS).exists():
        return TorchWeightFile(folder / TORCH_WEIGHTS)
    raise UserError(f"{folder} has an {CONFIG}, but neither {WEIGHTS} nor {TORCH_WEIGHTS}")


def notices_of(folder: Path) -> Iterator[str]:
    """What a user should know of how a folder is read. Of two files of tensors `peft` reads the same one."""
    yield from unknown_fields(folder)
    if (folder / WEIGHTS).exists() and (folder / TORCH_WEIGHTS).exists():
        yield f"{folder}: {WEIGHTS} is read; {TORCH_WEIGHTS} is there, too, and is left out"


def check_parameters(config: ModelConfig, folder: Path) -> None:
    """Raise UserError when a name of `target_parameters` is no parameter that can have an adapter."""
    lora = config.lora
    assert lora is not None
    reached = {adapter.path for layer in range(config.num_layers) for adapter in adapters(config, layer)}
    for name in lora.target_parameters:
        if not any(f".{path}".endswith(f".{name}") for path in reached):
            raise UserError(
                f"{folder / CONFIG}: target_parameters {name!r} is not supported: expected some of "
                f"mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight, in a model with experts"
            )


def write_peft(folder: str | Path, source: TensorSource, base_model: str, companions: Companions | None = None) -> int:
    """Write the adapters of a source as a PEFT folder, which appears whole or not at all. Returns how many tensors.

    An adapter of a whole Megatron weight becomes one for each of its Hugging Face modules, with the same A.

    Args:
        base_model: the path or name of the model, for the config.
        companions: the tokenizer's files; default: those of the source.

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
        write_files(work, companions or source.companions, leave_out=(GENERATION_CONFIG, CONFIG))
    return len(tensors)


def unlike_over_transformers_5(config: ModelConfig) -> str | None:
    """Why `peft` over transformers 5 does not open the folder of these adapters as they are; None where it does.

    It makes adapters of parameters of those of experts' modules. Source: PEFT 0.21, `_convert_peft_config_moe` in
    `utils/transformers_weight_conversion.py`.
    """
    lora = config.lora
    assert lora is not None
    of_layers = [adapters(config, layer) for layer in range(config.num_layers)]
    modules = [adapter for of_layer in of_layers for adapter in of_layer if not adapter.is_parameter]
    of_experts = [adapter for adapter in modules if adapter.experts]
    names = {path.rpartition(".")[2] for adapter in of_experts for path, _ in adapter.modules(0, config)}
    if not names:
        return None
    if len(names & GATE_AND_UP) == 1:
        return "of gate_proj and up_proj it opens both, or none"
    if names == GATE_AND_UP:
        return "it does not find those of gate_proj and up_proj without those of down_proj"
    if lora.use_rslora and names & GATE_AND_UP:
        return "with use_rslora it multiplies those of gate_proj and up_proj by sqrt(2) more"
    if any((adapter.rank, adapter.alpha) != (lora.r, lora.lora_alpha) for adapter in of_experts):
        return f"it takes the adapters of all experts as of rank {lora.r} and alpha {lora.lora_alpha:g}"
    if any(f"{adapter.linear}.weight" in DENSE_MLP for adapter in modules):
        return "it leaves out those of layers without experts"
    return None


def _tensors(source: TensorSource) -> Iterator[tuple[str, np.ndarray]]:
    table = tensor_table(source.config)
    for layer in range(source.config.num_layers):
        of_layer = adapters(source.config, layer)
        for adapter in of_layer:
            lengths = source.read(adapter.magnitude) if adapter.magnitude in table else None
            factors = source.read(adapter.a), source.read(adapter.b)
            yield from to_store(adapter, of_layer, *factors, lengths, source.config)


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
            of_adapter = [path for path, _ in adapter.modules(table[adapter.b].shape[0] // adapter.matrices, config)]
            modules.update([] if adapter.is_parameter else of_adapter)
            for key in [adapter.path] if adapter.is_parameter else dict.fromkeys(map(any_expert, of_adapter)):
                ranks |= {key: adapter.rank} if adapter.rank != lora.r else {}
                alphas |= {key: adapter.alpha} if adapter.alpha != lora.lora_alpha else {}
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
        "target_modules": _shortest(modules, config),
        "target_parameters": list(lora.target_parameters) or None,
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


def _shortest(paths: set[str], config: ModelConfig) -> list[str]:
    """Modules by their last names, where all of the model with that name are among them; otherwise by their paths."""
    there = (name for layer in range(config.num_layers) for row in config.layer_rows(layer) for name in row.hf)
    counts = Counter(name.removesuffix(".weight").rpartition(".")[2] for name in there)
    chosen = Counter(path.rpartition(".")[2] for path in paths)
    return sorted({name if counts[name := path.rpartition(".")[2]] == chosen[name] else path for path in paths})
