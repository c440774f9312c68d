"""Toy models: random weights, every feature, sizes that run in milliseconds."""

from __future__ import annotations

import dataclasses

from tandem.models import published as qwen3
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts


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


def moe_config(changes: dict[str, object] | None = None, **experts: object) -> ModelConfig:
    """A Qwen3 with 8 experts in each layer, of which a token takes 2."""
    values: dict[str, object] = {
        "num_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "norm_topk_prob": True,
        **experts,
    }
    mixture = Experts(**values)  # type: ignore[arg-type]
    return toy_config(model_type="qwen3_moe", experts=mixture, **(changes or {}))


TOYS = {
    "qwen3-tied": toy_config(),
    "qwen3-untied": toy_config(untie_embeddings_and_output_weights=True),
    # Qwen2.5: a bias on queries, keys and values; Hugging Face's config has no head_dim of its own
    "qwen2": toy_config(model_type="qwen2", kv_channels=8),
    # a layer with an MLP, and two with experts
    "qwen3-moe": moe_config(mlp_only_layers=(0,)),
    "llama": toy_config(model_type="llama", rotary_base=1e4, untie_embeddings_and_output_weights=True),
}

DENSE_TOYS = {name: config for name, config in TOYS.items() if config.experts is None}


def qwen3_config(size: str, *, num_layers: int | None = None, vocab_size: int = 151936, shrink: int = 1) -> ModelConfig:
    """A published dense size; `shrink` divides its widths and keeps its heads."""
    published = qwen3.qwen3_config(size)
    return dataclasses.replace(
        published,
        num_layers=num_layers or published.num_layers,
        hidden_size=published.hidden_size // shrink,
        ffn_hidden_size=published.ffn_hidden_size // shrink,
        kv_channels=published.kv_channels // shrink,
        vocab_size=vocab_size,
    )
