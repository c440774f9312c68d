"""How long a run is, in steps and in samples, with a batch size that is constant or ramped up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """The batch size of each step. It grows from `start` to `final` by `increment`, over the first `ramp_samples`
    samples.

    Source: `RampupBatchsizeNumMicroBatchesCalculator` of Megatron-core.

    >>> sizes = BatchSizes(final=8, start=2, increment=2, ramp_samples=30)
    >>> [sizes.at(consumed) for consumed in (0, 10, 20, 31)]
    [2, 4, 6, 8]
    """

    final: int
    start: int
    increment: int = 1
    ramp_samples: int = 0

    def at(self, consumed_samples: int) -> int:
        """Samples of the step that starts after `consumed_samples`."""
        increments = (self.final - self.start) // self.increment
        if not increments or consumed_samples > self.ramp_samples or not self.ramp_samples:
            return self.final
        return self.start + int(consumed_samples / (self.ramp_samples / increments)) * self.increment

    def iterations(self, train_samples: int, consumed: int = 0) -> tuple[int, int]:
        """Steps that are left of a run of about `train_samples` after `consumed` samples, and its samples at the end.
        Source: `update_train_iters` of Megatron-LM: whole steps of the final size after the ramp.
        """
        iterations = 0
        if self.start != self.final:
            while consumed <= min(self.ramp_samples, train_samples):
                consumed += self.at(consumed)
                iterations += 1
        rest = max(0, train_samples - consumed) // self.final
        return iterations + rest, consumed + rest * self.final

    def consumed_after(self, iterations: int, consumed_samples: int) -> int:
        """Samples consumed after `iterations` more steps."""
        while iterations and self.at(consumed_samples) != self.final:
            consumed_samples += self.at(consumed_samples)
            iterations -= 1
        return consumed_samples + iterations * self.final


@dataclass(frozen=True)
class RunLength:
    """The length of a run: either `train_iters` or `train_samples` is given.

    >>> RunLength(BatchSizes(final=4, start=4), train_samples=10).iterations
    2
    """

    batch_sizes: BatchSizes
    train_iters: int | None = None
    train_samples: int | None = None

    @property
    def iterations(self) -> int:
        """Steps of the whole run."""
        return self.iterations_from(0, 0)

    @property
    def samples(self) -> int:
        """Samples that the whole run consumes."""
        if self.train_iters is not None:
            return self.train_iters * self.batch_sizes.final
        assert self.train_samples is not None
        return self.batch_sizes.iterations(self.train_samples)[1]

    def iterations_from(self, iteration: int, consumed_samples: int) -> int:
        """Steps of the whole run when it resumes at this point, perhaps with another batch size."""
        if self.train_iters is not None:
            return self.train_iters
        assert self.train_samples is not None
        return iteration + self.batch_sizes.iterations(self.train_samples, consumed_samples)[0]

    def samples_from(self, iteration: int, consumed_samples: int) -> int:
        """Samples of the whole run when it resumes at this point."""
        steps_left = max(0, self.iterations_from(iteration, consumed_samples) - iteration)
        return self.batch_sizes.consumed_after(steps_left, consumed_samples)
