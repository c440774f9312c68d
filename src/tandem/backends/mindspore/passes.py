"""Forward and backward passes of micro-batches through this rank's chunks of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from tandem.backends.experts import Balancing
from tandem.backends.mindspore.inputs import Inputs, prepare
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.memory import undefined
from tandem.backends.mindspore.model import Attention, Decoder
from tandem.backends.mindspore.pipeline import Pipeline
from tandem.backends.mindspore.tensor_parallel import TensorParallel
from tandem.backends.mindspore.weight import Pullback, Weight
from tandem.backends.passes import WeightedBatch, follow, trained_rows
from tandem.data.batch import MicroBatch
from tandem.parallel.pipeline import Action


@dataclass(frozen=True)
class _InFlight:
    """A chunk's forward pass that waits for its backward pass.

    `gradient` is that of the output. It is undefined until the next chunk sends it.
    """

    pull: Pullback
    gradient: Tensor


@dataclass(frozen=True)
class Passes:
    """This rank's chunks and their neighbours."""

    chunks: Sequence[Decoder]
    pipeline: Pipeline
    tensor: TensorParallel
    kernels: Kernels
    dtype: ms.Type
    balancing: Balancing

    @property
    def head(self) -> Weight:
        """[this rank's rows of the vocabulary, h]; on ranks with the last chunk."""
        return self.chunks[-1].head

    def accumulate(self, batches: Sequence[WeightedBatch]) -> Any:
        """Add the gradients of the sum of the batches' weighted losses to the weights'.

        Returns:
            That sum, a number or a tensor; 0 on ranks without the last chunk.
        """

        def forward(action: Action) -> tuple[Any, _InFlight]:
            return self._forward(action.chunk, batches[action.micro_batch])

        def backward(action: Action, done: _InFlight) -> None:
            self._backward(action.chunk, done)

        total = follow(self.pipeline.schedule(len(batches)), forward, backward)
        self.pipeline.finish()
        return total

    def losses(
        self, batches: Sequence[MicroBatch], most_likely: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """The losses of each batch's judged labels, fp32 [labels]; nothing on ranks without the last chunk.

        `most_likely`, int64 of these shapes, gets the most likely tokens.
        """
        losses = []
        for place, batch in enumerate(batches):
            inputs = self._prepare(batch, *batch.judged, whole=most_likely is not None)
            output = self._through(inputs)
            if output is not None:
                tokens = None if most_likely is None else most_likely[place]
                losses.append(self.kernels.token_losses(output, self.head, inputs.targets, self.tensor, tokens))
        self.pipeline.finish()
        return losses

    def hidden(self, batch: MicroBatch, rows: np.ndarray, attention: Attention | None = None) -> Tensor | None:
        """The input of the head; None on ranks without the last chunk. `attention` default: within documents."""
        hidden = self._through(self._prepare(batch, rows, batch.labels[rows], whole=True), attention)
        self.pipeline.finish()
        return hidden

    def _through(self, inputs: Inputs, attention: Attention | None = None) -> Tensor | None:
        """The input of the head, after this rank's chunks one after another; None on ranks without the last chunk."""
        hidden = None
        for chunk in range(len(self.chunks)):
            output, _ = self._output(chunk, inputs, differentiable=False, attention=attention)
            if (target := self.pipeline.target(chunk)) is None:
                hidden = output
            else:
                self.pipeline.send(target, True, output)
        return hidden

    def _forward(self, chunk: int, batch: WeightedBatch) -> tuple[Any, _InFlight]:
        rows = trained_rows(batch)
        inputs = self._prepare(batch, rows, batch.labels[rows])
        output, pull = self._output(chunk, inputs, differentiable=True)
        if (target := self.pipeline.target(chunk)) is not None:
            self.pipeline.send(target, True, output)
            return 0.0, _InFlight(pull, undefined(output.shape, output.dtype))
        loss, gradient = self.kernels.cross_entropy_and_gradient(output, self.head, inputs.targets, self.tensor)
        return loss, _InFlight(pull, gradient)

    def _backward(self, chunk: int, done: _InFlight) -> None:
        if (target := self.pipeline.target(chunk)) is not None:
            self.pipeline.receive(target, False, done.gradient)
        gradient = done.pull(done.gradient)
        if (source := self.pipeline.source(chunk)) is not None:
            self.pipeline.send(source, False, gradient)

    def _prepare(self, batch: MicroBatch, rows: np.ndarray, labels: np.ndarray, *, whole: bool = False) -> Inputs:
        """`whole`: no expert drops a token, whatever the settings are."""
        routing = self.balancing.of(batch, whole=whole)
        return prepare(self.chunks[0].config, batch, rows, labels, self.dtype, self.kernels, self.tensor, routing)

    def _output(
        self, chunk: int, inputs: Inputs, differentiable: bool, attention: Attention | None = None
    ) -> tuple[Tensor, Pullback]:
        decoder, x = self.chunks[chunk], None
        if (source := self.pipeline.source(chunk)) is not None:
            tokens = inputs.tokens // (self.tensor.ranks.size if self.tensor.sequence else 1)
            x = undefined((tokens, decoder.config.hidden_size), self.dtype)
            self.pipeline.receive(source, True, x)
        return decoder.forward(inputs, x, differentiable, attention)
