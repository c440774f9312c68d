"""The order in which a pipeline stage computes: one forward, one backward (1F1B), plain or interleaved.

Pure functions; both backends follow the same list. Source: "Efficient Large-Scale Language Model Training on GPU
Clusters Using Megatron-LM" (arXiv 2104.04473), section 2.2, and Megatron-core's `pipeline_parallel/schedules.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from tandem.errors import UserError


@dataclass(frozen=True)
class Action:
    """The forward or backward pass of one micro-batch through one of the stage's chunks."""

    forward: bool
    chunk: int
    micro_batch: int


def one_forward_one_backward(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Action]:
    """What `stage` of `stages` does with `chunks` chunks of layers, in order.

    >>> actions = one_forward_one_backward(stage=0, stages=2, chunks=1, micro_batches=3)
    >>> " ".join(f"{'F' if action.forward else 'B'}{action.micro_batch}" for action in actions)
    'F0 F1 B0 F2 B1 B2'

    Raises:
        UserError: stages are interleaved, and the number of micro-batches is not a multiple of the stages.
    """
    if chunks > 1 and micro_batches % stages:
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage: each data rank has {micro_batches} micro-batches, which is not "
            f"a multiple of the {stages} pipeline stages; change --global-batch-size or --micro-batch-size"
        )
    total = micro_batches * chunks
    ahead = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    warm_up = min(ahead, total)
    forward = [Action(True, *_position(step, stages, chunks)) for step in range(total)]
    backward = []
    for step in range(total):
        chunk, micro_batch = _position(step, stages, chunks)
        backward.append(Action(False, chunks - 1 - chunk, micro_batch))
    steady: Iterator[Action] = chain.from_iterable(zip(forward[warm_up:], backward))
    return [*forward[:warm_up], *steady, *backward[total - warm_up :]]


def _position(step: int, stages: int, chunks: int) -> tuple[int, int]:
    """Chunk and micro-batch of the `step`-th forward pass. Chunks take turns, each with `stages` micro-batches."""
    if chunks == 1:
        return 0, step
    round_, within = divmod(step, stages * chunks)
    return within // stages, round_ * stages + within % stages


def most_on_the_way(stages: int) -> int:
    """How many activations, or gradients, a stage can have sent that have not arrived, at most.

    It goes on only with what depends on those before. The test runs every schedule with receivers as late as possible.
    """
    return 2 * stages


@dataclass(frozen=True)
class Link:
    """Where a chunk's output goes, or its input comes from: another stage's chunk."""

    stage: int
    chunk: int


def before(stage: int, chunk: int, stages: int) -> Link | None:
    """The chunk whose output is this one's input; None for the first of the model."""
    if stage > 0:
        return Link(stage - 1, chunk)
    return Link(stages - 1, chunk - 1) if chunk > 0 else None


def after(stage: int, chunk: int, stages: int, chunks: int) -> Link | None:
    """The chunk whose input is this one's output; None for the last of the model."""
    if stage < stages - 1:
        return Link(stage + 1, chunk)
    return Link(0, chunk + 1) if chunk < chunks - 1 else None


def pairs(stages: int, *, forward: bool, around: bool, ends: bool) -> list[tuple[int, int]]:
    """The stages that send to each other in a group of `Groups.pipelines`: sender and receiver.

    Args:
        ends: the first and the last stage share a weight, and exchange its gradients.

    >>> pairs(3, forward=True, around=False, ends=True)
    [(0, 1), (1, 2), (0, 2)]
    """
    if around:
        found = [(stages - 1, 0)]
    else:
        found = [(stage, stage + 1) for stage in range(stages - 1)]
        found += [(0, stages - 1)] if ends and stages > 2 else []
    return found if forward else [(receiver, sender) for sender, receiver in found]
