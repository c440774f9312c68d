"""`tandem rerun`: a recorded run once more, its losses compared step by step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from tandem.config.parsing import from_dict
from tandem.config.settings import LoggingSettings, Settings
from tandem.data.record import record_of
from tandem.errors import UserError
from tandem.launch.world import World
from tandem.logs import log
from tandem.options import Options, PathText, positional
from tandem.training.logs.log import StepRecord
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from tandem.training.run import train
from tandem.training.run_record import RUN_FILE, code_version, read_starts, versions


@dataclass(frozen=True)
class RerunOptions(Options):
    """Options of `tandem rerun`."""

    run: PathText = field(metadata=positional("RUN"))
    """--save folder of the recorded run."""
    _: KW_ONLY
    save: PathText | None = None
    """Folder for the new run; default: nothing is kept."""
    tolerance: float = 0.0
    """How far a loss may be from the recorded one; 0 asks for the same bits."""
    deterministic_mode: bool = False
    """Run with --deterministic-mode, also where the recorded run did not."""
    nproc_per_node: int | None = None
    """Processes to start on this machine; default: as many as the run had. A launcher's own count instead."""


@dataclass(frozen=True)
class Comparison:
    """`worst` is the iteration whose loss is furthest off, by `difference`; 0 when all are equal to the bit."""

    steps: int
    worst: int
    difference: float


def rerun(options: RerunOptions) -> Comparison:
    """Train again with the settings of a run's first start, from its weights and data, over its recorded steps.

    Raises:
        UserError: the folder records no run, its data or weights are not as they were, or a loss is further off than
            the tolerance.
    """
    folder = options.run
    starts = read_starts(folder)
    start = starts[0]
    metrics = read_metrics(Path(folder) / METRICS_FILE)
    recorded = {line["iteration"]: line["loss"] for line in metrics if line["loss"] is not None}
    if not recorded:
        raise UserError(f"{folder}/{METRICS_FILE} holds no step to compare with")
    save = os.path.abspath(options.save) if options.save else None
    if save == os.path.abspath(folder):
        raise UserError(f"--save {options.save} is the run itself: choose another folder")
    if World.from_environment().rank == 0:
        for notice in differences(starts):
            log.info("> %s", notice)
    again: dict[int, float] = {}

    def keep(record: StepRecord) -> None:
        again[record.iteration] = record.loss

    os.chdir(start["directory"])  # the settings' paths are relative to it
    check_data(start)
    train(settings_again(start, save, max(recorded), options.deterministic_mode), keep)
    return compare(recorded, again, options.tolerance) if again else Comparison(0, 0, 0.0)


def settings_again(start: dict[str, Any], save: str | None, last: int, deterministic: bool) -> Settings:
    """The recorded settings, from the same weights, up to iteration `last`, with no log but the new folder's."""
    settings = from_dict(start["settings"], RUN_FILE)
    training = dataclasses.replace(
        settings.training,
        exit_interval=last if last < settings.training.length.iterations else None,
        deterministic_mode=settings.training.deterministic_mode or deterministic,
    )
    weights, load = start["weights"], settings.checkpoint.load
    if weights["ckpt_step"] is not None:  # that one, though the folder may have newer ones, or be the run's own
        load = str(Path(weights["location"]).parent)
    checkpoint = dataclasses.replace(settings.checkpoint, save=save, load=load, ckpt_step=weights["ckpt_step"])
    logging = LoggingSettings(
        log_interval=settings.logging.log_interval, log_throughput=settings.logging.log_throughput
    )
    return dataclasses.replace(settings, training=training, checkpoint=checkpoint, logging=logging)


def differences(starts: list[dict[str, Any]]) -> Iterator[str]:
    """What is not as it was when the run began."""
    start = starts[0]
    if len(starts) > 1:
        resumed = ", ".join(str(other["iteration"]) for other in starts[1:])
        yield f"the run was resumed at iteration {resumed}; it is run again without stopping, with its first settings"
    now = versions()
    for name in sorted({*start["versions"], *now}):
        if start["versions"].get(name) != now.get(name):
            yield f"{name} was {start['versions'].get(name)}, is {now.get(name)}"
    if start["code"] != code_version():
        yield f"the code was {start['code']}, is {code_version()}"
    if start["processes"] != World.from_environment().size:
        yield f"processes were {start['processes']}, are {World.from_environment().size}"


def check_data(start: dict[str, Any]) -> None:
    """Raise UserError when a record beside the data is another than the run had."""
    for prefix, record in start["data"].items():
        if record_of(prefix) != record:
            raise UserError(f"{prefix}: its record is not the one that the run had: the data were made again since")


def compare(recorded: dict[int, float], again: dict[int, float], tolerance: float) -> Comparison:
    """The losses of the steps that both have.

    Raises:
        UserError: one is further off than `tolerance`; the first such step is named.
    """
    both = sorted(recorded.keys() & again.keys())
    off = {iteration: abs(recorded[iteration] - again[iteration]) for iteration in both}
    for iteration in both:
        if not off[iteration] <= tolerance:
            raise UserError(
                f"iteration {iteration}: the loss was {recorded[iteration]!r}, is {again[iteration]!r}, further off "
                f"than --tolerance {tolerance}. Other devices, layouts or thread counts add in another order: give a "
                f"tolerance; on the same device, --deterministic-mode in both runs"
            )
    worst = max(both, key=lambda iteration: off[iteration])
    return Comparison(len(both), worst, off[worst])
