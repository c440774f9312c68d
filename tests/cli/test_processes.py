"""Who starts the processes of `--nproc-per-node`: the flag goes before what the environment says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.cli.processes import machines_to_start
from tandem.config.settings import Settings
from tandem.errors import UserError
from tandem.launch.member import JOB, JOINED, tell_stage
from tandem.launch.world import World, forget_launchers, is_scheduler

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
MSRUN = {"MS_WORKER_NUM": "2", "RANK_ID": "1", "DEVICE_ID": "1", "MS_ROLE": "MS_WORKER"}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict(os.environ)
    forget_launchers(names)
    for name in os.environ.keys() - names.keys():
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "8", "RANK": "3"},
        {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3"},
        {"MS_WORKER_NUM": "8", "MS_ROLE": "MS_WORKER", "DEVICE_ID": "5"},
        {"MS_ROLE": "MS_SCHED", "MS_SCHED_HOST": "10.0.0.1"},
        {"PET_NNODES": "4"},
    ],
    ids=str,
)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_flag_goes_before_variables_of_other_jobs(
    variables: dict[str, str], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    machines = machines_to_start(Settings(nproc_per_node=processes))
    assert machines is not None
    assert machines.processes == processes
    assert World.from_environment() == World()
    assert not is_scheduler()
    assert variables.keys() & os.environ.keys() <= {"DEVICE_ID"}  # it chooses a device


@pytest.mark.parametrize("variables", [TORCHRUN, MSRUN])
def test_a_process_of_such_a_job_starts_none(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machines_to_start(Settings(nproc_per_node=2)) is None
    assert World.from_environment() == World(rank=1, size=2, local_rank=1)


def test_the_scheduler_of_msrun_is_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files were those of rank 0. When both wrote one at a time, one of them failed."""
    monkeypatch.setenv(JOB, str(tmp_path))
    for name, value in {**MSRUN, "MS_ROLE": "MS_SCHED"}.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(rank=-1, size=2)
    tell_stage(JOINED)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    tell_stage(JOINED)
    assert [path.name for path in tmp_path.iterdir()] == ["rank_1.stage"]


def test_another_number_than_torchruns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="already started 2 processes") as error:
        machines_to_start(Settings(nproc_per_node=4))
    assert error.value.flags == ("--nproc-per-node", "--nnodes")


def test_another_number_than_msruns_is_refused(tmp_path: Path) -> None:
    """msrun's variables may be left from another job; it is known by its name."""
    msrun = tmp_path / "msrun"
    msrun.write_text("import subprocess, sys\nsys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))\n")
    flags = ["pretrain", "--nproc-per-node", "4", "--data-path", "none", "--init", "random"]
    command = [sys.executable, str(msrun), "-m", "tandem", *flags]
    done = subprocess.run(command, env={**os.environ, **MSRUN}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "already started 2 processes" in done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({**MSRUN, "WORLD_SIZE": "16", "RANK": "9"}, World(1, 2, 1)),
        ({**TORCHRUN, "MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "9", "TORCHELASTIC_RUN_ID": "none"}, World(1, 2, 1)),
    ],
    ids=["msrun under a job runner", "torchrun after msrun"],
)
def test_the_launchers_own_variables_go_first(variables: dict[str, str], expected: World) -> None:
    assert World.from_environment(variables) == expected
