"""What the passes of a step wait for, asked for one pass early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from tandem.backends.passes import WeightedBatch
from tandem.backends.torch.inputs import Sent, send
from tandem.backends.torch.model import GPTModel
from tandem.backends.torch.pipeline import Pipeline
from tandem.parallel.pipeline import Action


class Ahead:
    """Micro-batches on their way to the device, and messages of other stages on their way to this one.

    Each micro-batch is sent once, also where several chunks compute with it.

    Args:
        new: memory for the hidden states of so many tokens.
    """

    def __init__(
        self,
        batches: Sequence[WeightedBatch],
        chunks: Sequence[GPTModel],
        pipeline: Pipeline,
        device: torch.device,
        new: Callable[[int], torch.Tensor],
    ) -> None:
        self._batches, self._chunks, self._pipeline, self._device, self._new = batches, chunks, pipeline, device, new
        self._sent: dict[int, Sent] = {}
        self._tokens: dict[int, int] = {}  # of each micro-batch that was sent, with its padding
        self._expected: dict[Action, Callable[[], torch.Tensor]] = {}

    def of(self, schedule: Sequence[Action]) -> Iterator[Action]:
        """The schedule. Before each pass, what the one after it waits for is asked for."""
        for action in schedule[:1]:
            self._ask(action)
        for action, following in pairwise(schedule):
            self._ask(following)
            yield action
        yield from schedule[-1:]

    def sent(self, action: Action) -> Sent:
        """The micro-batch of a forward pass."""
        is_last = action.chunk == len(self._chunks) - 1
        return self._sent.pop(action.micro_batch) if is_last else self._sent[action.micro_batch]

    def received(self, action: Action) -> torch.Tensor | None:
        """What another stage sends for a pass: waits for it. None where nothing is sent."""
        arrived = self._expected.pop(action, None)
        return None if arrived is None else arrived()

    def _ask(self, action: Action) -> None:
        number = action.micro_batch
        if number not in self._tokens:
            self._sent[number] = send(self._batches[number], self._device, self._chunks[0].tensor)
            self._tokens[number] = len(self._sent[number].longer.tokens)
        side = self._pipeline.source if action.forward else self._pipeline.target
        link = side(action.chunk)
        if link is not None:
            x = self._new(self._tokens[number])
            self._expected[action] = self._pipeline.expect(link, action.forward, x)
