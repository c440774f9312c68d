"""Forward and backward passes of micro-batches through this rank's chunks of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tandem.backends.experts import Balancing
from tandem.backends.passes import WeightedBatch, follow
from tandem.backends.torch.ahead import Ahead
from tandem.backends.torch.attention import Attention
from tandem.backends.torch.data_parallel import Sharing
from tandem.backends.torch.inputs import Inputs, Sent, arrive, send
from tandem.backends.torch.loss import cross_entropy_and_gradient, token_losses
from tandem.backends.torch.model import GPTModel
from tandem.backends.torch.pipeline import Pipeline
from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig
from tandem.parallel.layout import Shard
from tandem.parallel.pipeline import Action


@dataclass
class _InFlight:
    """A chunk's forward pass that waits for its backward pass. `gradient` is that of the output, where it is known."""

    x: torch.Tensor | None
    output: torch.Tensor
    gradient: torch.Tensor | None


class _Begin(torch.autograd.Function):
    """A number whose backward pass begins with a given gradient of `output`.

    `output.backward(gradient)` does the same, but imports sympy first: half a second of each start.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradient, None


@dataclass(frozen=True)
class Passes:
    """This rank's chunks and their neighbours. `config` is that of the whole model."""

    config: ModelConfig
    chunks: list[GPTModel]
    pipeline: Pipeline
    sharing: Sharing
    dtype: torch.dtype
    device: torch.device
    balancing: Balancing

    def accumulate(self, batches: Sequence[WeightedBatch]) -> torch.Tensor | float:
        """Add the gradients of the sum of the batches' weighted losses to the weights' buffers.

        Returns:
            That sum; 0 on ranks without the last chunk.
        """

        ahead = Ahead(batches, self.chunks, self.pipeline, self.device, self._new_hidden)

        def forward(action: Action) -> tuple[torch.Tensor | float, _InFlight]:
            return self._forward(action, ahead.sent(action), ahead.received(action))

        def backward(action: Action, done: _InFlight) -> None:
            self.sharing.before_backward(self.chunks[action.chunk], last=action.micro_batch == len(batches) - 1)
            self._backward(action, done, ahead.received(action))

        total = follow(ahead.of(self.pipeline.schedule(len(batches))), forward, backward)
        self.pipeline.finish()
        return total

    @torch.no_grad()
    def losses(
        self, batches: Sequence[MicroBatch], most_likely: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """The losses of each batch's judged labels, fp32 [labels]; nothing on ranks without the last chunk.

        `most_likely`, int64 of these shapes, gets the most likely tokens.
        """
        losses = []
        for place, batch in enumerate(batches):
            for number, chunk in enumerate(self.chunks):
                inputs = self._prepare(batch, whole=most_likely is not None)
                output = self.chunks[number](inputs, self._receive(number, inputs), inputs.rows)
                if (target := self.pipeline.target(number)) is None:
                    tokens = None if most_likely is None else most_likely[place]
                    losses.append(token_losses(output, chunk.head, inputs.targets, chunk.tensor, tokens))
                else:
                    self.pipeline.send(target, True, output)
        self.pipeline.finish()
        return losses

    @torch.no_grad()
    def hidden(
        self, batch: MicroBatch, rows: torch.Tensor | None, attention: Attention | None = None
    ) -> torch.Tensor | None:
        """The input of the head; None on ranks without the last chunk. `attention` default: within documents."""
        hidden = None
        for number in range(len(self.chunks)):
            output = self._output(number, batch, rows, attention)
            if (target := self.pipeline.target(number)) is None:
                hidden = output
            else:
                self.pipeline.send(target, True, output)
        self.pipeline.finish()
        return hidden

    def named_modules(self, shards: Iterable[Shard]) -> Iterator[tuple[str, nn.Module]]:
        """By global name, every module that holds weights of these shards, itself or in its modules."""
        modules = [dict(chunk.named_modules()) for chunk in self.chunks]
        for shard in shards:
            local_path, global_path = shard.local_name.split("."), shard.spec.name.split(".")
            for depth in range(1, len(local_path)):
                module = modules[shard.chunk].pop(".".join(local_path[:depth]), None)
                if module is not None:
                    yield ".".join(global_path[:depth]), module

    def _forward(self, action: Action, sent: Sent, x: torch.Tensor | None) -> tuple[torch.Tensor | float, _InFlight]:
        chunk, target = self.chunks[action.chunk], self.pipeline.target(action.chunk)
        inputs = self._arrive(sent)
        if x is not None:
            x.requires_grad_()
        output = chunk(inputs, x, inputs.rows)
        loss, gradient = None, None
        if target is None:
            loss, gradient = cross_entropy_and_gradient(output.detach(), chunk.head, inputs.targets, chunk.tensor)
        else:
            self.pipeline.send(target, True, output.detach())
        return 0.0 if loss is None else loss, _InFlight(x, output, gradient)

    def _backward(self, action: Action, done: _InFlight, received: torch.Tensor | None) -> None:
        gradient = done.gradient if received is None else received
        assert gradient is not None
        _Begin.apply(done.output, gradient).backward()
        if done.x is not None:
            source = self.pipeline.source(action.chunk)
            assert source is not None
            assert done.x.grad is not None
            self.pipeline.send(source, False, done.x.grad)

    def _output(
        self, number: int, batch: MicroBatch, rows: torch.Tensor | None, attention: Attention | None = None
    ) -> torch.Tensor:
        inputs = self._prepare(batch, attention, whole=True)
        output: torch.Tensor = self.chunks[number](inputs, self._receive(number, inputs), rows)
        return output

    def _receive(self, number: int, inputs: Inputs) -> torch.Tensor | None:
        """The output of the chunk before; None for the first chunk. For passes without gradients."""
        source = self.pipeline.source(number)
        if source is None:
            return None
        return self.pipeline.expect(source, True, self._new_hidden(len(inputs.tokens)))()

    def _new_hidden(self, tokens: int) -> torch.Tensor:
        """Memory for this rank's hidden states of a micro-batch of so many tokens."""
        tensor = self.chunks[0].tensor
        rows = tokens // (tensor.size if tensor is not None and tensor.sequence else 1)
        return torch.empty(rows, self.config.hidden_size, dtype=self.dtype, device=self.device)

    def _prepare(self, batch: MicroBatch, attention: Attention | None = None, *, whole: bool) -> Inputs:
        """`whole`: no expert drops a token, whatever the settings are."""
        return self._arrive(send(batch, self.device, self.chunks[0].tensor), attention, whole=whole)

    def _arrive(self, sent: Sent, attention: Attention | None = None, *, whole: bool = False) -> Inputs:
        routing = self.balancing.of(sent.batch, whole=whole)
        return arrive(self.config, sent, self.dtype, self.device, attention, routing)
