"""How busy a model's experts are during a run: metrics of the logged steps, and an event when one stays idle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tandem.backends.interface import ExpertLoad
from tandem.logs import log
from tandem.training.logs.events import EventLog
from tandem.training.logs.expert_loads import ExpertLoadsFile

LOAD_BALANCING = "load_balancing_loss"  # this name and the next one are Megatron's
Z = "z_loss"
BUSIEST = "max_expert_load"
IDLE = "idle_experts"
DROPPED = "dropped_tokens"


@dataclass
class ExpertWatch:
    """Follows the experts of a run.

    An expert that gets no token in two logged steps in a row is named once, in the log and as an event.

    Attributes:
        events: those of the run.
        file: gets the load of each expert.
    """

    events: EventLog
    file: ExpertLoadsFile = field(default_factory=lambda: ExpertLoadsFile(None, 0))
    _idle: set[tuple[int, int]] = field(default_factory=set)
    _named: set[tuple[int, int]] = field(default_factory=set)

    def metrics(self, iteration: int, loads: Iterable[ExpertLoad]) -> dict[str, float]:
        """The metrics of a step, from the loads of all ranks; empty when no token was trained.

        The losses are means over layers and micro-batches, without their coefficients, as Megatron logs them.
        `max_expert_load` is the number of tokens of the busiest expert of any layer, over that of equally busy ones.
        `idle_experts` is how many experts of all layers got no token. With a capacity, `dropped_tokens` is the share of
        the choices of all tokens that experts did not take.
        """
        loads = list(loads)
        counts = _summed(loads)
        if not counts:
            return {}
        self.file.add(iteration, counts)
        idle = {(layer, int(expert)) for layer, of in counts.items() for expert in np.flatnonzero(of == 0)}
        self._name(iteration, (idle & self._idle) - self._named)
        self._idle = idle
        return {
            LOAD_BALANCING: sum(load.load_balancing for load in loads) / sum(load.balanced for load in loads),
            Z: sum(load.z for load in loads) / sum(load.terms for load in loads),
            BUSIEST: max(float(of.max() / of.mean()) for of in counts.values()),
            IDLE: float(len(idle)),
            **_dropped(loads, counts),
        }

    def _name(self, iteration: int, experts: set[tuple[int, int]]) -> None:
        if not experts:
            return
        self._named |= experts
        of_layers: dict[int, list[int]] = {}
        for layer, expert in sorted(experts):
            of_layers.setdefault(layer, []).append(expert)
        places = "; ".join(f"layer {layer}: {', '.join(map(str, numbers))}" for layer, numbers in of_layers.items())
        log.warning("iteration %d: experts without a token in two logged steps in a row: %s", iteration, places)
        self.events.add("idle experts", iteration=iteration, experts=places)


def _dropped(loads: Iterable[ExpertLoad], counts: dict[int, np.ndarray]) -> dict[str, float]:
    found = [load.dropped for load in loads if load.dropped is not None]
    return {DROPPED: sum(found) / sum(float(of.sum()) for of in counts.values())} if found else {}


def _summed(loads: Iterable[ExpertLoad]) -> dict[int, np.ndarray]:
    """layer -> tokens of each expert, over all ranks, by layer."""
    counts: dict[int, Any] = {}
    for load in loads:
        for layer, of_experts in load.counts.items():
            counts[layer] = counts.get(layer, 0) + np.asarray(of_experts)
    return dict(sorted(counts.items()))


def to_json(load: ExpertLoad) -> list[Any]:
    """A load as values that are valid in JSON."""
    return [list(load.counts.items()), load.load_balancing, load.z, load.terms, load.balanced, load.dropped]


def from_json(values: list[Any]) -> ExpertLoad:
    """The reverse of `to_json`."""
    counts, *rest = values
    return ExpertLoad(dict(counts), *rest)
