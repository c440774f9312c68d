"""The published shapes of Qwen3's dense models."""

from __future__ import annotations

from tandem.errors import UserError, nearest
from tandem.models.config import ModelConfig

# layers, hidden size, width of the MLP, query heads, embeddings tied (config.json of Qwen/Qwen3-SIZE)
QWEN3_SIZES = {
    "0.6B": (28, 1024, 3072, 16, True),
    "1.7B": (28, 2048, 6144, 16, True),
    "4B": (36, 2560, 9728, 32, True),
    "8B": (36, 4096, 12288, 32, False),
    "14B": (40, 5120, 17408, 40, False),
    "32B": (64, 5120, 25600, 64, False),
}


def qwen3_config(size: str) -> ModelConfig:
    """The shape of a published size.

    >>> qwen3_config("0.6B").hidden_size
    1024

    Raises:
        UserError: there is no such size.
    """
    if size not in QWEN3_SIZES:
        raise UserError(f"Qwen3 has no dense size {size!r}{nearest(size, list(QWEN3_SIZES))}")
    layers, hidden, ffn, heads, tied = QWEN3_SIZES[size]
    return ModelConfig(
        model_type="qwen3",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        norm_epsilon=1e-6,
        rotary_base=1e6,
        untie_embeddings_and_output_weights=not tied,
    )
