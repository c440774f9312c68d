"""Communication of data ranks while passes compute: part by part of a model, in one order on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from tandem.backends.torch.model import GPTModel


@dataclass(frozen=True)
class Overlap:
    """What runs while passes compute: Megatron's `--overlap-grad-reduce` and `--overlap-param-gather`."""

    grad_reduce: bool = False
    param_gather: bool = False


@dataclass(frozen=True)
class Part:
    """Weights that compute at the same time.

    Attributes:
        module: the one whose forward pass is the first to use them. Its first argument is a tensor. When that tensor's
            gradient is known, all gradients of the weights are, except an embedding's: tokens have no gradient.
    """

    module: nn.Module
    weights: Sequence[nn.Parameter]


def parts_of(chunks: Sequence[GPTModel]) -> list[Part]:
    """The parts of this rank's chunks: each layer, and what is before and after all layers. In the forward order."""
    return [part for chunk in chunks for part in _parts(chunk)]


def _parts(chunk: GPTModel) -> Iterator[Part]:
    if chunk.embedding is not None:
        yield _part(chunk.embedding.word_embeddings)
    for layer in chunk.decoder.layers.values():
        yield _part(layer)
    norm = chunk.decoder.final_layernorm
    if norm is not None:
        # The head's gradient is known before the backward pass begins.
        yield _part(norm) if chunk.output_layer is None else _part(norm, chunk.output_layer)


def _part(*modules: nn.Module) -> Part:
    return Part(modules[0], [weight for module in modules for weight in module.parameters()])


SMALL = 2**20  # numbers of a weight that travels with others
Bundle = Sequence[nn.Parameter]


def bundles(weights: Sequence[nn.Parameter]) -> list[Bundle]:
    """Weights in the collectives that they travel with: small ones in one, and others each in its own.

    A message of several weights is packed and unpacked, which takes longer for large ones than a message of their own.
    """
    small = [weight for weight in weights if weight.numel() < SMALL]
    large = [[weight] for weight in weights if weight.numel() >= SMALL]
    return [small, *large] if small else [*large]


class InOrder:
    """Collectives of groups of weights, started in the order of the groups.

    Ranks that start their collectives in different orders would wait for each other without end. So a group that is
    ready before its turn waits for the groups before it.

    Args:
        start: starts a collective, and returns what waits for it.
        groups: of each, the weights of its collectives.
        most: how many groups may be under way; None for any number.
    """

    def __init__(
        self,
        start: Callable[[Bundle], Callable[[], object]],
        groups: Sequence[Sequence[Bundle]],
        most: int | None = None,
    ) -> None:
        self._start, self._groups, self._most = start, groups, most
        self._ready: set[int] = set()
        self._started = 0
        self._under_way: dict[int, list[Callable[[], object]]] = {}

    def settle(self) -> None:
        """Wait for all that is under way. Then the order starts from the first group, and no group is ready."""
        for group in list(self._under_way):
            self.wait(group)
        self._ready.clear()
        self._started = 0

    def ready(self, group: int) -> None:
        """Start the collectives of a group, as soon as it is its turn."""
        self._ready.add(group)
        while self._started in self._ready:
            if self._most is not None and len(self._under_way) >= self._most:
                self.wait(min(self._under_way))
            waits = [self._start(bundle) for bundle in self._groups[self._started]]
            if waits:
                self._under_way[self._started] = waits
            self._started += 1

    def start_rest(self) -> None:
        """Start the collectives of all groups that were not started yet."""
        for group in range(self._started, len(self._groups)):
            self.ready(group)

    def wait(self, group: int) -> None:
        """Wait for the collectives of a group, if they are under way."""
        for wait in self._under_way.pop(group, ()):
            wait()
