"""The table of a model's global tensors, under Megatron-core's names, and how each is split over tensor ranks.

Global means: layer numbers count over the whole model, and shapes are those of one process. `tandem.parallel.layout`
derives from this table what a rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tandem.models.adapters import Adapter, adapters
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts
from tandem.models.families import EXPERTS_FC1, EXPERTS_FC2, ROUTER

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Split:
    """How tensor parallelism cuts a tensor.

    With `dim` None, every rank holds the whole tensor. Otherwise dimension `dim` is made of `blocks` equal parts (2 for
    gate and up in `linear_fc1`). Each part is cut among the ranks, and a rank stacks its cuts.

    With `experts`, the tensor holds those of so many experts, one below the other. Expert ranks share the experts, and
    the ranks that share an expert cut its tensor so; with `dim` None, all of them hold it.
    """

    dim: int | None = None
    blocks: int = 1
    experts: int = 0

    def ranges(self, size: int, world: int, rank: int) -> list[tuple[int, int]]:
        """Half-open ranges of `dim` that `rank` of `world` holds, in order. The last rank may hold fewer.

        >>> GATE_UP.ranges(8, world=2, rank=0)
        [(0, 2), (4, 6)]
        """
        if self.dim is None:
            return [(0, size)]
        block = size // self.blocks
        step = -(-block // world)
        start, stop = min(rank * step, block), min((rank + 1) * step, block)
        return [(b * block + start, b * block + stop) for b in range(self.blocks)]


REPLICATED = Split()
COLUMN = Split(dim=0)
ROW = Split(dim=1)
GATE_UP = Split(dim=0, blocks=2)


# name inside the layer, shape, split
LayerTensor = tuple[str, tuple[int, ...], Split]


@dataclass(frozen=True)
class TensorSpec:
    """One global tensor.

    Attributes:
        layer: its decoder layer; None outside the decoder's stack.
        adapter: the adapter that it belongs to; None for a tensor of the model.
    """

    name: str
    shape: tuple[int, ...]
    split: Split
    layer: int | None = None
    adapter: Adapter | None = None

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


def layer_prefix(layer: int) -> str:
    return f"decoder.layers.{layer}."


def tensor_table(config: ModelConfig) -> dict[str, TensorSpec]:
    """All global tensors in the order in which they are stored: embedding, layers, final norm, output head."""
    hidden, ffn, vocab = config.hidden_size, config.ffn_hidden_size, config.vocab_size
    head = config.kv_channels
    heads, groups = config.num_attention_heads, config.num_query_groups
    layer_tensors: list[LayerTensor] = [
        ("input_layernorm.weight", (hidden,), REPLICATED),
        # per query group: its query heads, then its key, then its value
        ("self_attention.linear_qkv.weight", ((heads + 2 * groups) * head, hidden), COLUMN),
        ("self_attention.linear_proj.weight", (hidden, heads * head), ROW),
        ("pre_mlp_layernorm.weight", (hidden,), REPLICATED),
    ]
    mlp: list[LayerTensor] = [
        ("mlp.linear_fc1.weight", (2 * ffn, hidden), GATE_UP),
        ("mlp.linear_fc2.weight", (hidden, ffn), ROW),
    ]
    if config.add_qkv_bias:
        layer_tensors.insert(2, ("self_attention.linear_qkv.bias", ((heads + 2 * groups) * head,), COLUMN))
    if config.qk_layernorm:
        layer_tensors[2:2] = [
            ("self_attention.q_layernorm.weight", (head,), REPLICATED),
            ("self_attention.k_layernorm.weight", (head,), REPLICATED),
        ]
    specs = [TensorSpec(EMBEDDING, (vocab, hidden), COLUMN)]
    for layer in range(config.num_layers):
        experts = config.experts_in(layer)
        tensors = [*layer_tensors, *(mlp if experts is None else _mixture(hidden, experts))]
        specs += [TensorSpec(layer_prefix(layer) + name, shape, split, layer) for name, shape, split in tensors]
        by_name = {name: (shape, split) for name, shape, split in tensors}
        for adapter in adapters(config, layer):
            specs += adapter_tensors(config, adapter, *by_name[f"{adapter.linear}.weight"])
    specs.append(TensorSpec(FINAL_NORM, (hidden,), REPLICATED))
    if not config.tied:
        specs.append(TensorSpec(OUTPUT, (vocab, hidden), COLUMN))
    return {spec.name: spec for spec in specs}


def _mixture(hidden: int, experts: Experts) -> list[LayerTensor]:
    count, ffn = experts.num_experts, experts.moe_ffn_hidden_size
    return [
        (ROUTER, (count, hidden), REPLICATED),
        # expert after expert, the rows that each would have alone
        (EXPERTS_FC1, (count * 2 * ffn, hidden), replace(GATE_UP, experts=count)),
        (EXPERTS_FC2, (count * hidden, ffn), replace(ROW, experts=count)),
    ]


def adapter_tensors(config: ModelConfig, adapter: Adapter, shape: tuple[int, ...], split: Split) -> list[TensorSpec]:
    """The tensors of an adapter to a weight of `shape` and `split`.

    A factor is cut where it shares a dimension with the weight that is cut. Ranks hold the other one whole, and each
    computes a part of its gradient. Experts are shared as those of the weight.
    """
    matrices, whole = adapter.matrices, Split(experts=split.experts)
    outputs = sum(stop - start for start, stop in adapter.ranges(shape[0] // matrices, config))
    # of gate and up, each alone is one block
    rows = split if adapter.part is None or split.dim != 0 else replace(split, blocks=1)
    by_rows, by_columns = (rows, whole) if split.dim == 0 else (whole, split)
    tensors: list[tuple[str, tuple[int, ...], Split]] = [
        (adapter.a, (matrices * adapter.rank, shape[1]), by_columns),
        (adapter.b, (matrices * outputs, adapter.rank), by_rows),
    ]
    if config.lora is not None and config.lora.use_dora:
        tensors.append((adapter.magnitude, (outputs,), by_rows))
    return [TensorSpec(name, shape, split, adapter.layer, adapter) for name, shape, split in tensors]


def is_trained(config: ModelConfig, spec: TensorSpec) -> bool:
    """Whether training changes a tensor: all of them, or, in a model with adapters, only these."""
    return config.lora is None or spec.adapter is not None


def parameter_count(config: ModelConfig) -> int:
    """Numbers in the whole model, adapters included. A tied head counts once.

    >>> from tandem.models.published import qwen3_config
    >>> parameter_count(qwen3_config("0.6B"))
    596049920
    """
    return sum(spec.numel for spec in tensor_table(config).values())


def trained_count(config: ModelConfig) -> int:
    """The numbers that training changes: those of the adapters, if there are any."""
    return sum(spec.numel for spec in tensor_table(config).values() if is_trained(config, spec))
