"""Runs that are killed, stopped or stuck: started again, they end with the weights of an unbroken run."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from frameworks import require_framework
from launchers import launcher
from runs import assert_same_weights
from tandem.__main__ import STOPPED, main
from tandem.backends import launcher_of
from tandem.checkpoints.folders import TRACKER
from tandem.checkpoints.native.source import NativeSource
from tandem.launch.machines import Machines, free_port
from tandem.models.tensors import tensor_table
from workspace import Workspace

PROGRAM = Path(__file__).with_name("faulty_run.py")


@dataclass(frozen=True)
class Job:
    """A toy run as a command, of one process or of several.

    Attributes:
        forked: its ranks are started by the tests' own launcher, which takes less time.
        launcher: what goes before it, by default a supervisor's.
    """

    workspace: Workspace
    folder: Path
    framework: str = "torch"
    processes: int = 1
    flags: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    forked: bool = False

    def command(self, save: str) -> list[str]:
        text = f"{self.workspace.text}_text_document"
        words = [*("--ai-framework", self.framework), *("--load", str(self.workspace.hf)), *("--data-path", text)]
        words += [*("--seq-length", "32"), *("--global-batch-size", "4"), *("--lr", "1e-3"), *("--split", "80,20,0")]
        words += [*("--log-interval", "1"), *("--eval-interval", "3"), *("--eval-iters", "2"), *("--device", "cpu")]
        return ["pretrain", *words, "--save", str(self.folder / save), *self.flags]

    def succeed_here(self, save: str) -> None:
        """The run of one process, in that of the tests."""
        assert main(self.command(save)) == 0

    def start(self, save: str, **fault: object) -> subprocess.Popen[str]:
        """Save in a folder of that name; `fault` as `faulty_run.py` takes it."""
        values = {"rank": -1, "framework": self.framework, **fault}
        (self.folder / "fault.json").write_text(json.dumps(values), encoding="utf-8")
        supervisor = launcher(self.framework, self.processes, forked=self.forked)
        launch = self.launcher or (supervisor if self.processes > 1 else (sys.executable,))
        return subprocess.Popen(
            [*launch, str(PROGRAM), str(self.folder / "fault.json"), *self.command(save)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, save: str, seconds: float = 240, **fault: object) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(save, **fault)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, output

    def succeed(self, save: str, **fault: object) -> str:
        code, output = self.finish(save, **fault)
        assert code == 0, output[-3000:]
        return output

    def codes(self) -> list[int]:
        """What the processes of the last job ended with, by rank."""
        return [int(path.read_text(encoding="utf-8")) for path in self.code_files()]

    def code_files(self) -> list[Path]:
        return [self.folder / f"fault.json.{rank}" for rank in range(self.processes)]


def kill_while_saving(job: Job, kills: int, seed: int) -> None:
    """Kill -9 at random moments of runs that do little but save; each start goes on from a whole checkpoint."""
    moments, last = random.Random(seed), 0
    for _ in range(kills):
        process = job.start("b", rank=0, slow_save=0.004)
        assert process.stdout is not None
        for line in process.stdout:
            if "lm loss" in line:
                break
        time.sleep(moments.uniform(0, 1.0))
        process.kill()
        process.communicate()
        if (job.folder / "b" / TRACKER).exists():
            source = NativeSource(job.folder / "b")
            for kind in source.kinds():
                for name in tensor_table(source.config):
                    source.read(name, kind)  # compares sha256
            assert source.iteration >= last, "a published checkpoint was lost"
            last = source.iteration
    job.succeed("b")
    assert_same_weights(job.folder / "a", job.folder / "b")


@pytest.mark.slow("kills")
@pytest.mark.parametrize("async_save", [False, True])
def test_kills_while_saving(workspace: Workspace, async_save: bool, tmp_path: Path) -> None:
    require_framework("torch")
    flags = ("--train-iters", "12", "--save-interval", "1", "--keep-last", "2")
    job = Job(workspace, tmp_path, flags=(*flags, *(("--async-save",) if async_save else ())))
    job.succeed_here("a")
    kill_while_saving(job, 1, seed=1)


@pytest.mark.slow("kills")
@pytest.mark.parametrize("async_save", [False, True])
def test_twenty_kills_while_saving(workspace: Workspace, framework: str, async_save: bool, tmp_path: Path) -> None:
    flags = ("--train-iters", "60", "--save-interval", "1", "--keep-last", "2")
    job = Job(workspace, tmp_path, framework, flags=(*flags, *(("--async-save",) if async_save else ())))
    job.succeed("a")
    kill_while_saving(job, 20, seed=2)


def stop_and_go_on(job: Job, what: str = "SIGTERM", **fault: object) -> None:
    """A signal to one rank: all leave with STOPPED after the same step, and the next start goes on."""
    code, output = job.finish("b", what=what, **fault)
    assert code == STOPPED, output[-3000:]
    assert job.codes() == [STOPPED] * job.processes, output[-3000:]
    stopped = NativeSource(job.folder / "b").iteration
    assert f"exiting program at iteration {stopped}" in output
    resumed_output = job.succeed("b")
    assert f"resuming at iteration {stopped}" in resumed_output
    assert f"iteration {stopped:8d}/" not in resumed_output
    assert_same_weights(job.folder / "a", job.folder / "b")


def test_a_second_interrupt_leaves_at_once(workspace: Workspace, tmp_path: Path) -> None:
    """Even where the first one cannot be obeyed, because a step does not end."""
    require_framework("torch")
    process = Job(workspace, tmp_path, flags=("--train-iters", "8")).start("b", rank=0, when="step", at=3, what="hang")
    assert process.stdout is not None
    next(line for line in process.stdout if "iteration        2/" in line)
    time.sleep(0.5)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)  # two within a second are a terminal's and its launcher's
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT


TWO = ("--train-iters", "8", "--save-interval", "4", "--distributed-timeout-minutes", "2", "--keep-last", "1")
LAYOUTS_OF_TWO = {
    "tensor": ("--tensor-model-parallel-size", "2"),
    "pipeline": ("--pipeline-model-parallel-size", "2"),
    "data": (),
}


def unbroken_job_of_two(workspace: Workspace, framework: str, layout: str, folder: Path) -> Job:
    """Two processes, after a run that nothing disturbed, saved as "a"."""
    job = Job(workspace, folder, framework, processes=2, flags=(*TWO, *LAYOUTS_OF_TWO[layout]))
    job.succeed("a")
    return job


@pytest.mark.slow("signals")
def test_a_signal_to_the_second_rank(workspace: Workspace, tmp_path: Path) -> None:
    """Saving in the background at sharded optimizer state."""
    require_framework("torch")
    flags = (*TWO, "--async-save", "--use-distributed-optimizer")
    job = Job(workspace, tmp_path, processes=2, flags=flags, forked=True)
    job.succeed("a")
    stop_and_go_on(job, rank=1, when="evaluation", at=1)


@pytest.mark.parametrize("layout", LAYOUTS_OF_TWO)
@pytest.mark.parametrize(
    "framework",
    [
        pytest.param("torch", marks=pytest.mark.slow("kills")),
        pytest.param("mindspore", marks=pytest.mark.slow("signals")),
    ],
)
def test_a_signal_to_each_rank_at_any_time(workspace: Workspace, framework: str, layout: str, tmp_path: Path) -> None:
    """In a step, an evaluation and a save, on each of two ranks."""
    require_framework(framework)
    job = unbroken_job_of_two(workspace, framework, layout, tmp_path)
    for rank in (0, 1):
        for what, when, at in (("SIGINT", "step", 3), ("SIGTERM", "evaluation", 2), ("SIGINT", "save", 1)):
            stop_and_go_on(job, what, rank=rank, when=when, at=at)
            for path in sorted((tmp_path / "b").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.slow("kills")
@pytest.mark.parametrize("layout", LAYOUTS_OF_TWO)
def test_a_nan_of_one_rank_stops_all(workspace: Workspace, framework: str, layout: str, tmp_path: Path) -> None:
    """In the sixth step; without the fault, the next start goes on from the fourth."""
    job = unbroken_job_of_two(workspace, framework, layout, tmp_path)
    code, output = job.finish("b", rank=1, when="step", at=6, what="nan")
    assert code == 2, output[-3000:]
    assert job.codes() == [2, 2]
    assert "iteration 6: the gradient norm is" in output
    assert "rank 1: gradient of decoder.layers." in output
    assert "resuming at iteration 4" in job.succeed("b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow("kills")
def test_a_rank_that_hangs_ends_the_job_and_the_next_start_goes_on(workspace: Workspace, tmp_path: Path) -> None:
    require_framework("torch")
    flags = ("--train-iters", "8", "--save-interval", "2", "--distributed-timeout-minutes", "1")
    job = Job(workspace, tmp_path, processes=2, flags=flags)
    job.succeed("a")
    code, output = job.finish("b", rank=1, when="step", at=6, what="hang")
    assert code != 0
    assert NativeSource(tmp_path / "b").iteration == 4, output[-3000:]
    assert "resuming at iteration 4" in job.succeed("b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow("kills")
def test_a_rank_that_is_killed_ends_the_job(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    """The others end, too, and the same command goes on."""
    job = Job(workspace, tmp_path, framework, processes=2, flags=("--train-iters", "8", "--save-interval", "2"))
    job.succeed("a")
    code, output = job.finish("b", rank=1, when="step", at=6, what="SIGKILL")
    assert code != 0, output[-3000:]
    assert "resuming at iteration 4" in job.succeed("b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow("kills")
def test_torchrun_restarts_a_job_that_goes_on(workspace: Workspace, tmp_path: Path) -> None:
    """`torchrun --max-restarts`: a rank is killed in its sixth step; the second life has four to take."""
    require_framework("torch")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1")
    flags = ("--train-iters", "8", "--save-interval", "2")
    plain = Job(workspace, tmp_path, processes=2, flags=flags)
    plain.succeed("a")
    port = ("--master-addr", "127.0.0.1", "--master-port", str(free_port("127.0.0.1")))
    resumed_output = Job(workspace, tmp_path, processes=2, flags=flags, launcher=(*torchrun, *port)).succeed(
        "b", rank=1, when="step", at=6, what="SIGKILL"
    )
    assert "resuming at iteration 4" in resumed_output
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow("signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_ranks_save_and_leave_when_their_launcher_ends(
    workspace: Workspace, framework: str, number: signal.Signals, tmp_path: Path
) -> None:
    """Started by torchrun or msrun itself: of the two, msrun passes no signal on."""
    command, environment = launcher_of(framework)(
        Machines(nproc_per_node=2, master_port=free_port("127.0.0.1")), tmp_path, []
    )
    job = Job(workspace, tmp_path, framework, 2, ("--train-iters", "100000"), tuple(command))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        process = job.start("b")
    wait_until(lambda: '"iteration":2,' in read_if_there(tmp_path / "b" / "metrics.jsonl"))
    process.send_signal(number)
    wait_until(lambda: all(read_if_there(path) for path in job.code_files()))
    assert job.codes() == [STOPPED, STOPPED]
    assert NativeSource(tmp_path / "b").iteration >= 1
    process.communicate(timeout=60)


def wait_until(happened: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def read_if_there(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.mark.slow("kills")
def test_data_that_vanish_are_named_and_the_run_goes_on_when_they_are_back(
    workspace: Workspace, tmp_path: Path
) -> None:
    require_framework("torch")
    job = Job(workspace, tmp_path, flags=("--train-iters", "6", "--save-interval", "2"))
    job.succeed_here("a")
    code, output = job.finish("b", rank=0, when="step", at=5, what="SIGKILL")
    assert code == -9, output[-3000:]
    data = Path(f"{workspace.text}_text_document.bin")
    data.rename(tmp_path / "elsewhere.bin")
    try:
        code, output = job.finish("b")
    finally:
        (tmp_path / "elsewhere.bin").rename(data)
    assert code == 2, output[-3000:]
    assert str(data) in output.splitlines()[-1]
    assert "resuming at iteration 4" in job.succeed("b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("backend", "flags"),
    [
        pytest.param(framework, flags, marks=pytest.mark.slow("kills"))
        for framework in ("torch", "mindspore")
        for flags in ((), ("--async-save",))
    ],
)
def test_a_rank_that_saves_slowly_times_no_other_out(
    workspace: Workspace, backend: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Collectives wait 6 seconds, and the first rank writes for longer."""
    framework = require_framework(backend)
    words = ("--train-iters", "1", "--tensor-model-parallel-size", "2", *flags)
    job = Job(workspace, tmp_path, framework, processes=2, flags=words)
    output = job.succeed("a", rank=0, slow_save=0.25, timeout=0.1)
    seconds = float(re.findall(r"MB in ([\d.]+) s", output)[0])
    assert seconds > 10
    assert NativeSource(tmp_path / "a").iteration == 1
