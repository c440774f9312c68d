"""Which gradients tensor ranks compute in parts, that they add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tandem.models.families import ROUTER
from tandem.models.tensors import TensorSpec
from tandem.parallel.layout import Layout, Shard


def partial_names(
    shards: Mapping[str, Shard], trained: Iterable[str], layout: Layout, *, sequence_parallel: bool
) -> list[str]:
    """Weights that all tensor ranks hold whole, and of which each has only a part of the gradient.

    These weights see only the rank's heads, or the rank's slices of experts, or are factors next to one that is cut;
    where tokens are split, also those that see only the rank's tokens.
    """
    whole = {name: shards[name].spec for name in trained if shards[name].spec.split.dim is None}
    cut = layout.expert_tensor_size > 1  # otherwise tensor ranks have experts as data ranks have them
    return [
        name for name, spec in whole.items() if (cut if spec.split.experts else sequence_parallel or _sees_a_part(spec))
    ]


def _sees_a_part(spec: TensorSpec) -> bool:
    return spec.adapter is not None or "self_attention" in spec.name or spec.name.endswith(ROUTER)
