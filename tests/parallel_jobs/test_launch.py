"""`--nproc-per-node`: a job starts, shows its first rank, ends as a whole, and leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import plain_launcher
import pytest

from frameworks import require_framework
from launchers import launcher
from tandem.__main__ import STOPPED
from tandem.backends import launcher_of
from tandem.checkpoints.detect import open_source
from tandem.errors import UserError
from tandem.launch.machines import Machines, free_port
from tandem.launch.out_of_memory import kills
from tandem.launch.supervisor import launch
from tandem.models.tensors import tensor_table
from tandem.training.run import train
from workspace import Workspace

HERE = Path(__file__).parent
LOSS = re.compile(r"iteration +(\d+)/.*lm loss: (\S+) ")


def start(words: Sequence[str], folder: Path, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """`folder` takes what jobs leave when they fail."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), **variables}
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd
    )


def finish(job: subprocess.Popen[str], mark: str, timeout: float = 240) -> tuple[int, str, str]:
    """Exit code and output; whatever has `mark` in its command line must have ended with the job."""
    try:
        out, err = job.communicate(timeout=timeout)
    finally:
        job.kill()
    assert not running(mark)
    return job.returncode, out, err


@pytest.mark.parametrize(
    ("version", "device", "given", "expected"),
    [
        ("2.36", None, None, "glibc.malloc.tcache_count=0"),
        ("2.39", None, None, None),
        ("2.36", "npu-smi", None, None),
        ("2.36", None, "glibc.malloc.arena_max=1", None),
    ],
)
def test_holes_in_the_heap_of_an_old_glibc_are_prevented_where_the_cpu_computes(
    version: str, device: str | None, given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", version))
    monkeypatch.setattr("shutil.which", lambda name: name if name == device else None)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    command, environment = launcher_of("torch")(Machines(nproc_per_node=2), Path(), ["script.py"])
    assert command[-1] == "script.py"
    assert environment.get("GLIBC_TUNABLES") == expected


def running(mark: str) -> list[int]:
    """Processes whose command line names `mark`, but for this one."""
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in words and int(path.name) != os.getpid():
            pids.append(int(path.name))
    return pids


def supervised(framework: str, fault: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    script = [str(HERE / "faulty_job.py"), fault, str(folder), *words]
    return start([*launcher(framework, 2)[1:], *script], folder)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.05)


def flags(workspace: Workspace, framework: str, folder: Path) -> list[str]:
    """A short pretraining run; the folder, in which nothing is written, marks its processes."""
    return [
        *("--ai-framework", framework, "--load", str(workspace.hf), "--data-path", f"{workspace.text}_text_document"),
        *("--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "4"),
        *("--lr", "3e-3", "--log-interval", "1", "--eval-iters", "0", "--split", "100,0,0"),
        *("--data-cache-path", str(folder), "--device", "cpu"),
    ]


def losses(output: str) -> dict[int, float]:
    return {int(iteration): float(loss) for iteration, loss in LOSS.findall(output)}


def one_process(workspace: Workspace, framework: str) -> list[float]:
    losses = []
    changes = {"train_iters": 4, "lr_decay_style": "linear", "lr_warmup_iters": 0, "device": "cpu"}
    train(workspace.settings(framework, **changes), lambda record: losses.append(record.loss))
    return losses


# What job runners set, and what other jobs leave.
JOB_RUNNER = {"WORLD_SIZE": "8", "RANK": "3", "MASTER_ADDR": "198.51.100.1", "PET_RDZV_BACKEND": "c10d"}
LEFT_OVER = {"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "16", "MS_SCHED_HOST": "198.51.100.1", "MS_SCHED_PORT": "1"}


@pytest.fixture
def untidy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files that have the names of libraries."""
    folder = tmp_path_factory.mktemp("untidy")
    for name in ("random", "yaml", "tokenizers", "torch", "mindspore", "tandem"):
        (folder / f"{name}.py").write_text("raise ImportError('this is no library')")
    return folder


@pytest.fixture
def tandem_script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pip installs as `tandem`."""
    script = tmp_path_factory.mktemp("bin") / "tandem"
    script.write_text("from tandem.__main__ import run\nif __name__ == '__main__':\n    run()\n")
    return str(script)


@pytest.mark.parametrize(
    ("framework", "axis"),
    [
        ("mindspore", "tensor"),
        *(
            pytest.param(*case, marks=pytest.mark.slow("jobs"))
            for case in (("torch", "pipeline"), ("torch", "tensor"), ("mindspore", "pipeline"))
        ),
    ],
)
def test_a_command_as_two_processes_trains_as_one(
    workspace: Workspace, framework: str, axis: str, untidy_folder: Path, tandem_script: str, tmp_path: Path
) -> None:
    """And across backends: MindSpore's tensor ranks and PyTorch's stages equal PyTorch in one process.

    Whatever lies in the working folder, and whatever other jobs have left in the environment.
    """
    require_framework(framework)
    command = [tandem_script, "pretrain", *flags(workspace, framework, tmp_path)]
    logs = tmp_path / "logs"
    job = start(
        [*command, "--nproc-per-node", "2", "--log-dir", str(logs), f"--{axis}-model-parallel-size", "2"],
        tmp_path,
        untidy_folder,
        **JOB_RUNNER,
        **LEFT_OVER,
    )
    code, out, err = finish(job, str(tmp_path))
    assert code == 0, out + err
    assert list(losses(out)) == [1, 2, 3, 4]
    expected = one_process(workspace, require_framework("torch"))
    assert list(losses(out).values()) == pytest.approx(expected, rel=1e-4)
    assert out.count("after training is done") == 1
    assert out.splitlines()[-1].startswith("[after training is done]")
    assert list(tmp_path.iterdir()) == [logs], "a job that ends well leaves nothing in the temporary directory"
    assert sorted(path.name for path in logs.iterdir()) == ["rank_0.log", "rank_1.log"]
    assert (logs / "rank_0.log").read_text(encoding="utf-8") == out


@pytest.mark.parametrize("framework", ["torch", pytest.param("mindspore", marks=pytest.mark.slow("jobs"))])
def test_a_rank_that_raises_ends_the_job_and_speaks_last(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    require_framework(framework)
    job = supervised(framework, "error", tmp_path, "pretrain", *flags(workspace, framework, tmp_path))
    code, out, err = finish(job, str(tmp_path))
    assert time.time() - float((tmp_path / "moment").read_text()) < 20
    assert code == 1
    assert list(losses(out)) == [1]
    lines = err.splitlines()
    assert lines[-1] == "rank 1 of 2 failed in iteration 2: RuntimeError: rank 1 does not like iteration 2"
    assert "Traceback (most recent call last):" in lines
    assert any("faulty_job.py" in line for line in lines)


@pytest.mark.slow("jobs")
def test_two_launchers_make_one_job(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    """They share a disk, and say so, whatever --no-shared-storage says: there is one checkpoint, and it is whole."""
    port, save = str(free_port("127.0.0.1")), tmp_path / "shared"
    command = ["-m", "tandem", "pretrain", *flags(workspace, framework, tmp_path), "--nproc-per-node", "1"]
    command += ["--save", str(save), "--no-shared-storage"]
    nodes = [
        start([*command, "--nnodes", "2", "--node-rank", str(n), "--master-port", port], tmp_path) for n in range(2)
    ]
    outputs = [job.communicate(timeout=240) for job in nodes]
    assert [job.returncode for job in nodes] == [0, 0], outputs
    assert not running(str(tmp_path))
    assert list(losses(outputs[0][0]).values()) == pytest.approx(one_process(workspace, framework), rel=1e-4)
    assert not outputs[1][0]
    assert outputs[0][0].count("all 2 machines see the same") == 1
    source = open_source(save)
    for name in tensor_table(source.config):
        source.read(name)  # compares sha256


@pytest.mark.slow("jobs")
def test_machines_with_other_settings_are_named(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    command = ["-m", "tandem", "pretrain", *flags(workspace, framework, tmp_path), "--nproc-per-node", "1"]
    command += ["--nnodes", "2", "--master-port", str(free_port("127.0.0.1"))]
    nodes = [start([*command, "--node-rank", str(n), "--lr", f"{n + 1}e-3"], tmp_path) for n in range(2)]
    for job in nodes:
        code, out, err = finish(job, "nobody", timeout=120)
        assert (code, out) == (2, "")
        assert "--lr differs between the processes: 0.001 on rank 0, 0.002 on rank 1" in err.splitlines()[-1]


def test_an_error_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    code, out, err = finish(supervised("plain", "user error", tmp_path), str(tmp_path))
    assert code == 2
    assert out == "waiting\n"
    assert err == "tandem wait: error: all ranks agree that this cannot be\n"


def test_the_error_that_a_rank_records_wins(tmp_path: Path) -> None:
    """Launchers kill the ranks that have yet to say the same."""
    code, _, err = finish(supervised("plain", "killed before the error", tmp_path), str(tmp_path))
    assert (code, err) == (2, "tandem wait: error: this cannot be\n")


def test_a_rank_that_its_launcher_ends_is_not_the_cause(tmp_path: Path) -> None:
    """Launchers send SIGTERM as soon as a rank has failed. Another one, that was only gone, looked like the first."""
    code, _, err = finish(supervised("plain", "error, and SIGTERM for the others", tmp_path), str(tmp_path))
    assert code == 1
    assert err.splitlines()[-1] == "rank 1 of 2 failed in iteration 2: RuntimeError: rank 1 does not like iteration 2"


def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    code, _, err = finish(supervised("plain", "killed", tmp_path), str(tmp_path))
    assert code == 1
    assert err.splitlines()[-1] == "rank 1 of 2 was killed, or crashed"


def test_a_rank_that_the_system_killed_for_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("tandem.launch.out_of_memory.kills", count(5).__next__)
    words = [str(HERE / "faulty_job.py"), "killed", str(tmp_path)]
    end = launch(Machines(nproc_per_node=2), plain_launcher.launcher, words)
    assert end.code == 1
    reason = end.text.splitlines()[-1]
    assert reason.startswith("rank 1 of 2 was killed by the system, because memory ran out: ")
    assert "--micro-batch-size" in reason


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cgroup": "0::/job\n", "cg/job/memory.events": "low 0\noom 4\noom_kill 3\n", "vmstat": "oom_kill 9\n"}, 3),
        ({"cgroup": "0::/of/the/host\n", "cg/memory.events": "oom_kill 2\n"}, 2),  # in a container
        ({"cgroup": "4:memory:/a\n0::/\n", "cg/memory/a/memory.oom_control": "under_oom 0\noom_kill 1\n"}, 1),
        ({"cgroup": "0::/\n", "vmstat": "nr_free_pages 1\noom_kill 9\n"}, 9),
        ({}, None),
    ],
    ids=["version 2", "container", "version 1", "machine", "unknown"],
)
def test_kills_for_memory_are_counted(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / ("self/cgroup" if name == "cgroup" else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert kills(tmp_path / "cg", tmp_path) == expected


@pytest.mark.slow("jobs")
def test_a_killed_rank_of_a_training_is_named(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    """Also when the others fail for it before its launcher notices."""
    job = supervised(framework, "killed", tmp_path, "pretrain", *flags(workspace, framework, tmp_path))
    code, out, err = finish(job, str(tmp_path))
    assert time.time() - float((tmp_path / "moment").read_text()) < 20
    assert code == 1
    assert list(losses(out)) == [1]
    assert err.splitlines()[-1] == "rank 1 of 2 was killed, or crashed"


def test_a_launcher_that_fails_is_said_and_its_output_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    end = launch(Machines(nproc_per_node=2), lambda *_: (["sh", "-c", "echo no such rank; exit 3"], {}), [])
    assert end.code == 1
    named, output, reason = end.text.splitlines()
    assert (output, reason) == ("no such rank", "the launcher ended with code 3")
    assert Path(named.removeprefix("last lines of ").removesuffix(":")).read_text() == "no such rank\n"


def test_ranks_get_the_signal_and_time_to_save(tmp_path: Path) -> None:
    job = supervised("plain", "none", tmp_path)
    for rank in range(2):
        wait_for(tmp_path / f"rank_{rank}")
    job.send_signal(signal.SIGTERM)
    code, _, _ = finish(job, str(tmp_path))
    assert code == 128 + signal.SIGTERM
    assert {path.name: path.read_text() for path in tmp_path.glob("saved_*")} == {
        "saved_0": "SIGTERM",
        "saved_1": "SIGTERM",
    }


def test_a_signal_before_the_ranks_have_met_ends_the_job_at_once(tmp_path: Path) -> None:
    job = supervised("plain", "starting", tmp_path)
    wait_for(tmp_path / "rank_1")
    job.send_signal(signal.SIGUSR1)
    code, _, err = finish(job, str(tmp_path), timeout=20)
    assert code == 128 + signal.SIGUSR1
    assert err == "ended by SIGUSR1 while its processes started: nothing was trained\n"
    assert not list(tmp_path.glob("saved_*"))


def test_a_signal_while_a_training_starts_ends_it(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    command = ["-m", "tandem", "pretrain", *flags(workspace, framework, tmp_path), "--train-iters", "100000"]
    job = start([*command, "--nproc-per-node", "2"], tmp_path)
    while not list(tmp_path.glob("tandem-job-*/launcher.log")):
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    code, out, _ = finish(job, str(tmp_path), timeout=30)
    assert (code, out) == (128 + signal.SIGTERM, "")


def test_machines_that_do_not_come_are_waited_for_until_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("tandem.launch.supervisor.SECONDS_UNSAID", 0.1)
    machines = Machines(nproc_per_node=2, nnodes=2, master_port=free_port("127.0.0.1"), timeout_minutes=0.01)
    end = launch(machines, lambda *_: (["sleep", "100"], {}), [])
    assert end.code == 2
    assert UserError(end.text).flags == ("--nnodes", "--distributed-timeout-minutes", "--node-rank", "--master-addr")
    said = capsys.readouterr().err
    assert said.count("machine 0 of --nnodes 2 waits for the others") == 1
    assert f"127.0.0.1:{machines.master_port}" in said


@pytest.mark.slow("signals")
def test_a_machine_that_waits_for_another_obeys_ctrl_c(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    command = ["-m", "tandem", "pretrain", *flags(workspace, framework, tmp_path), "--nproc-per-node", "1"]
    job = start([*command, "--nnodes", "2", "--master-port", str(free_port("127.0.0.1"))], tmp_path)
    assert job.stderr is not None
    assert "waits for the others" in job.stderr.readline()
    job.send_signal(signal.SIGINT)
    assert finish(job, str(tmp_path), timeout=20)[0] == 128 + signal.SIGINT


@pytest.mark.slow("signals")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_to_a_job_whose_console_broke_saves(
    workspace: Workspace, framework: str, number: signal.Signals, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    words = [*flags(workspace, framework, tmp_path), "--train-iters", "100000", "--save", str(save)]
    job = start(["-m", "tandem", "pretrain", *words, "--nproc-per-node", "2"], tmp_path)
    assert job.stdout is not None
    next(line for line in job.stdout if "lm loss" in line)
    job.stdout.close()
    time.sleep(0.5)
    job.send_signal(number)
    assert job.wait(timeout=60) == STOPPED
    assert not running(str(tmp_path))
    assert open_source(save).iteration


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    job = supervised("plain", "deaf", tmp_path)
    for rank in range(2):  # before both are there, the first signal ends the job at once
        wait_for(tmp_path / f"rank_{rank}")
    job.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)  # a script may pass on what its whole group has got
    time.sleep(1.2)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    assert finish(job, str(tmp_path), timeout=20)[0] == 128 + signal.SIGTERM


def test_the_ranks_of_a_killed_supervisor_end(tmp_path: Path) -> None:
    job = supervised("plain", "deaf", tmp_path)
    wait_for(tmp_path / "rank_1")
    job.kill()
    job.wait()
    deadline = time.monotonic() + 10
    while running(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(str(tmp_path))


def test_a_rank_that_starts_after_its_supervisor_was_killed_leaves(tmp_path: Path) -> None:
    supervisor = subprocess.Popen(["true"])
    supervisor.wait()
    job = {"TANDEM_JOB": str(tmp_path), "TANDEM_SUPERVISOR": str(supervisor.pid), "RANK": "0", "WORLD_SIZE": "1"}
    rank = [sys.executable, "-c", "from tandem.launch.member import Member; Member.join()"]
    assert subprocess.run(rank, env={**os.environ, **job}, timeout=60, check=False).returncode == 1
    assert "supervisor of this job is gone" in (tmp_path / "rank_0.log").read_text(encoding="utf-8")


def test_a_folder_for_output_that_cannot_be_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match=r"--log-dir .*/logs: File exists"):
        launch(Machines(nproc_per_node=2), lambda *_: (["false"], {}), [], str(tmp_path / "logs"))
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_port_in_use_is_found_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--master-port {port} on 127.0.0.1 is in use"):
            Machines(nproc_per_node=2, master_port=port).checked()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"nproc_per_node": 0}, "--nproc-per-node 0"),
        ({"nproc_per_node": 2, "nnodes": 2, "node_rank": 2}, "--node-rank 2: expected"),
        (
            {"nproc_per_node": 2, "nnodes": 2, "master_addr": "198.51.100.1"},
            "198.51.100.1: expected an address",
        ),
    ],
)
def test_machines_that_cannot_be_are_said(values: dict[str, int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Machines(**values).checked()
