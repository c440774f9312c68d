"""What only MindSpore has: work in blocks and over threads, and starting under msrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from toy_work import assert_close_gradients, mean_gradients, toy_batch, toy_weights

from frameworks import require_framework
from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.errors import UserError
from toys import TOYS


@pytest.fixture(autouse=True)
def _mindspore() -> None:
    require_framework("mindspore")


@pytest.mark.parametrize("toy", TOYS)
def test_blocks_pieces_and_threads_change_nothing(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.backends.mindspore.compute.cpu import attention, functional, loss, threads

    source = toy_weights(TOYS[toy])
    engine = create_engine("mindspore", source.config, EngineSettings(device="cpu"))
    engine.load_weights(source)
    batches = [toy_batch(source.config, (37, 1, 16, 90), trained=0.8)]
    expected_loss, expected = mean_gradients(engine, batches)
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(functional, "BLOCK", 7)
    monkeypatch.setattr(loss, "PIECE", 50)
    monkeypatch.setattr(threads, "WORTH_A_THREAD", 1)
    actual_loss, gradients = mean_gradients(engine, batches)
    assert actual_loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close_gradients(gradients, expected, rtol=1e-5)


def test_a_device_that_mindspore_has_not_is_refused() -> None:
    with pytest.raises(UserError, match="--device cuda: mindspore computes on npu, cpu: give one of them"):
        create_engine("mindspore", TOYS["llama"], EngineSettings(device="cuda"))


@pytest.mark.slow("jobs")
def test_one_worker_under_msrun_starts_and_ends(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "from toys import TOYS\n"
        "from tandem.backends import create_engine\n"
        "from tandem.backends.interface import EngineSettings\n"
        "create_engine('mindspore', TOYS['llama'], EngineSettings(device='cpu'))\n"
        "print('engine built')\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scripts = Path(sys.executable).parent
    command = [scripts / "msrun", "--worker_num=1", "--local_worker_num=1", f"--master_port={port}", "--join=True"]
    # msrun starts its workers with the first `python` on PATH.
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([*command, f"--log_dir={tmp_path}", script], check=True, timeout=120, env=environment)
    assert "engine built" in (tmp_path / "worker_0.log").read_text()


def test_what_only_pytorch_does_is_refused() -> None:
    with pytest.raises(UserError, match="--use-torch-fsdp2 needs torch, not mindspore"):
        create_engine("mindspore", TOYS["llama"], EngineSettings(device="cpu", use_torch_fsdp2=True))
