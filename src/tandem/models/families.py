"""The families of models: what distinguishes them, and which tensors their layers have."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.models.rows import GateUp, GroupedQKV, Rename, Row

LLAMA_LAYER: tuple[Row, ...] = (
    Rename("input_layernorm.weight", "input_layernorm.weight"),
    GroupedQKV(
        "self_attention.linear_qkv.weight",
        q="self_attn.q_proj.weight",
        k="self_attn.k_proj.weight",
        v="self_attn.v_proj.weight",
    ),
    Rename("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    Rename("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    GateUp("mlp.linear_fc1.weight", gate="mlp.gate_proj.weight", up="mlp.up_proj.weight"),
    Rename("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)

QWEN3_LAYER: tuple[Row, ...] = (
    *LLAMA_LAYER,
    Rename("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    Rename("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)

QWEN2_LAYER: tuple[Row, ...] = (
    *LLAMA_LAYER,
    GroupedQKV(
        "self_attention.linear_qkv.bias",
        q="self_attn.q_proj.bias",
        k="self_attn.k_proj.bias",
        v="self_attn.v_proj.bias",
    ),
)

# The weights that are multiplied with a layer's activations.
LINEARS = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


@dataclass(frozen=True)
class Family:
    """What distinguishes one model family from another, beyond sizes."""

    model_type: str  # Hugging Face's `model_type`
    architecture: str  # Hugging Face's class name
    layer: tuple[Row, ...]  # the tensors of one decoder layer
    qk_layernorm: bool = False  # queries and keys are normalised, head by head
    add_qkv_bias: bool = False  # queries, keys and values have a bias


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen3", "Qwen3ForCausalLM", QWEN3_LAYER, qk_layernorm=True),
        Family("qwen2", "Qwen2ForCausalLM", QWEN2_LAYER, add_qkv_bias=True),
        Family("llama", "LlamaForCausalLM", LLAMA_LAYER),
    )
}
