"""How a process ends that may be one of several."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.launch.machines import free_port
from tandem.launch.member import Ended, read_record

RANK = Path(__file__).with_name("late_threads.py")
PROGRAM = """
import atexit, sys, threading, time
from tandem.launch.member import exit_with

def wait():
    time.sleep(0.2)
    print("its thread has ended")

def main():
    threading.Thread(target=wait).start()
    {ending}

atexit.register(print, "what it registered has run")
exit_with(main)
"""
ONE_OF_TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


def test_threads_of_gloo_that_are_late_do_not_abort_a_rank() -> None:
    require_framework("torch")
    port = str(free_port("127.0.0.1"))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), "3"],
            env={**os.environ, **ONE_OF_TWO, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost"}
            | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert (rank.returncode, out) == (3, "functions that were registered have run\n"), err


@pytest.mark.parametrize("environment", [{}, ONE_OF_TWO], ids=["alone", "one of two"])
@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("return None", 0, ""),
        ("return 75", 75, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('no such file')", 1, "no such file"),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken"),
    ],
)
def test_one_of_several_ends_as_a_process_alone_does(
    environment: dict[str, str], ending: str, code: int, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending=ending)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (code, [said] if said else [])
    assert done.stdout.splitlines() == ["its thread has ended", "what it registered has run"]


def test_a_scheduler_whose_port_was_taken_says_so_for_the_first_rank(tmp_path: Path) -> None:
    """The ranks of the job waited for it, up to --distributed-timeout-minutes."""
    require_framework("mindspore")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        job = {"TANDEM_JOB": str(tmp_path), "TANDEM_SUPERVISOR": str(os.getpid()), "TANDEM_NODE": "0"}
        role = {"MS_ROLE": "MS_SCHED", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": port, "MS_WORKER_NUM": "2"}
        words = [sys.executable, "-m", "tandem", "pretrain", "--nproc-per-node", "2"]
        end = subprocess.run(words, env={**os.environ, **job, **role}, timeout=120, check=False)
    assert end.returncode == 2
    record = read_record(tmp_path, 0)
    assert isinstance(record, Ended)
    assert (record.rank, record.code) == (0, 2)
    assert record.text.startswith(f"tandem pretrain: error: --master-port {port} on 127.0.0.1 is in use")


def test_free_ports_are_none_of_those_that_the_system_gives_away() -> None:
    ports = {free_port("127.0.0.1") for _ in range(20)}
    assert len(ports) > 10
    assert min(ports) >= 20_000
    assert max(ports) < 32_768
