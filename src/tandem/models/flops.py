"""Floating-point operations of a training step, counted as Megatron counts them: matrix products only."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.models.config import ModelConfig


def training_flops(config: ModelConfig, document_lengths: Iterable[int]) -> float:
    """FLOPs of one forward and backward pass over documents that attend causally, each within itself.

    A product of [m, k] by [k, n] costs 2mkn. Backward costs twice forward. A causal document of length s attends to
    s^2 / 2 pairs. Recomputation is not counted. With one document per sample this is Megatron-LM's formula
    (`num_floating_point_operations`) for grouped-query attention with SwiGLU and attention ratio 0.5.

    >>> from tandem.models.published import qwen3_config
    >>> f"{training_flops(qwen3_config('0.6B'), [4096]):.3e}"
    '2.042e+13'
    """
    lengths = list(document_lengths)
    tokens = sum(lengths)
    pairs = sum(length * length for length in lengths) / 2
    hidden, head = config.hidden_size, config.kv_channels
    projections = 2 * hidden * head * (config.num_attention_heads + config.num_query_groups)
    mlps = config.dense_layers * 3 * hidden * config.ffn_hidden_size
    if experts := config.experts:  # a token goes through the router and its own experts
        mixture = 3 * hidden * experts.moe_ffn_hidden_size * experts.moe_router_topk + hidden * experts.num_experts
        mlps += (config.num_layers - config.dense_layers) * mixture
    weights = config.num_layers * projections + mlps + hidden * config.vocab_size
    attention = config.num_layers * 2 * head * config.num_attention_heads
    return 6.0 * (weights * tokens + attention * pairs)
