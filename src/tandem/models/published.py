"""The published shapes of Qwen3's models."""

from __future__ import annotations

from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts

# layers, hidden size, width of the MLP, query heads, embeddings tied (config.json of Qwen/Qwen3-SIZE)
QWEN3_SIZES = {
    "0.6B": (28, 1024, 3072, 16, True),
    "1.7B": (28, 2048, 6144, 16, True),
    "4B": (36, 2560, 9728, 32, True),
    "8B": (36, 4096, 12288, 32, False),
    "14B": (40, 5120, 17408, 40, False),
    "32B": (64, 5120, 25600, 64, False),
}
# The same of Qwen/Qwen3-SIZE and Qwen3-Coder-480B-A35B-Instruct, then: key/value heads, experts, width of an expert,
# base of the rotary frequencies, longest sequence. Each token goes through 8 experts.
QWEN3_MOE_SIZES = {
    "30B-A3B": ((48, 2048, 6144, 32, False), (4, 128, 768, 1e6, 40960)),
    "235B-A22B": ((94, 4096, 12288, 64, False), (4, 128, 1536, 1e6, 40960)),
    "Coder-480B-A35B": ((62, 6144, 8192, 96, False), (8, 160, 2560, 1e7, 262144)),
}


def qwen3_config(size: str) -> ModelConfig:
    """The shape of a published size.

    >>> qwen3_config("0.6B").hidden_size
    1024

    Raises:
        UserError: there is no such size.
    """
    sizes = {name.lower(): name for name in (*QWEN3_SIZES, *QWEN3_MOE_SIZES)}
    if size.lower() not in sizes:
        raise UserError(f"Qwen3 has no size {size!r}: expected one of {', '.join(sizes.values())}")
    size = sizes[size.lower()]
    dense = QWEN3_SIZES.get(size)
    (layers, hidden, ffn, heads, tied), mixture = (dense, None) if dense else QWEN3_MOE_SIZES[size]
    groups, experts, width, rotary_base, longest = mixture or (8, 0, 0, 1e6, 40960)
    return ModelConfig(
        model_type="qwen3_moe" if mixture else "qwen3",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=128,
        vocab_size=151936,
        max_position_embeddings=longest,
        norm_epsilon=1e-6,
        rotary_base=rotary_base,
        untie_embeddings_and_output_weights=not tied,
        experts=Experts(num_experts=experts, moe_router_topk=8, moe_ffn_hidden_size=width, norm_topk_prob=True)
        if mixture
        else None,
    )
