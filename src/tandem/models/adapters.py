"""The adapters of a model: where they are, what their tensors are called, and which rows of a weight they add to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.families import LINEARS
from tandem.models.lora import ALL_LINEAR
from tandem.models.rows import Ranges, Row

# The adapter of a whole Megatron weight, named as by MindSpeed-LLM. Others are named as their Hugging Face module.
WHOLE = "default"


@dataclass(frozen=True)
class Adapter:
    """Factors that are added to some rows of a weight.

    Attributes:
        linear: the Megatron path of the weight's module inside its layer, such as `self_attention.linear_qkv`.
        layer: its decoder layer.
        module: the last name of its Hugging Face module, such as `q_proj`; `WHOLE` for all of the weight's rows.
        path: the whole path of that module, under Hugging Face's name; for `WHOLE`, under Megatron's.
        row: which rows of the weight it adds to.
        part: its number among the modules of `row`; None for `WHOLE`.
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

    @cached_property
    def prefix(self) -> str:
        return f"decoder.layers.{self.layer}.{self.linear}."

    @property
    def weight(self) -> str:
        """The global name of the weight that it is added to."""
        return f"{self.prefix}weight"

    @property
    def a(self) -> str:
        """The global name of A, [r, inputs]."""
        return f"{self.prefix}lora_A.{self.module}.weight"

    @property
    def b(self) -> str:
        """The global name of B, [outputs, r]."""
        return f"{self.prefix}lora_B.{self.module}.weight"

    @property
    def magnitude(self) -> str:
        """The global name of the rows' lengths, [outputs], which only DoRA has."""
        return f"{self.prefix}lora_magnitude_vector.{self.module}.weight"

    def ranges(self, rows: int, config: ModelConfig) -> Ranges:
        """Which of `rows` rows of the weight it adds to. With the sizes of a tensor rank's slice, which of the slice's.

        >>> from tandem.models.published import qwen3_config
        >>> from tandem.models.lora import Lora
        >>> from dataclasses import replace
        >>> config = replace(qwen3_config("0.6B"), lora=Lora(target_modules=("up_proj",)))
        >>> adapters(config, 0)[0].ranges(6144, config)
        ((3072, 6144),)
        """
        return ((0, rows),) if self.part is None else self.row.ranges(rows, config)[self.part]


def adapters(config: ModelConfig, layer: int) -> list[Adapter]:
    """The adapters of a decoder layer, in the order of the weights' table.

    Raises:
        UserError: a weight would get two adapters for the same rows.
    """
    lora = config.lora
    if lora is None:
        return []
    found = []
    for row in (row for row in config.layer_rows(layer) if row.mcore in LINEARS):
        linear = row.mcore.removesuffix(".weight")
        paths = {f"model.layers.{layer}.{name.removesuffix('.weight')}": part for part, name in enumerate(row.hf)}
        whole = f"decoder.layers.{layer}.{linear}"
        is_whole = lora.target_modules != ALL_LINEAR and lora.includes(whole, layer)
        chosen: dict[str, int | None] = {path: part for path, part in paths.items() if lora.includes(path, layer)}
        if is_whole and chosen:
            raise UserError(
                f"lora_target_modules names {linear.rpartition('.')[2]} and "
                f"{', '.join(path.rpartition('.')[2] for path in chosen)}, which are rows of it: give one or the other"
            )
        for path, part in (chosen or ({whole: None} if is_whole else {})).items():
            module = WHOLE if part is None else path.rpartition(".")[2]
            rank, alpha, scale = lora.rank_of(path), lora.alpha_of(path), lora.scale_of(path)
            found.append(Adapter(linear, layer, module, path, rank, alpha, scale, row, part))
    return found


def module_names(config: ModelConfig, weight: str) -> list[str]:
    """What `target_modules` may call the modules of a weight: Hugging Face's names, then Megatron's.

    >>> from tandem.models.published import qwen3_config
    >>> module_names(qwen3_config("0.6B"), "mlp.linear_fc1.weight")
    ['gate_proj', 'up_proj', 'linear_fc1']
    """
    (row,) = (row for row in config.family.layer if row.mcore == weight)
    return [name.removesuffix(".weight").rpartition(".")[2] for name in (*row.hf, row.mcore)]
