"""Runs one command as several processes: `--nproc-per-node`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from tandem.backends import launcher_of
from tandem.config.settings import Settings
from tandem.errors import UserError
from tandem.launch import run_module
from tandem.launch.machines import Machines
from tandem.launch.member import JOB
from tandem.launch.supervisor import JobEnd, launch, show_at_once
from tandem.launch.world import World, forget_launchers, is_launched, started_processes


def run_training(command: str, argv: Sequence[str], settings: Settings, notices: Sequence[str]) -> int:
    """Train with the processes that the settings ask for, or only check with `--dry-run`. Returns the exit code."""
    machines = machines_to_start(settings)
    if machines and not settings.launch.dry_run and (end := start_processes([command, *argv], settings, machines)):
        return say_end(end)
    if World.from_environment().rank == 0:
        for notice in notices:
            print(f"> {notice}")
    if settings.launch.dry_run:
        from tandem.training.start.dry_run import dry_run  # imported late: a wrong command fails before this loads

        dry_run(settings, machines.processes if machines else World.from_environment().size)
    else:
        from tandem.training.run import train

        train(settings)
    return 0


def run_as_processes(command: str, argv: Sequence[str], settings: Settings, streams: Sequence[int] = ()) -> int | None:
    """Run `tandem COMMAND ARGV` with the processes that the settings ask for, and wait for them.

    Args:
        streams: standard streams of this process for the first one of the job (`tandem.launch.supervisor.launch`).

    Returns:
        The exit code of the job. None when this process must do the work, alone or as one process of a job.
    """
    machines = machines_to_start(settings)
    end = start_processes([command, *argv], settings, machines, streams=streams) if machines else None
    return say_end(end) if end else None


def say_end(end: JobEnd) -> int:
    """Say why a job failed, if it did. Returns its exit code."""
    if end.text:
        print(end.text, file=sys.stderr, flush=True)
    return end.code


def start_processes(
    words: Sequence[str],
    settings: Settings,
    machines: Machines,
    show: Callable[[str], None] = show_at_once,
    streams: Sequence[int] = (),
) -> JobEnd | None:
    """Run `tandem WORDS` with these processes, and wait for them.

    Args:
        show, streams: see `tandem.launch.supervisor.launch`.

    Returns:
        How the job ended. None when there is one process only: this one must do the work.
    """
    if machines.processes == 1:
        return None
    launcher = launcher_of(settings.training.ai_framework)
    module = run_module.command("tandem", *words)
    return launch(machines, launcher, module, settings.launch.log_dir, show, streams=streams)


def machines_to_start(settings: Settings) -> Machines | None:
    """The processes to start on each machine. None without `--nproc-per-node`, and in a process of a job.

    The flag goes before variables such as WORLD_SIZE, which a job runner has set or an earlier job has left: they are
    removed from this process's environment.

    Raises:
        UserError: `--nnodes` or `--node-rank` is given without `--nproc-per-node`, or another number of processes than
            torchrun or msrun has started.
    """
    given = settings.launch
    if JOB in os.environ:
        return None
    if given.nproc_per_node is None:
        if (given.nnodes, given.node_rank) != (1, 0) and World.from_environment().size == 1:
            raise UserError(
                f"--nnodes {given.nnodes} --node-rank {given.node_rank}: also give --nproc-per-node, the number of "
                f"processes on this machine"
            )
        return None
    machines = Machines(
        nproc_per_node=given.nproc_per_node,
        nnodes=given.nnodes,
        node_rank=given.node_rank,
        master_addr=given.master_addr,
        master_port=given.master_port,
        timeout_minutes=settings.parallel.distributed_timeout_minutes,
    )
    started = started_processes()
    if started == machines.processes > 1:
        return None
    if started is not None and is_launched():
        raise UserError(
            f"--nproc-per-node {given.nproc_per_node} --nnodes {given.nnodes}: torchrun or msrun has already started "
            f"{started} processes; leave out these flags, or start tandem without torchrun and msrun"
        )
    forget_launchers()
    return machines
