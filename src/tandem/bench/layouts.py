"""Layouts to measure, by names such as `tp2-dp4-sp-distopt`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.options import as_typed
from tandem.parallel.layout import Layout
from tandem.planning.job import Job

ONE_PROCESS = "dp1"
# Ranks of each kind, and the number that counts them.
SIZES = {"tp": "tensor", "pp": "pipeline", "dp": "data", "ep": "expert"}
SWITCHES = {
    "sp": "--sequence-parallel",
    "distopt": "--use-distributed-optimizer",
    "overlap": "--overlap-grad-reduce --overlap-param-gather",
    "fsdp2": "--use-torch-fsdp2",
}
# A pipeline's stages wait at the beginning and the end of a step: with so many micro-batches for each stage, at most a
# fifth of the time.
MICRO_BATCHES_OF_A_STAGE = 4


@dataclass(frozen=True)
class Spread:
    """How a model is trained on some processes.

    Attributes:
        sizes: ranks of each kind, by its key in SIZES; 1 where it has none.
        switches: keys of SWITCHES.
    """

    name: str
    sizes: dict[str, int] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()

    @classmethod
    def named(cls, name: str) -> Spread:
        """The layout that `--layouts` names.

        >>> Spread.named("tp2-dp4-sp").processes
        8

        Raises:
            UserError: a part of the name is unknown, or there twice, or has no effect.
        """
        sizes: dict[str, int] = {}
        switches: set[str] = set()
        for word in name.split("-"):
            number = re.fullmatch(r"([a-z]+)([1-9][0-9]{0,5})", word)
            if number and number[1] in SIZES and number[1] not in sizes:
                sizes[number[1]] = int(number[2])
            elif word in SWITCHES and word not in switches:
                switches.add(word)
            else:
                raise UserError(
                    f"--layouts {name}: {word!r} is unknown, or there twice; expected parts such as tp2, pp2, dp4 or "
                    f"ep4, and {', '.join(SWITCHES)}, joined by -"
                )
        made = cls(name, sizes, frozenset(switches))
        for word, needed in (("sp", "tp"), ("distopt", "dp"), ("overlap", "dp"), ("fsdp2", "dp")):
            if word in switches and made.size(needed) == 1:
                raise UserError(f"--layouts {name}: {word} has no effect without {needed}2 or more")
        return made

    def size(self, kind: str) -> int:
        return self.sizes.get(kind, 1)

    @property
    def processes(self) -> int:
        return self.size("tp") * self.size("pp") * self.size("dp")

    @property
    def layout(self) -> Layout:
        return Layout(
            tensor_model_parallel_size=self.size("tp"),
            pipeline_model_parallel_size=self.size("pp"),
            expert_model_parallel_size=self.size("ep"),
        )

    @property
    def sharding(self) -> dict[str, Any]:
        """What ranks split between them: fields of `ShardingSettings`, without the overlaps."""
        return {
            "sequence_parallel": "sp" in self.switches,
            "use_distributed_optimizer": "distopt" in self.switches,
            "use_torch_fsdp2": "fsdp2" in self.switches,
        }

    @property
    def overlaps(self) -> dict[str, Any]:
        """When data ranks communicate: the other fields."""
        overlaps = "overlap" in self.switches
        return {
            "overlap_grad_reduce": overlaps,
            "overlap_param_gather": overlaps and "distopt" in self.switches,
        }

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, on each data rank."""
        stages = self.size("pp")
        return 1 if stages == 1 else MICRO_BATCHES_OF_A_STAGE * stages

    def job(self, config: ModelConfig, *, micro_batch_size: int, seq_length: int, half: bool, framework: str) -> Job:
        """A step of a benchmark, as plans take it."""
        return Job(
            config=config,
            layout=self.layout.balanced(config.num_layers),
            data_parallel_size=self.size("dp"),
            **self.sharding,
            micro_batch_size=micro_batch_size,
            global_batch_size=micro_batch_size * self.size("dp") * self.micro_batches,
            seq_length=seq_length,
            half=half,
            ai_framework=framework,
        )

    def check(self, config: ModelConfig, size: str, framework: str) -> None:
        """Raise UserError where a model of this size cannot be laid out so."""
        try:
            self.job(config, micro_batch_size=1, seq_length=1, half=False, framework=framework).check(in_short)
        except UserError as error:
            raise UserError(f"--layouts {self.name}, {size}: {error}") from None


def in_short(name: str, value: Any) -> str:
    """A field of a layout as a layout's name has it.

    >>> in_short("tensor_model_parallel_size", 4)
    'tp4'
    """
    short = {f"{kind}_model_parallel_size": short for short, kind in SIZES.items()}.get(name)
    return as_typed(name, value) if short is None else f"{short}{'' if value is None else value}"


def sensible(devices: int) -> Iterator[str]:
    """One process, and what is worth knowing of a machine with so many devices.

    >>> list(sensible(1)), list(sensible(4))
    (['dp1'], ['dp1', 'dp4-distopt-overlap', 'tp4-sp', 'tp2-dp2-sp-distopt-overlap'])
    """
    yield ONE_PROCESS
    if devices > 1:
        yield f"dp{devices}-distopt-overlap"
        yield f"tp{devices}-sp"
    if devices > 2 and devices % 2 == 0:
        yield f"tp2-dp{devices // 2}-sp-distopt-overlap"


def default_layouts(devices: int, configs: dict[str, ModelConfig], framework: str) -> tuple[str, ...]:
    """Those of the sensible layouts that every size takes."""

    def fits(name: str) -> bool:
        try:
            check_layouts([name], configs, framework)
        except UserError:
            return False
        return True

    return tuple(name for name in sensible(devices) if fits(name))


def check_layouts(names: Sequence[str], configs: dict[str, ModelConfig], framework: str) -> None:
    """Raise UserError where one of the sizes cannot be laid out as one of the names says."""
    for name in names:
        spread = Spread.named(name)
        for size, config in configs.items():
            spread.check(config, size, framework)
