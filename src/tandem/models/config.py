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

WHOLE_NUMBERS = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "max_position_embeddings"),
)


@dataclass(frozen=True)
class RotaryScaling:
    """Llama 3.1's stretching of low rotary frequencies, or plain position interpolation.

    `kind` is "llama3" (all fields used) or "linear" (only `factor`).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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
