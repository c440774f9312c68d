"""`tandem rerun`: repeat a recorded training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tandem.cli.arguments import parse
from tandem.cli.processes import run_as_processes
from tandem.config.parsing import from_dict
from tandem.config.settings import LaunchSettings
from tandem.launch.world import started_processes
from tandem.training.rerun import RerunOptions, rerun
from tandem.training.run_record import RUN_FILE, read_starts

DESCRIPTION = (
    "Repeat the training that run.json in a --save folder records, with the same number of processes. Compares every "
    "loss with metrics.jsonl in that folder."
)


def run(argv: Sequence[str]) -> int:
    options = parse(RerunOptions, "rerun", DESCRIPTION, argv)
    start = read_starts(options.run)[0]
    settings = from_dict(start["settings"], RUN_FILE)
    if options.nproc_per_node is not None or started_processes() is None:
        processes = start["processes"] if options.nproc_per_node is None else options.nproc_per_node
        settings = dataclasses.replace(settings, launch=LaunchSettings(nproc_per_node=processes))
        if (code := run_as_processes("rerun", argv, settings)) is not None:
            return code
    result = rerun(options)
    if result.steps:
        off = f"at most {result.difference:.3g} off, at iteration {result.worst}" if result.difference else "identical"
        print(f"losses of {result.steps} steps: {off}")
    return 0
