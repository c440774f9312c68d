"""Hyper-parameters of a decoder, from and to Hugging Face's `config.json`.

Field names are Megatron's. What this toolkit cannot compute (sliding windows, biases, other rotary scaling) is refused
here. So no model is ever trained as something else.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tandem.errors import UserError
from tandem.models.experts import Experts
from tandem.models.families import FAMILIES, Family, sparse_layer
from tandem.models.lora import Lora
from tandem.models.rows import Row

# Fields of a config that change no tensor, and no logit of a text that is short enough. A trainer sets the first to the
# length that it trains on.
DESCRIPTIVE = {"max_position_embeddings", "init_method_std"}
WHOLE_NUMBERS = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "max_position_embeddings"),
)

SCALING_NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
)


def yarn_amplitude(factor: float, mscale: float = 1.0) -> float:
    """By what YaRN lengthens queries and keys for texts `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class RotaryScaling:
    """How a model's rotary frequencies are stretched for longer texts. The names are Hugging Face's.

    `kind` is "linear" (plain position interpolation), "llama3" (Llama 3.1's stretching of low frequencies), or "yarn"
    (arXiv 2309.00071). SCALING_FIELDS of `hf_config` names the fields that count for each.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if type(self.truncate) is not bool:
            raise UserError(f"truncate {self.truncate!r} of the rotary scaling: expected true or false")
        for name in SCALING_NUMBERS:
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise UserError(f"{name} {value!r} of the rotary scaling: expected a number above 0")

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by, at every length."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_amplitude(self.factor, self.mscale) / yarn_amplitude(self.factor, self.mscale_all_dim)
        return yarn_amplitude(self.factor)

    def longest(self, max_position_embeddings: int) -> int:
        """How long a text may be for a model whose config states `max_position_embeddings`.

        With YaRN it may be as long as `factor` times what the model was trained on. Qwen advises to leave the stated
        number as it is.
        """
        if self.kind != "yarn":
            return max_position_embeddings
        return max(max_position_embeddings, round(self.factor * self.original_max_position_embeddings))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes a decoder's tensors and its forward pass. With `lora`, only its adapters are trained.

    `experts` are those of a mixture, None in other models; `ffn_hidden_size` is then that of layers without experts.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    rotary_scaling: RotaryScaling | None = None
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02
    lora: Lora | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.model_type not in list(FAMILIES):  # a damaged file may hold what cannot be hashed
            raise UserError(f"model_type {self.model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
        for name in WHOLE_NUMBERS:
            if type(value := getattr(self, name)) is not int or value < 1:
                raise UserError(f"{name} {value!r}: expected a whole number, at least 1")
        if type(self.num_layers) is not int or self.num_layers < 0:  # a plan asks for the parts outside the layers
            raise UserError(f"num_layers {self.num_layers!r}: expected a whole number, at least 0")
        for name in ("norm_epsilon", "rotary_base", "init_method_std"):
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value < math.inf:
                raise UserError(f"{name} {value!r}: expected a number, at least 0")
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )
        if self.family.has_experts != (self.experts is not None):
            given = "experts, and none are given" if self.family.has_experts else "no experts, and some are given"
            raise UserError(f"model_type {self.model_type} has {given}")
        if self.kv_channels % 2:
            raise UserError(f"kv_channels (head_dim) {self.kv_channels} must be even: rotary embeddings pair channels")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def experts_in(self, layer: int) -> Experts | None:
        """The experts of a decoder layer; None for a layer with an MLP."""
        return self.experts if self.experts is not None and self.experts.are_in(layer) else None

    def layer_rows(self, layer: int) -> tuple[Row, ...]:
        """The tensors of a decoder layer, and Hugging Face's that they are made of."""
        experts = self.experts_in(layer)
        return self.family.layer if experts is None else sparse_layer(self.family.layer, experts.num_experts)

    @property
    def dense_layers(self) -> int:
        """How many decoder layers have an MLP."""
        return sum(self.experts_in(layer) is None for layer in range(self.num_layers))

    @property
    def qk_layernorm(self) -> bool:
        return self.family.qk_layernorm

    @property
    def add_qkv_bias(self) -> bool:
        return self.family.add_qkv_bias

    @property
    def tied(self) -> bool:
        """The output head is the embedding."""
        return not self.untie_embeddings_and_output_weights

    @property
    def without_adapters(self) -> ModelConfig:
        return dataclasses.replace(self, lora=None)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None or name not in ("lora", "experts")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises TypeError when fields are missing or unknown."""
        scaling, lora, experts = (values.get(name) for name in ("rotary_scaling", "lora", "experts"))
        parts = {
            "rotary_scaling": RotaryScaling(**scaling) if scaling else None,
            "lora": Lora.from_dict(lora) if lora else None,
            "experts": Experts.from_dict(experts) if experts else None,
        }
        return cls(**{**values, **parts})
