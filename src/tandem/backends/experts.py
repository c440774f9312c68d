"""What the mixtures of experts of both frameworks share: the losses that keep experts equally busy.

They are part of the gradient, and of no reported loss. Each is a mean over the micro-batches of a step.

Sources: load balancing: "Switch Transformers" (arXiv 2101.03961), section 2.2, as in Megatron-core's
`transformer/moe/moe_utils.py`, or as in transformers' `load_balancing_loss_func`; z-loss: "ST-MoE" (arXiv 2202.08906).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tandem.backends.capacity import Capacity
from tandem.backends.interface import ExpertLoad
from tandem.backends.passes import WeightedBatch
from tandem.config.settings import RouterSettings
from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts
from tandem.parallel.layout import Layout, even_rows

# Kinds of load balancing that add no loss.
UNBALANCED = ("none", "softmax_topk")

# The framework's array: of numbers per expert, or of one number.
Array = Any


def sliced(experts: Experts | None, layout: Layout) -> Experts | None:
    """Experts with the width of a rank's slices."""
    if experts is None:
        return None
    return replace(experts, moe_ffn_hidden_size=experts.moe_ffn_hidden_size // layout.expert_tensor_size)


@dataclass(frozen=True)
class Share:
    """The tokens of its micro-batch that a rank sends to experts: part number `part` of `parts` equal ones.

    Tensor ranks that cut experts all need every token. Where experts are whole, each sends its own part.
    """

    part: int = 0
    parts: int = 1

    @classmethod
    def of(cls, layout: Layout, tensor_rank: int) -> Share:
        size = layout.tensor_model_parallel_size
        return cls() if layout.expert_tensor_size == size else cls(tensor_rank, size)

    def rows(self, tokens: int) -> tuple[int, int]:
        return even_rows(tokens, self.parts, self.part)


@dataclass
class Balancing:
    """Makes the routing of each micro-batch, and keeps those of a step.

    Attributes:
        config: of the whole model.
        parts: how many tensor ranks route the same tokens: each adds its part of these losses to the gradient.
        sequence_parallel: each of them has a part of the tokens outside attention and experts.
    """

    settings: RouterSettings
    config: ModelConfig
    parts: int = 1
    sequence_parallel: bool = False
    of_step: list[Routing] = field(default_factory=list)

    def of(self, batch: MicroBatch, *, whole: bool = False) -> Routing | None:
        """None for a model without experts. `whole`: no token is dropped, whatever the settings are."""
        experts, weight = self.config.experts, 0.0
        if experts is None:
            return None
        if isinstance(batch, WeightedBatch) and batch.trained_tokens:  # others are left out where they can be
            weight = batch.balance / self.parts
        sparse = self.config.num_layers - self.config.dense_layers
        capacity = Capacity.of(self.settings, experts, self.parts if self.sequence_parallel else 1)
        routing = Routing(
            self.settings, experts, sparse, len(batch.tokens), weight, capacity=None if whole else capacity
        )
        if weight:
            self.of_step.append(routing)
        return routing

    def load(self, joined_on_host: Callable[[Sequence[Array]], np.ndarray]) -> ExpertLoad:
        """How the tokens of a step were routed. `joined_on_host` brings the numbers of arrays to the host, at once."""
        load = ExpertLoad()
        tables = [table for routing in self.of_step for table in routing.tables]
        values = iter(_read([value for table in tables for value in table.values()], joined_on_host))
        read = iter([{layer: next(values) for layer in table} for table in tables])
        for routing in self.of_step:
            counts, mass, squares, taken = (next(read) for _ in routing.tables)
            for layer, of_experts in counts.items():
                before = np.asarray(load.counts.get(layer, 0))
                load.counts[layer] = (before + of_experts).astype(np.int64).tolist()
            losses = routing.balancing_losses(counts, mass)
            load.load_balancing += sum(losses)
            load.balanced += len(losses)
            load.z += float(sum(squares.values())) / routing.tokens
            load.terms += len(squares)
            for layer, count in taken.items():
                load.dropped = (load.dropped or 0) + int(counts[layer].sum() - count)
        return load


def _read(arrays: Sequence[Array], joined_on_host: Callable[[Sequence[Array]], np.ndarray]) -> list[np.ndarray]:
    """The arrays on the host, fp64."""
    if not arrays:
        return []
    shapes = [np.shape(array) for array in arrays]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(joined_on_host(arrays).astype(np.float64), ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes)]


@dataclass
class Routing:
    """How the tokens of one micro-batch are routed, and what its forward pass noted for its backward pass.

    With T tokens, E experts, k of them for each token, p the router's probabilities, and n the numbers of tokens of
    each expert, the loss of a layer is E / (k T^2) * sum over experts of n_e * sum over tokens of p_te. It is 1 when
    all are equally busy. Pooled over L layers it is one loss, k times as large: E / (L T)^2 times the sums over all
    layers.

    Attributes:
        weight: of this micro-batch's losses in the gradient; 0 in evaluation.
        tokens: how many tokens are routed; those behind them are padding.
        layers: how many layers of the model have experts.
        capacity: of its experts; None where they take every token.
        counts: layer -> tokens of each expert, fp32 [E].
        mass: layer -> the sums of the tokens' probabilities, fp32 [E].
        squares: layer -> the sum of the squares of the tokens' log-sum-exp of the router's logits.
        taken: layer -> how many choices experts with a capacity took.
    """

    settings: RouterSettings
    experts: Experts
    layers: int
    tokens: int
    weight: float
    capacity: Capacity | None = None
    counts: dict[int, Array] = field(default_factory=dict)
    mass: dict[int, Array] = field(default_factory=dict)
    squares: dict[int, Array] = field(default_factory=dict)
    taken: dict[int, Array] = field(default_factory=dict)

    @property
    def tables(self) -> tuple[dict[int, Array], ...]:
        """What the forward pass noted: counts, mass, squares, taken."""
        return self.counts, self.mass, self.squares, self.taken

    @property
    def slope_of_z(self) -> float:
        """What the squares of a layer's log-sum-exp count in the gradient."""
        return self.weight * (self.settings.moe_z_loss_coeff or 0.0) / self.tokens

    def slopes(self, layer: int) -> Array:
        """The gradient of the balancing loss with respect to each token's probabilities, [E]; None without one."""
        settings = self.settings
        if not self.weight or not settings.moe_aux_loss_coeff or settings.moe_router_load_balancing_type in UNBALANCED:
            return None
        if settings.moe_router_load_balancing_type == "pooled_aux_loss":
            first, *others = self.counts.values()
            counts = sum(others, first)
        else:
            counts = self.counts[layer]
        return counts * (self.weight * settings.moe_aux_loss_coeff * self.factor)

    def balancing_losses(self, counts: dict[int, np.ndarray], mass: dict[int, np.ndarray]) -> list[float]:
        """The balancing loss of each layer, or of all at once, from what the forward pass noted, on the host."""
        if self.settings.moe_router_load_balancing_type == "pooled_aux_loss":
            pairs = [(sum(counts.values()), sum(mass.values()))] if counts else []
        else:
            pairs = [(counts[layer], mass[layer]) for layer in counts]
        return [self.factor * float(np.sum(of_counts * of_mass)) for of_counts, of_mass in pairs]

    @property
    def factor(self) -> float:
        """What the sum over experts of counts times probabilities is multiplied with."""
        experts, tokens = self.experts, self.tokens
        if self.settings.moe_router_load_balancing_type == "pooled_aux_loss":
            return experts.num_experts / (self.layers * tokens) ** 2
        return experts.num_experts / (experts.moe_router_topk * tokens**2)


@dataclass(frozen=True)
class Sorted:
    """The choices of a rank's tokens, sorted by expert, and each expert's in the order of their tokens.

    Arrays are the framework's, where its kernels want them.

    Attributes:
        slots: of each row, which of the t k choices it is: token times k, plus the place among the token's experts.
        tokens: of each row, the number of its token.
        places: of each token that this rank sends, its rows, [tokens, k]; None where no kernel asks for them.
        first: the first token that this rank sends.
        counts: rows of each expert, [E].
    """

    slots: Array
    tokens: Array
    places: Array
    first: int
    counts: Array


@dataclass(frozen=True)
class Dispatch:
    """How rows of tokens travel between the ranks that share a layer's experts.

    A rank sends its rows sorted by expert. What it receives comes rank after rank.

    Attributes:
        send, receive: rows to and from each rank.
        order: of the received rows, sorted by this rank's experts: the number of each among those that came.
        counts: received rows of each of this rank's experts.
        between: rows from each rank to each, on the host.
    """

    send: list[int]
    receive: list[int]
    order: Array
    counts: Array
    between: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, rank: int) -> Dispatch:
        """Of rank number `rank`, when rank r has rows[r, e] rows for expert e.

        >>> dispatch = Dispatch.of(np.array([[2, 1, 0, 3], [1, 1, 4, 0]]), rank=0)
        >>> dispatch.send, dispatch.receive, dispatch.order.tolist(), dispatch.counts
        ([3, 3], [3, 2], [0, 1, 3, 2, 4], array([3, 2]))
        """
        ranks, experts = rows.shape
        held = experts // ranks
        here = rows[:, rank * held : (rank + 1) * held]
        of_rows = np.concatenate([np.repeat(np.arange(held), of_rank) for of_rank in here])
        order = np.argsort(of_rows, kind="stable")
        between = rows.reshape(ranks, ranks, held).sum(2)
        return cls(between[rank].tolist(), between[:, rank].tolist(), order, here.sum(0), between)
