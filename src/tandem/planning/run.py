"""`tandem plan`: what one layout needs and how fast it may be, or the layouts that fit a number of devices."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.planning.hardware import Hardware
from tandem.planning.job import Job
from tandem.planning.memory import StageMemory, stage_memories
from tandem.planning.options import PlanOptions
from tandem.planning.search import Plan, suggest
from tandem.planning.speed import Speed, estimate
from tandem.planning.traffic import Traffic, stage_traffic


@dataclass(frozen=True)
class LayoutPlan:
    """One layout.

    Attributes:
        memories, traffic: of one rank of each pipeline stage, in bytes.
        speed: seconds of a step, by part, and tokens per second.
    """

    job: Job
    hardware: Hardware
    memories: list[StageMemory]
    traffic: list[Traffic]
    speed: Speed

    @property
    def peak(self) -> float:
        """Bytes of the rank that needs the most memory."""
        return max(memory.peak for memory in self.memories)

    @property
    def fits(self) -> bool:
        return self.peak <= self.hardware.capacity


@dataclass(frozen=True)
class Suggestions:
    """Layouts for a number of devices.

    Attributes:
        job: what they have in common.
        plans: those that fit, fastest first.
        rejected: reason -> the tensor and pipeline sizes that are left out for it.
    """

    job: Job
    hardware: Hardware
    plans: list[Plan]
    rejected: dict[str, list[tuple[int, int]]]


def plan(options: PlanOptions) -> LayoutPlan | Suggestions:
    """Plan one layout; with `devices`, look for layouts.

    Raises:
        UserError: the model is unknown, or the layout does not divide.
    """
    hardware, job = options.device, options.job()
    hardware.flops(job.half)  # raises for a device without fast half precision
    if options.devices is not None:
        return Suggestions(job, hardware, *suggest(job, hardware, options.devices))
    job.check()
    traffic = [stage_traffic(job, stage) for stage in range(job.pipeline_size)]
    return LayoutPlan(job, hardware, stage_memories(job, hardware), traffic, estimate(job, hardware))
