"""The families of models: what distinguishes them, and which tensors their layers have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tandem.models.rows import GateUp, GroupedQKV, PerExpert, Rename, Row

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

DENSE_MLP = ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
ROUTER = "mlp.router.weight"
EXPERTS_FC1, EXPERTS_FC2 = "mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc2.weight"


@cache
def sparse_layer(layer: tuple[Row, ...], experts: int) -> tuple[Row, ...]:
    """The tensors of a layer that has a router and experts in place of the MLP of `layer`."""
    return (
        *(row for row in layer if row.mcore not in DENSE_MLP),
        Rename(ROUTER, "mlp.gate.weight"),
        PerExpert(
            EXPERTS_FC1,
            GateUp("", gate="mlp.experts.{}.gate_proj.weight", up="mlp.experts.{}.up_proj.weight"),
            experts,
            "mlp.experts.gate_up_proj",
        ),
        PerExpert(EXPERTS_FC2, Rename("", "mlp.experts.{}.down_proj.weight"), experts, "mlp.experts.down_proj"),
    )


# The weights that are multiplied with a layer's activations.
LINEARS = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
ADAPTABLE = (*LINEARS, ROUTER, EXPERTS_FC1, EXPERTS_FC2)


@dataclass(frozen=True)
class Family:
    """What distinguishes one model family from another, beyond sizes."""

    model_type: str  # Hugging Face's `model_type`
    architecture: str  # Hugging Face's class name
    layer: tuple[Row, ...]  # the tensors of one decoder layer with an MLP
    qk_layernorm: bool = False  # queries and keys are normalised, head by head
    add_qkv_bias: bool = False  # queries, keys and values have a bias
    has_experts: bool = False  # some of its layers, or all, have experts in place of an MLP


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen3", "Qwen3ForCausalLM", QWEN3_LAYER, qk_layernorm=True),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", QWEN3_LAYER, qk_layernorm=True, has_experts=True),
        Family("qwen2", "Qwen2ForCausalLM", QWEN2_LAYER, add_qkv_bias=True),
        Family("llama", "LlamaForCausalLM", LLAMA_LAYER),
    )
}
