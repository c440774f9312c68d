"""A console that breaks does not end a command whose result is files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.__main__ import STOPPED
from tandem.checkpoints.native.source import NativeSource
from tandem.console import lasting_console
from workspace import Workspace

TANDEM = [sys.executable, "-m", "tandem"]


def test_what_nobody_reads_is_dropped_and_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_console():
            for number in range(3):
                print(number, flush=True)
            assert not sys.stdout.isatty()
        print("and afterwards", flush=True)
    said = capsys.readouterr().err
    assert said.count("standard output is lost (Broken pipe)") == 1


@pytest.mark.parametrize("redirection", ["> /dev/full", "> /dev/full 2>&1", ">&-", ">&- 2>&- <&-"])
def test_files_are_written_whatever_becomes_of_the_console(
    workspace: Workspace, redirection: str, tmp_path: Path
) -> None:
    """A full disk under the log, and streams that were closed."""
    words = ["preprocess", "--input", str(workspace.corpus), "--output-prefix", str(tmp_path / "text")]
    words += ["--tokenizer-name-or-path", str(workspace.hf)]
    done = subprocess.run(["sh", "-c", f'"$@" {redirection}', "sh", *TANDEM, *words], timeout=120, check=False)
    assert done.returncode == 0
    assert (tmp_path / "text_text_document.idx").stat().st_size > 0


@pytest.mark.slow("kills")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_run_outlives_its_reader_and_saves_at_the_next_signal(
    workspace: Workspace, framework: str, number: signal.Signals, tmp_path: Path
) -> None:
    """As after Ctrl-C in `tandem pretrain ... 2>&1 | tee log`, where tee ends first."""
    require_framework(framework)
    words = ["--load", str(workspace.hf), "--data-path", f"{workspace.text}_text_document", "--seq-length", "32"]
    words += ["--train-iters", "100000", "--lr", "1e-3", "--log-interval", "1", "--eval-iters", "0", "--device", "cpu"]
    words += ["--ai-framework", framework, "--save", str(tmp_path), "--split", "100,0,0"]
    run = subprocess.Popen([*TANDEM, "pretrain", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout is not None
    last = next(line for line in run.stdout if "lm loss" in line)
    run.stdout.close()
    lines = (tmp_path / "metrics.jsonl").read_text().count("\n")
    while (tmp_path / "metrics.jsonl").read_text().count("\n") < lines + 3:
        assert run.poll() is None, last
    run.send_signal(number)
    assert run.wait(timeout=60) == STOPPED
    assert NativeSource(tmp_path).iteration > lines
