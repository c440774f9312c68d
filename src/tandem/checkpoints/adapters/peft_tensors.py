"""How PEFT's files hold the tensors of adapters: their names, and how those of experts lie in them.

With transformers 4 each expert has modules of its own, so files hold a pair of factors for each. With transformers 5
the experts of a layer are one parameter, [experts, outputs, inputs], and files hold one pair for all of them:

- A, [experts r, inputs]: expert after expert;
- B, [outputs, r experts]: of each output and rank, a number for each expert.

PEFT wraps the parameters of a module one around the other. The first, `gate_up_proj`, is then inside of the second.

Source: PEFT 0.21, `tuners/lora/layer.py` (`ParamWrapper.get_delta_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tandem.models.adapters import Adapter, adapters
from tandem.models.config import ModelConfig
from tandem.models.lora import Lora

PREFIX = "base_model.model."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
WRAPPED = ".base_layer"


class File(Protocol):
    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Stored:
    """A tensor of the table in a file.

    Attributes:
        names: of the file's tensors that it is made of, one below the other.
        innermost: how many experts there are, where the file's tensor has their numbers side by side; 0 otherwise.
    """

    names: tuple[str, ...]
    innermost: int = 0

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of each of the file's tensors, when the table's has `shape`."""
        if self.innermost:
            return shape[0] // self.innermost, shape[1] * self.innermost
        return shape[0] // len(self.names), *shape[1:]

    def read(self, file: File) -> np.ndarray:
        values = [file.read(name) for name in self.names]
        if not self.innermost:
            return values[0] if len(values) == 1 else np.concatenate(values)
        outputs = len(values[0])
        by_expert = values[0].reshape(outputs, -1, self.innermost).transpose(2, 0, 1)
        return np.ascontiguousarray(by_expert).reshape(self.innermost * outputs, -1)


def stored_in(config: ModelConfig) -> dict[str, Stored]:
    """How a file holds each tensor of adapters of Hugging Face's modules and parameters, by global name."""
    found = {}
    for layer in range(config.num_layers):
        of_layer = adapters(config, layer)
        for adapter in of_layer:
            paths = _paths(adapter, of_layer)
            found[adapter.a] = Stored(tuple(f"{PREFIX}{path}.{A}" for path in paths))
            innermost = adapter.experts if adapter.is_parameter else 0
            found[adapter.b] = Stored(tuple(f"{PREFIX}{path}.{B}" for path in paths), innermost)
            found[adapter.magnitude] = Stored(tuple(f"{PREFIX}{path}.{MAGNITUDE}" for path in paths))
    return found


def _paths(adapter: Adapter, of_layer: Sequence[Adapter]) -> list[str]:
    """The paths in a file of an adapter's modules, or of the module of its parameter."""
    if not adapter.is_parameter:
        return [adapter.path.format(expert) for expert in range(adapter.matrices)]
    module = adapter.path.rpartition(".")[0]
    wrapped = [other.path for other in of_layer if other.is_parameter and other.path.rpartition(".")[0] == module]
    return [module + WRAPPED * (len(wrapped) - 1 - wrapped.index(adapter.path))]


def any_expert(path: str) -> str:
    r"""A regular expression for the modules at a path, of whichever expert.

    >>> any_expert("layers.0.mlp.experts.3.up_proj")
    'layers.0.mlp.experts.\\d+.up_proj'
    """
    return re.sub(r"\.experts\.\d+\.", r".experts.\\d+.", path)


def parameter_at(path: str, names: Container[str], lora: Lora) -> str | None:
    """The path of the parameter whose adapter a file holds under `path`; None for that of a module.

    Args:
        names: of the file's tensors.
    """
    module = path.removesuffix(WRAPPED)
    if module.endswith(".mlp.gate"):
        return f"{module}.weight" if lora.includes_parameter(f"{module}.weight") else None
    if not module.endswith(".mlp.experts"):
        return None
    targets = [name for name in ("gate_up_proj", "down_proj") if lora.includes_parameter(f"{module}.{name}")]
    is_inner = path != module or f"{PREFIX}{module}{WRAPPED}.{A}" not in names
    return f"{module}.{targets[0 if is_inner else -1]}" if targets else None


def to_store(
    adapter: Adapter,
    of_layer: Sequence[Adapter],
    a: np.ndarray,
    b: np.ndarray,
    magnitude: np.ndarray | None,
    config: ModelConfig,
) -> Iterator[tuple[str, np.ndarray]]:
    """A file's tensors of an adapter.

    An adapter of a whole Megatron weight becomes one for each of its Hugging Face modules, with the same A.
    """
    matrices = adapter.matrices
    if adapter.is_parameter:
        (path,) = _paths(adapter, of_layer)
        yield f"{PREFIX}{path}.{A}", a
        side_by_side = b.reshape(matrices, -1, adapter.rank).transpose(1, 2, 0)
        yield f"{PREFIX}{path}.{B}", np.ascontiguousarray(side_by_side).reshape(len(b) // matrices, -1)
        return
    modules = adapter.modules(len(b) // matrices, config)
    of_expert = len(modules) // matrices
    for number, (path, ranges) in enumerate(modules):
        first = number // of_expert * adapter.rank
        yield f"{PREFIX}{path}.{A}", a[first : first + adapter.rank]
        yield f"{PREFIX}{path}.{B}", np.concatenate([b[start:stop] for start, stop in ranges])
        if magnitude is not None:
            yield f"{PREFIX}{path}.{MAGNITUDE}", np.concatenate([magnitude[start:stop] for start, stop in ranges])
