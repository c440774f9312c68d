"""Data parallelism: gradients summed over ranks that hold the same weights; optimizer state by rows on request.

Source of the sharding: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054),
stage 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from tandem.backends.torch.communication import Ranks, all_gather, all_reduce, most_sums, reduce_scatter
from tandem.backends.torch.functional import GradientBuffer, Weight
from tandem.backends.torch.overlap import Bundle, InOrder, Overlap, Part, bundles
from tandem.parallel.layout import even_rows

AT_A_TIME = 2  # collectives that are under way after the passes: gloo copies what it sends


class Sharing(Protocol):
    """How data ranks share a model's state.

    Attributes:
        weights_by_rows: a rank keeps only its rows (`even_rows`) of each weight.
        by_rows: a rank updates only its rows, and keeps optimizer state only for them.
    """

    ranks: Ranks
    weights_by_rows: bool
    by_rows: bool

    def prepare(self, weights: Sequence[nn.Parameter], *, training: bool) -> None:
        """Allocate the kept parts of weights, and of the gradients of those that require one.

        Values of weights are undefined.
        """
        ...

    def overlap(self, parts: Sequence[Part]) -> None:
        """After `prepare`, for training: communicate part by part, while passes compute where that was asked for."""
        ...

    def begin(self, *, gradients: bool) -> None:
        """Before the passes of a step: make weights ready, and all gradients zero."""
        ...

    def before_backward(self, chunk: nn.Module, *, last: bool) -> None:
        """Before a backward pass of a model's chunk. `last`: it is that of the step's last micro-batch."""
        ...

    def end(self) -> None:
        """After the passes of a step."""
        ...

    def reduce(self) -> None:
        """After `end`: sum over the ranks the gradients that this rank needs."""
        ...

    def share(self) -> None:
        """Send what this rank has updated to the ranks that keep it."""
        ...

    def kept(self, weight: nn.Parameter) -> torch.Tensor:
        """The part of a weight that this rank keeps: all of it, or its rows."""
        ...

    def updated(self, weight: nn.Parameter) -> torch.Tensor:
        """The part of a weight that this rank updates: all of it, or its rows, which may be none."""
        ...

    def gradient(self, weight: nn.Parameter) -> torch.Tensor:
        """The gradient of the part that this rank updates, fp32."""
        ...

    def whole_gradient(self, weight: nn.Parameter) -> torch.Tensor:
        """The gradient of a whole weight, on every rank."""
        ...


def own_rows(ranks: Ranks, rows: int, *, by_rows: bool) -> tuple[int, int]:
    """The half-open range of `rows` that belongs to this rank: all of them unless `by_rows`."""
    return even_rows(rows, ranks.size, ranks.rank) if by_rows else (0, rows)


def padded_rows(ranks: Ranks, rows: int) -> int:
    """The smallest number of rows, at least `rows`, that every rank can have an equal share of.

    >>> padded_rows(Ranks(size=4), 10)
    12
    """
    return -(-rows // ranks.size) * ranks.size


def chunk(ranks: Ranks, whole: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a tensor with `padded_rows` rows."""
    step = len(whole) // ranks.size
    return whole[ranks.rank * step : (ranks.rank + 1) * step]


class Replicated:
    """`Sharing` of ranks that all keep all weights.

    With `by_rows`, each rank updates its rows of every weight and sends them to the others. Otherwise all ranks update
    everything.

    Args:
        overlap: what runs while passes compute. Else all gradients are summed after the last backward pass, and all
            weights are sent before the next step. The collectives are the same, and so are the numbers.
    """

    weights_by_rows = False

    def __init__(self, ranks: Ranks, *, by_rows: bool, overlap: Overlap | None = None) -> None:
        self.ranks, self.by_rows, self._overlap = ranks, by_rows, overlap or Overlap()
        self._buffers: dict[nn.Parameter, GradientBuffer] = {}
        self._sums, self._gathers = InOrder(self._sum, ()), InOrder(self._gather, ())
        self._last_backward = False

    def prepare(self, weights: Sequence[nn.Parameter], *, training: bool) -> None:
        if not training:
            return
        for weight in weights:
            if not weight.requires_grad:
                continue
            assert isinstance(weight, Weight)
            room = self._room(weight)
            if room > len(weight):
                weight.data = weight.data.new_zeros(room, *weight.shape[1:])[: len(weight)]
            self._buffers[weight] = weight.main_grad = GradientBuffer(weight, room)

    def overlap(self, parts: Sequence[Part]) -> None:
        if self.ranks.group is None or not self._buffers:
            return
        groups = [bundles([weight for weight in part.weights if weight in self._buffers]) for part in parts]
        one_by_one = [[bundle] for group in groups for bundle in group]
        assert sum(len(bundle) for (bundle,) in one_by_one) == len(self._buffers), "each weight is in one part"
        self._sums = InOrder(self._sum, one_by_one, AT_A_TIME)
        self._gathers = InOrder(self._gather, one_by_one if self.by_rows else (), AT_A_TIME)
        if self._overlap.grad_reduce:
            device = next(iter(self._buffers)).device
            self._sums = InOrder(self._sum, groups[::-1], most_sums(device))
            for number, part in enumerate(reversed(parts)):
                part.module.register_forward_pre_hook(partial(self._watch, number))
        if self._overlap.param_gather and self.by_rows:
            self._gathers = InOrder(self._gather, groups)
            for number, part in enumerate(parts):
                part.module.register_forward_pre_hook(partial(self._wait_for_weights, number))

    def begin(self, *, gradients: bool) -> None:
        if gradients:
            for buffer in self._buffers.values():
                buffer.clear()
            self._sums.settle()

    def before_backward(self, chunk: nn.Module, *, last: bool) -> None:
        self._last_backward = last

    def end(self) -> None:
        pass

    def reduce(self) -> None:
        self._sums.start_rest()
        self._sums.settle()
        self._gathers.settle()  # of the update before this one, where no pass has waited for them

    def share(self) -> None:
        self._gathers.start_rest()
        if not self._overlap.param_gather:
            self._gathers.settle()

    def kept(self, weight: nn.Parameter) -> torch.Tensor:
        self._gathers.settle()
        return weight.data

    def updated(self, weight: nn.Parameter) -> torch.Tensor:
        return self._own_rows(weight.data)

    def gradient(self, weight: nn.Parameter) -> torch.Tensor:
        return self._own_rows(self._buffers[weight].value)

    def whole_gradient(self, weight: nn.Parameter) -> torch.Tensor:
        buffer = self._buffers[weight]
        if self.ranks.group is not None and self.by_rows:
            all_gather(buffer.whole, chunk(self.ranks, buffer.whole), self.ranks.group).wait()
        return buffer.value

    def _room(self, weight: nn.Parameter) -> int:
        return padded_rows(self.ranks, len(weight)) if self.by_rows else len(weight)

    def _own_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        start, stop = own_rows(self.ranks, len(tensor), by_rows=self.by_rows)
        return tensor[start:stop]

    def _sum(self, bundle: Bundle) -> Callable[[], object]:
        wholes = [self._buffers[weight].whole for weight in bundle]
        if len(bundle) == 1:
            (whole,) = wholes
            if self.by_rows:
                return reduce_scatter(chunk(self.ranks, whole), whole, self.ranks.group).wait
            return all_reduce(whole, self.ranks.group).wait
        if not self.by_rows:
            message = torch.cat([whole.view(-1) for whole in wholes])
            return partial(_unpack, all_reduce(message, self.ranks.group), message, wholes)
        message = torch.cat([whole.view(self.ranks.size, -1) for whole in wholes], 1)  # of each rank, its rows
        own = message.new_empty(message.shape[1])
        work = reduce_scatter(own, message.view(-1), self.ranks.group)
        return partial(_unpack, work, own, [chunk(self.ranks, whole) for whole in wholes], message)

    def _gather(self, bundle: Bundle) -> Callable[[], object]:
        wholes = [weight.data.as_strided((self._room(weight), *weight.shape[1:]), weight.stride()) for weight in bundle]
        if len(bundle) == 1:
            (whole,) = wholes
            return all_gather(whole, chunk(self.ranks, whole), self.ranks.group).wait
        own = torch.cat([chunk(self.ranks, whole).view(-1) for whole in wholes])
        message = own.new_empty(self.ranks.size, len(own))
        work = all_gather(message.view(-1), own, self.ranks.group)
        return partial(_unpack, work, message, [whole.view(self.ranks.size, -1) for whole in wholes], own)

    def _wait_for_weights(self, number: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._gathers.wait(number)

    def _watch(self, number: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Before a part's forward pass: see to it that its gradients are summed when its last backward pass is over."""
        x = arguments[0]
        if x.requires_grad:
            x.register_hook(lambda _: self._sums.ready(number) if self._last_backward else None)


def _unpack(work: dist.Work, message: torch.Tensor, targets: Sequence[torch.Tensor], *sent: torch.Tensor) -> None:
    """Wait for a collective, and write its message to where its parts belong. `sent` stays in memory until then."""
    work.wait()
    parts = message.split([target.numel() // message[..., 0].numel() for target in targets], -1)
    views = [part.view_as(target) for part, target in zip(parts, targets)]
    torch._foreach_copy_(list(targets), views, non_blocking=True)  # on Ascend the host would wait


class Apart:
    """`Sharing` in which other ranks hold the same experts than hold the same of all else.

    Args:
        rest, experts: how each kind of weight is shared, with equal `by_rows`.
        of_experts: called with a weight.
    """

    weights_by_rows = False

    def __init__(self, rest: Replicated, experts: Replicated, of_experts: Callable[[nn.Parameter], bool]) -> None:
        self.ranks, self.by_rows = rest.ranks, rest.by_rows
        self._rest, self._experts, self._of_experts = rest, experts, of_experts

    def prepare(self, weights: Sequence[nn.Parameter], *, training: bool) -> None:
        self._rest.prepare([weight for weight in weights if not self._of_experts(weight)], training=training)
        self._experts.prepare([weight for weight in weights if self._of_experts(weight)], training=training)

    def overlap(self, parts: Sequence[Part]) -> None:
        self._rest.overlap(parts)
        self._experts.overlap(parts)

    def begin(self, *, gradients: bool) -> None:
        self._rest.begin(gradients=gradients)
        self._experts.begin(gradients=gradients)

    def before_backward(self, chunk: nn.Module, *, last: bool) -> None:
        self._rest.before_backward(chunk, last=last)
        self._experts.before_backward(chunk, last=last)

    def end(self) -> None:
        pass

    def reduce(self) -> None:
        self._rest.reduce()
        self._experts.reduce()

    def share(self) -> None:
        self._rest.share()
        self._experts.share()

    def kept(self, weight: nn.Parameter) -> torch.Tensor:
        return self._of(weight).kept(weight)

    def updated(self, weight: nn.Parameter) -> torch.Tensor:
        return self._of(weight).updated(weight)

    def gradient(self, weight: nn.Parameter) -> torch.Tensor:
        return self._of(weight).gradient(weight)

    def whole_gradient(self, weight: nn.Parameter) -> torch.Tensor:
        return self._of(weight).whole_gradient(weight)

    def _of(self, weight: nn.Parameter) -> Replicated:
        return self._experts if self._of_experts(weight) else self._rest
