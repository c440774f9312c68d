"""Toy models: random weights, every feature, sizes that run in milliseconds."""

from __future__ import annotations

from tandem.models.config import ModelConfig


def toy_config(**changes: object) -> ModelConfig:
    """A Qwen3 whose head_dim is not hidden / heads, with grouped queries and a vocabulary that is no round number."""
    values: dict[str, object] = {
        "model_type": "qwen3",
        "num_layers": 3,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 16,
        "vocab_size": 211,
        "max_position_embeddings": 512,
        "norm_epsilon": 1e-6,
        "rotary_base": 1e6,
        "untie_embeddings_and_output_weights": False,
        "init_method_std": 0.1,
        **changes,
    }
    return ModelConfig(**values)  # type: ignore[arg-type]


TOYS = {
    "qwen3-tied": toy_config(),
    "qwen3-untied": toy_config(untie_embeddings_and_output_weights=True),
    "llama": toy_config(model_type="llama", rotary_base=1e4, untie_embeddings_and_output_weights=True),
}
