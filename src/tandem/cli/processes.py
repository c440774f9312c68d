"""Runs one command as several processes: `--nproc-per-node`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence

from tandem.backends import launcher_of
from tandem.config.settings import LaunchSettings, Settings
from tandem.errors import UserError
from tandem.launch.member import JOB
from tandem.launch.supervisor import JobEnd, Machines, launch, show_at_once
from tandem.launch.world import World


def run_training(command: str, argv: Sequence[str], settings: Settings, notices: Sequence[str]) -> int:
    """Train with the processes that the settings ask for, or only check with `--dry-run`. Returns the exit code."""
    options, framework = settings.launch, settings.training.ai_framework
    if not options.dry_run and (code := run_as_processes(command, argv, options, framework)) is not None:
        return code
    if World.from_environment().rank == 0:
        for notice in notices:
            print(f"> {notice}")
    if options.dry_run:
        from tandem.training.start.dry_run import dry_run  # imported late: a wrong command fails before this loads

        dry_run(settings, processes_of(options))
    else:
        from tandem.training.run import train

        train(settings)
    return 0


def run_as_processes(command: str, argv: Sequence[str], settings: LaunchSettings, ai_framework: str) -> int | None:
    """Run `tandem COMMAND ARGV` with the processes that the settings ask for, and wait for them.

    Returns:
        The exit code of the job. None when this process must do the work, alone or as one process of a job.
    """
    end = start_processes([command, *argv], settings, ai_framework)
    if end is None:
        return None
    if end.text:
        print(end.text, file=sys.stderr, flush=True)
    return end.code


def start_processes(
    words: Sequence[str], settings: LaunchSettings, ai_framework: str, show: Callable[[str], None] = show_at_once
) -> JobEnd | None:
    """Run `tandem WORDS` with the processes that the settings ask for, and wait for them.

    Args:
        show: called with each new piece of the first rank's output.

    Returns:
        How the job ended. None when this process must do the work, alone or as one process of a job.
    """
    machines = machines_of(settings)
    if machines is None or machines.processes == 1 or JOB in os.environ or World.from_environment().size > 1:
        return None
    return launch(machines, launcher_of(ai_framework), ["-m", "tandem", *words], settings.log_dir, show)


def processes_of(settings: LaunchSettings) -> int:
    """The number of processes of the run, whether they are started or not."""
    machines = machines_of(settings)
    return machines.processes if machines else World.from_environment().size


def machines_of(settings: LaunchSettings) -> Machines | None:
    """The processes to start on each machine; None without `--nproc-per-node`.

    Raises:
        UserError: `--nnodes` or `--node-rank` is given without `--nproc-per-node`.
    """
    if settings.nproc_per_node is None:
        if (settings.nnodes, settings.node_rank) != (1, 0) and World.from_environment().size == 1:
            given = f"--nnodes {settings.nnodes} --node-rank {settings.node_rank}"
            raise UserError(f"{given}: also give --nproc-per-node, the number of processes on this machine")
        return None
    return Machines(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Machines)})
