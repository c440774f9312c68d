"""What adapters there are: modules, ranks, scales, and whether training has changed them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tandem.checkpoints.adapters.peft import open_weights
from tandem.checkpoints.adapters.peft_config import read_lora
from tandem.checkpoints.adapters.peft_tensors import PREFIX, A, B, any_expert, parameter_at
from tandem.checkpoints.interface import TensorSource
from tandem.errors import UserError
from tandem.models.adapters import adapters
from tandem.models.lora import Lora


@dataclass(frozen=True)
class AdapterSummary:
    """The adapters of one kind of module.

    Attributes:
        module: the last name of the modules' paths.
        layers: how many there are.
        ranks, alphas: the different values.
        unchanged: how many have a B of zeros, so that they change nothing.
    """

    module: str
    layers: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    unchanged: int


def summaries_of(source: TensorSource) -> list[AdapterSummary]:
    """The adapters of a source, by kind of module, in the order of the first layer that has them."""
    rows = [
        (_last(adapter.path), adapter.rank, adapter.alpha, not source.read(adapter.b).any())
        for layer in range(source.config.num_layers)
        for adapter in adapters(source.config, layer)
    ]
    return _summaries(rows)


def summaries_of_folder(folder: Path) -> tuple[Lora, list[AdapterSummary]]:
    """The settings and the adapters of a PEFT folder, whose model need not be there.

    Raises:
        UserError: a file is missing or damaged, or a B has no A.
    """
    lora, file = read_lora(folder), open_weights(folder)
    rows: dict[str, tuple[str, int, float, bool]] = {}
    for name in sorted(file.entries):
        if not name.endswith(f".{B}"):
            continue
        path = name.removeprefix(PREFIX).removesuffix(f".{B}")
        if f"{PREFIX}{path}.{A}" not in file.entries:
            raise UserError(f"{file.path}: {name} has no {A} next to it")
        unchanged = not file.read(name).any()
        if parameter := parameter_at(path, file.entries, lora):
            rows[path] = (_last(parameter), lora.rank_of(parameter), lora.alpha_of(parameter), unchanged)
        else:
            rank, of_experts = file.entries[f"{PREFIX}{path}.{A}"].shape[0], any_expert(path)
            before = rows[of_experts][3] if of_experts in rows else True
            rows[of_experts] = (_last(path), rank, lora.alpha_of(path), unchanged and before)
    return lora, _summaries(rows.values())


def _last(path: str) -> str:
    return path.removesuffix(".weight").rpartition(".")[2]


def _summaries(rows: Iterable[tuple[str, int, float, bool]]) -> list[AdapterSummary]:
    by_module: dict[str, list[tuple[int, float, bool]]] = defaultdict(list)
    for module, rank, alpha, unchanged in rows:
        by_module[module].append((rank, alpha, unchanged))
    return [
        AdapterSummary(
            module,
            len(values),
            tuple(sorted({rank for rank, _, _ in values})),
            tuple(sorted({alpha for _, alpha, _ in values})),
            sum(unchanged for _, _, unchanged in values),
        )
        for module, values in by_module.items()
    ]
