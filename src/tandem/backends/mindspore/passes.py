"""Forward and backward passes of micro-batches through this rank's stage of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from tandem.backends.experts import Balancing
from tandem.backends.mindspore.kernels import Kernels
from tandem.backends.mindspore.model import Attention, Decoder
from tandem.backends.mindspore.pipeline import Pipeline
from tandem.backends.mindspore.tensor_parallel import TensorParallel
from tandem.backends.mindspore.weight import Pullback
from tandem.backends.passes import WeightedBatch, follow, trained_rows
from tandem.data.batch import MicroBatch, padded
from tandem.parallel.pipeline import Action


@dataclass(frozen=True)
class _InFlight:
    """A forward pass that waits for its backward pass.

    `gradient` is that of the output. It is undefined until the next stage sends it.
    """

    pull: Pullback
    gradient: Tensor


@dataclass(frozen=True)
class Passes:
    """This rank's stage and its neighbours. All batches have trained tokens."""

    decoder: Decoder
    pipeline: Pipeline
    tensor: TensorParallel
    kernels: Kernels
    dtype: ms.Type
    balancing: Balancing

    def accumulate(self, batches: Sequence[WeightedBatch]) -> float:
        """Add the gradients of the sum of the batches' weighted losses to the weights'.

        Returns:
            That sum; 0 on all stages except the last.
        """

        def forward(action: Action) -> tuple[float, _InFlight]:
            return self._forward(batches[action.micro_batch])

        def backward(_: Action, done: _InFlight) -> None:
            self._backward(done)

        total = follow(self.pipeline.schedule(len(batches)), forward, backward)
        self.pipeline.finish()
        return total

    def losses(
        self, batches: Sequence[MicroBatch], most_likely: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """The losses of each batch's judged labels, fp32 [labels]; nothing on all stages except the last.

        `most_likely`, int64 of these shapes, gets the most likely tokens.
        """
        losses = []
        for place, batch in enumerate(batches):
            rows, labels = batch.judged
            output, _ = self._output(batch, rows, differentiable=False)
            if self.pipeline.is_last:
                tokens = None if most_likely is None else most_likely[place]
                losses.append(self.kernels.token_losses(output, self.decoder.head, labels, self.tensor, tokens))
            else:
                self.pipeline.send(True, output)
        self.pipeline.finish()
        return losses

    def hidden(self, batch: MicroBatch, rows: np.ndarray, attention: Attention | None = None) -> Tensor | None:
        """The input of the head; None on all stages except the last. `attention` default: within documents."""
        output, _ = self._output(batch, rows, differentiable=False, attention=attention)
        if self.pipeline.is_last:
            return output
        self.pipeline.send(True, output)
        self.pipeline.finish()
        return None

    def _forward(self, batch: WeightedBatch) -> tuple[float, _InFlight]:
        rows = trained_rows(batch)
        output, pull = self._output(batch, rows, differentiable=True)
        if not self.pipeline.is_last:
            self.pipeline.send(True, output)
            return 0.0, _InFlight(pull, mint.empty(output.shape, dtype=output.dtype))
        loss, gradient = self.kernels.cross_entropy_and_gradient(
            output, self.decoder.head, batch.labels[rows], batch.weights[rows], self.tensor
        )
        return loss, _InFlight(pull, gradient)

    def _backward(self, done: _InFlight) -> None:
        if not self.pipeline.is_last:
            self.pipeline.receive(False, done.gradient)
        gradient = done.pull(done.gradient)
        if not self.pipeline.is_first:
            self.pipeline.send(False, gradient)

    def _output(
        self, batch: MicroBatch, rows: np.ndarray, differentiable: bool, attention: Attention | None = None
    ) -> tuple[Tensor, Pullback]:
        routing = self.balancing.of(batch)
        if self.tensor.sequence:
            batch = padded(batch, self.tensor.ranks.size)
        x = None
        if not self.pipeline.is_first:
            tokens = len(batch.tokens) // (self.tensor.ranks.size if self.tensor.sequence else 1)
            x = self.pipeline.receive(True, mint.empty((tokens, self.decoder.config.hidden_size), dtype=self.dtype))
        return self.decoder.forward(batch, rows, x, differentiable, attention, routing)
