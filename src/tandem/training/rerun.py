"""`tandem rerun`: repeats a recorded run and compares the losses step by step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from tandem.config.parsing import from_dict
from tandem.config.settings import LoggingSettings, Settings, TaskSettings
from tandem.data.record import record_of
from tandem.errors import UserError
from tandem.files.places import same_place
from tandem.launch.world import World
from tandem.logs import log
from tandem.options import Options, PathText, positional
from tandem.training.logs.log import StepRecord, log_notice
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
    """Folder for the new run; default: nothing is saved."""
    tolerance: float = 0.0
    """Largest allowed difference between a loss and the recorded one; 0 means the same bits."""
    deterministic_mode: bool = False
    """Use --deterministic-mode even if the recorded run did not."""
    nproc_per_node: int | None = None
    """Number of processes to start on this machine; default: as many as the run had. Not used under torchrun or
    msrun."""


@dataclass(frozen=True)
class Comparison:
    """The result of a rerun.

    Attributes:
        steps: number of compared steps.
        worst: the iteration whose loss differs most.
        difference: of that loss; 0 when all losses have the same bits.
    """

    steps: int
    worst: int
    difference: float


def rerun(options: RerunOptions) -> Comparison:
    """Repeat the recorded steps of a run, with the settings, weights and data of its first start.

    Raises:
        UserError: the folder records no run, its data or weights have changed, or a loss differs by more than the
            tolerance.
    """
    folder = options.run
    starts = read_starts(folder)
    start = starts[0]
    metrics = read_metrics(Path(folder) / METRICS_FILE)
    recorded = {line["iteration"]: line["loss"] for line in metrics if line["loss"] is not None}
    if not recorded:
        raise UserError(f"{folder}/{METRICS_FILE} contains no step to compare with")
    save = os.path.abspath(options.save) if options.save else None
    if save is not None and same_place(save, folder):
        raise UserError(f"--save {options.save} is the run itself: choose another folder")
    if World.from_environment().rank == 0:
        for notice in differences(starts):
            log.info("> %s", notice)
    repeated: dict[int, float] = {}

    def keep(record: StepRecord) -> None:
        repeated[record.iteration] = record.loss

    if os.path.isdir(start["directory"]):
        os.chdir(start["directory"])  # paths in the settings are relative to it
    else:
        log_notice(f"{start['directory']}, where the run was started, is gone: relative paths begin at {os.getcwd()}")
    check_data(start)
    train(settings_again(start, save, max(recorded), options.deterministic_mode), keep)
    return compare(recorded, repeated, options.tolerance) if repeated else Comparison(0, 0, 0.0)


def settings_again(start: dict[str, Any], save: str | None, last: int, deterministic: bool) -> Settings:
    """The recorded settings, with the same weights, up to iteration `last`. Logs are only written to `save`."""
    settings = from_dict(start["settings"], RUN_FILE)
    training = dataclasses.replace(
        settings.training,
        exit_interval=last if last < settings.training.length.iterations else None,
        deterministic_mode=settings.training.deterministic_mode or deterministic,
    )
    weights, load = start["weights"], settings.checkpoint.load
    if weights["ckpt_step"] is not None:  # this iteration, even if the folder now has newer ones
        load = str(Path(weights["location"]).parent)
    checkpoint = dataclasses.replace(settings.checkpoint, save=save, load=load, ckpt_step=weights["ckpt_step"])
    lora = settings.lora
    if "adapters" in weights:
        lora = dataclasses.replace(lora, lora_load=weights["adapters"]["location"])
    logging = LoggingSettings(
        log_interval=settings.logging.log_interval, log_throughput=settings.logging.log_throughput
    )
    return dataclasses.replace(
        settings, training=training, checkpoint=checkpoint, lora=lora, logging=logging, evaluation=TaskSettings()
    )


def differences(starts: list[dict[str, Any]]) -> Iterator[str]:
    """Notices about what has changed since the run began."""
    start = starts[0]
    if len(starts) > 1:
        resumed = ", ".join(str(other["iteration"]) for other in starts[1:])
        yield f"the run was resumed at iteration {resumed}; the rerun does not stop there, and keeps the first settings"
    now = versions()
    for name in sorted({*start["versions"], *now}):
        if start["versions"].get(name) != now.get(name):
            yield f"{name} was {start['versions'].get(name)}, is {now.get(name)}"
    if start["code"] != code_version():
        yield f"the code was {start['code']}, is {code_version()}"
    if start["processes"] != World.from_environment().size:
        yield f"processes were {start['processes']}, are {World.from_environment().size}"


def check_data(start: dict[str, Any]) -> None:
    """Raise UserError when a record next to the data has changed since the run."""
    for prefix, record in start["data"].items():
        if record_of(prefix) != record:
            raise UserError(f"{prefix}: the record has changed since the run: the data were preprocessed again")


def compare(recorded: dict[int, float], repeated: dict[int, float], tolerance: float) -> Comparison:
    """Compare the losses of all steps that both runs have.

    >>> compare({1: 5.0, 2: 4.0}, {1: 5.0, 2: 4.25}, tolerance=0.5)
    Comparison(steps=2, worst=2, difference=0.25)

    Raises:
        UserError: a loss differs by more than `tolerance`. The error names the first such step.
    """
    steps = sorted(recorded.keys() & repeated.keys())
    differences = {iteration: abs(recorded[iteration] - repeated[iteration]) for iteration in steps}
    for iteration in steps:
        if not differences[iteration] <= tolerance:
            raise UserError(
                f"iteration {iteration}: the loss was {recorded[iteration]!r}, is {repeated[iteration]!r}. The "
                f"difference is larger than --tolerance {tolerance}. Other devices, layouts or numbers of threads add "
                f"in another order: give a --tolerance. On the same device, use --deterministic-mode in both runs"
            )
    worst = max(steps, key=lambda iteration: differences[iteration])
    return Comparison(len(steps), worst, differences[worst])
