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
    # Qwen2.5: a bias on queries, keys and values; Hugging Face's config has no head_dim of its own
    "qwen2": toy_config(model_type="qwen2", kv_channels=8),
    "llama": toy_config(model_type="llama", rotary_base=1e4, untie_embeddings_and_output_weights=True),
}

# Qwen3's dense sizes: layers, hidden, ffn, query heads, tied.
QWEN3_SIZES = {
    "0.6B": (28, 1024, 3072, 16, True),
    "1.7B": (28, 2048, 6144, 16, True),
    "4B": (36, 2560, 9728, 32, True),
    "8B": (36, 4096, 12288, 32, False),
    "14B": (40, 5120, 17408, 40, False),
    "32B": (64, 5120, 25600, 64, False),
}


def qwen3_config(size: str, *, num_layers: int | None = None, vocab_size: int = 151936, shrink: int = 1) -> ModelConfig:
    """A published size; `shrink` divides its widths and keeps its heads."""
    layers, hidden, ffn, heads, tied = QWEN3_SIZES[size]
    return toy_config(
        num_layers=num_layers or layers,
        hidden_size=hidden // shrink,
        ffn_hidden_size=ffn // shrink,
        num_attention_heads=heads,
        num_query_groups=8,
        kv_channels=128 // shrink,
        vocab_size=vocab_size,
        max_position_embeddings=40960,
        untie_embeddings_and_output_weights=not tied,
        init_method_std=0.02,
    )
