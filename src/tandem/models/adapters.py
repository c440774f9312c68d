"""The adapters of a model: where they are, what their tensors are called, and which rows of a weight they add to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.families import ADAPTABLE, LINEARS, ROUTER
from tandem.models.lora import Lora
from tandem.models.rows import PerExpert, Ranges, Row

# The adapter of a whole Megatron weight, named as by MindSpeed-LLM. Others are named as their Hugging Face module.
WHOLE = "default"


@dataclass(frozen=True)
class Adapter:
    """Factors that are added to some rows of a weight.

    A weight of experts has their matrices one below the other. Its adapter has a pair of factors for each expert, also
    one below the other. All are of one rank and scale, and add to the same rows of their matrix.

    Attributes:
        linear: the Megatron path of the weight's module inside its layer, such as `self_attention.linear_qkv`.
        layer: its decoder layer.
        module: the last name of its Hugging Face module or parameter, such as `q_proj`; `WHOLE` for all of the weight's
            rows.
        path: the whole path of that module, under Hugging Face's name, with {} for an expert's number; for `WHOLE`,
            under Megatron's.
        row: which rows of the weight it adds to. For experts, of the matrix of one of them.
        part: its number among the modules of `row`; None for all rows.
        experts: how many pairs of factors there are; 0 for a weight that is one matrix.
        is_parameter: `path` is that of a parameter, as of transformers 5.
    """

    linear: str
    layer: int
    module: str
    path: str
    rank: int
    alpha: float
    scale: float
    row: Row
    part: int | None
    experts: int = 0
    is_parameter: bool = False

    @cached_property
    def prefix(self) -> str:
        return f"decoder.layers.{self.layer}.{self.linear}."

    @property
    def weight(self) -> str:
        """The global name of the weight that it is added to."""
        return f"{self.prefix}weight"

    @property
    def a(self) -> str:
        """The global name of A, [r, inputs]; of experts, [experts r, inputs]."""
        return f"{self.prefix}lora_A.{self.module}.weight"

    @property
    def b(self) -> str:
        """The global name of B, [outputs, r]; of experts, [experts outputs, r]."""
        return f"{self.prefix}lora_B.{self.module}.weight"

    @property
    def magnitude(self) -> str:
        """The global name of the rows' lengths, [outputs], which only DoRA has."""
        return f"{self.prefix}lora_magnitude_vector.{self.module}.weight"

    @property
    def matrices(self) -> int:
        """How many matrices its weight is made of."""
        return self.experts or 1

    def ranges(self, rows: int, config: ModelConfig) -> Ranges:
        """Which of `rows` rows of a matrix it adds to. With the sizes of a tensor rank's slice, which of the slice's.

        >>> from tandem.models.published import qwen3_config
        >>> from tandem.models.lora import Lora
        >>> from dataclasses import replace
        >>> config = replace(qwen3_config("0.6B"), lora=Lora(target_modules=("up_proj",)))
        >>> adapters(config, 0)[0].ranges(6144, config)
        ((3072, 6144),)
        """
        return ((0, rows),) if self.part is None else self.row.ranges(rows, config)[self.part]

    def modules(self, rows: int, config: ModelConfig) -> list[tuple[str, Ranges]]:
        """The Hugging Face modules that it is for, and which of the rows of its B belong to each.

        Args:
            rows: of B, for one matrix.
        """
        names = [f"model.layers.{self.layer}.{_module(name)}" for name in self.row.hf]
        parts = [((0, rows),)] if self.part is not None else self.row.ranges(rows, config)
        chosen = names if self.part is None else [names[self.part]]
        return [
            (path.format(expert), tuple((expert * rows + start, expert * rows + stop) for start, stop in ranges))
            for expert in range(self.matrices)
            for path, ranges in zip(chosen, parts, strict=True)
        ]


def adapters(config: ModelConfig, layer: int) -> list[Adapter]:
    """The adapters of a decoder layer, in the order of the weights' table.

    Raises:
        UserError: a weight would get two adapters for the same rows, or experts would get different ones.
    """
    return [] if config.lora is None else list(_adapters(config, config.lora, layer))


@lru_cache(maxsize=4096)  # of hundreds of experts, each is asked for its settings
def _adapters(config: ModelConfig, lora: Lora, layer: int) -> tuple[Adapter, ...]:
    found: list[Adapter] = []
    for row in (row for row in config.layer_rows(layer) if row.mcore in ADAPTABLE):
        of_row = [*_of_modules(lora, layer, row), *_of_weight(lora, layer, row), *_of_parameter(lora, layer, row)]
        if len(of_row) > 1 and any(adapter.part is None or adapter.is_parameter for adapter in of_row):
            names = ", ".join(dict.fromkeys(_last(adapter.path) for adapter in of_row))
            raise UserError(
                f"--lora-target-modules: {names}: the rows of one are rows of another: give one or the other"
            )
        if of_row and lora.use_dora and row.mcore not in LINEARS:
            raise UserError(
                f"--lora-use-dora is not supported on {_last(of_row[0].path)}, which is of experts or their router: "
                f"leave it out, or give other --lora-target-modules"
            )
        found += of_row
    return tuple(found)


def check_dropout(config: ModelConfig) -> None:
    """Raise UserError for adapters that would drop inputs of experts or routers, which is not supported."""
    if config.lora is None or not config.lora.lora_dropout:
        return
    found = (adapter for layer in range(config.num_layers) for adapter in adapters(config, layer))
    if adapter := next((adapter for adapter in found if f"{adapter.linear}.weight" not in LINEARS), None):
        raise UserError(
            f"--lora-dropout {config.lora.lora_dropout:g} is not supported on {_last(adapter.path)}, which is of "
            f"experts or their router: train with 0, or give other --lora-target-modules"
        )


def _of_modules(lora: Lora, layer: int, row: Row) -> Iterator[Adapter]:
    """Adapters of the Hugging Face modules that a weight is made of."""
    inner, experts = _matrix(row)
    for part, name in enumerate(inner.hf):
        path = f"model.layers.{layer}.{_module(name)}"
        paths = [path.format(expert) for expert in range(experts)] or [path]
        chosen = [path for path in paths if lora.includes(path, layer)]
        if not chosen:
            continue
        settings = {(lora.rank_of(path), lora.alpha_of(path), lora.scale_of(path)) for path in chosen}
        if len(chosen) < len(paths):
            raise UserError(
                f"lora: {len(chosen)} of {len(paths)} experts of layer {layer} would get adapters of {_last(path)}: "
                f"choose all experts of a layer, or none"
            )
        if len(settings) > 1:
            kinds = " and ".join(f"rank {rank}, alpha {alpha:g}" for rank, alpha, _ in sorted(settings)[:2])
            raise UserError(
                f"lora: experts of layer {layer} would get adapters of {_last(path)} of {kinds}: give all experts of "
                f"a layer the same"
            )
        yield Adapter(_linear(row), layer, _last(path), path, *settings.pop(), inner, part, experts)


def _of_weight(lora: Lora, layer: int, row: Row) -> Iterator[Adapter]:
    """The adapter of a whole weight under Megatron's name. A regular expression is PEFT's: of Hugging Face's paths."""
    path = f"decoder.layers.{layer}.{_linear(row)}"
    if not isinstance(lora.target_modules, str) and lora.includes(path, layer):
        yield _whole(lora, layer, row, WHOLE, path, is_parameter=False)


def _of_parameter(lora: Lora, layer: int, row: Row) -> Iterator[Adapter]:
    """The adapter of a whole weight that is a parameter in transformers 5."""
    name = row.parameter if isinstance(row, PerExpert) else row.hf[0] if row.mcore == ROUTER else None
    if name is not None and lora.includes_parameter(path := f"model.layers.{layer}.{name}"):
        yield _whole(lora, layer, row, _last(_module(path)), path, is_parameter=True)


def _whole(lora: Lora, layer: int, row: Row, module: str, path: str, *, is_parameter: bool) -> Adapter:
    inner, experts = _matrix(row)
    settings = lora.rank_of(path), lora.alpha_of(path), lora.scale_of(path)
    return Adapter(_linear(row), layer, module, path, *settings, inner, None, experts, is_parameter)


def _matrix(row: Row) -> tuple[Row, int]:
    """The rows of one matrix of a weight, and for how many experts there is one; 0 for a weight that is one matrix."""
    return (row.of, row.experts) if isinstance(row, PerExpert) else (row, 0)


def _linear(row: Row) -> str:
    return row.mcore.removesuffix(".weight")


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _last(path: str) -> str:
    return _module(path).rpartition(".")[2]


def module_names(config: ModelConfig) -> list[str]:
    """What `target_modules` may call a model's modules: Hugging Face's names, then Megatron's, weight by weight.

    >>> from tandem.models.published import qwen3_config
    >>> module_names(qwen3_config("0.6B"))[4:]
    ['o_proj', 'linear_proj', 'gate_proj', 'up_proj', 'linear_fc1', 'down_proj', 'linear_fc2']
    """
    rows = [row for layer in range(config.num_layers) for row in config.layer_rows(layer) if row.mcore in ADAPTABLE]
    names = (_last(name) for row in dict.fromkeys(rows) for name in (*_matrix(row)[0].hf, row.mcore))
    return list(dict.fromkeys(names))
