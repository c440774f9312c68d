"""Memory and disk: said before a run begins, and what to change when there is too little."""

from __future__ import annotations

import importlib
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest

from tandem import machine
from tandem.checkpoints.detect import open_source
from tandem.errors import UserError
from tandem.training.out_of_memory import is_out_of_memory, naming_less_memory
from tandem.training.run import train
from tandem.training.start import room
from tandem.training.start.dry_run import dry_run
from tandem.training.start.weights import open_weights
from workspace import Workspace

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Usage:
    """Room for two of the toy's checkpoints of 11.1 MB."""
    usage = Usage(10**9, 10**9, 25 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    return usage


def test_a_run_needs_room_for_a_checkpoint_before_it_begins(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="needs 11 MB and the disk has 0 MB free"):
        train(workspace.settings("torch", save=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"save_interval": 5}, 4),
        ({"save_interval": 6}, 4),  # 6, 12, 18 and the last one, 20
        ({"save_interval": 1, "save_total_limit": 2}, 3),  # and the one that is being written
        ({"save_interval": 1, "save_retain_interval": 10, "save_total_limit": 1}, 3),
        ({"save_interval": 10}, None),
        ({"save_interval": 1, "save_total_limit": 1}, None),
    ],
)
def test_a_disk_that_will_be_full_is_said(
    workspace: Workspace,
    tmp_path: Path,
    values: dict[str, object],
    kept: int | None,
    disk: Usage,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dry_run(workspace.settings("torch", save=str(tmp_path), **values), 1)
    out = capsys.readouterr().out
    assert (f"the run keeps {kept} checkpoints of 0.01 GB" in out) is (kept is not None)
    assert ("--save-total-limit keeps only the newest" in out) is (kept is not None)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lora_ckpt_filter": False},
        {"init": "random"},  # of weights in no folder
    ],
)
def test_a_checkpoint_of_adapters_takes_what_is_said(
    workspace: Workspace, tmp_path: Path, values: dict[str, object]
) -> None:
    adapters = {"lora_target_modules": "all-linear", "lora_r": 4}
    folder = {"save": str(tmp_path / "run"), "tokenizer_name_or_path": str(workspace.hf)}
    settings = workspace.settings("torch", train_iters=1, lr_warmup_iters=0, **adapters, **folder, **values)
    source = open_weights(settings.checkpoint, settings.lora, settings.model, str(workspace.hf), 1)
    said = room.checkpoint_bytes(settings, source)
    train(settings)
    written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    assert said == pytest.approx(written, rel=0.05)
    assert room.checkpoint_bytes(settings, open_source(tmp_path / "run")) == said  # and the run that goes on


def test_the_run_itself_says_it_too(
    workspace: Workspace, tmp_path: Path, disk: Usage, capsys: pytest.CaptureFixture[str]
) -> None:
    train(workspace.settings("torch", save=str(tmp_path), save_interval=5, exit_interval=1))
    assert "it is full after 2" in capsys.readouterr().out


def test_more_memory_than_this_machine_has_is_refused_with_what_needs_less(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "memory_bytes", lambda: 10**6)
    monkeypatch.setattr(room, "has_accelerator", lambda: False)
    with pytest.raises(UserError, match=r"this machine has 0\.0 GB") as error:
        dry_run(workspace.settings("torch"), 1)
    assert {"--micro-batch-size", "--seq-length", "--recompute-granularity", "--bf16"} <= set(error.value.flags)
    for values in ({"device": "cuda"}, {"device": "npu"}):
        dry_run(workspace.settings("torch", **values), 1)
    assert "a rank needs about" in capsys.readouterr().out


def test_a_container_may_have_less_memory_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("1234", 1234), ("max", None)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(machine, "_LIMITS", (tmp_path / "memory.max", tmp_path / "absent"))
        assert (machine.memory_bytes() == expected) is (expected is not None)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("Allocate memory failed\n\n----\n- C++ Call Stack"),  # MindSpore on CPU
        RuntimeError("Device(id:0) memory isn't enough and alloc failed, kernel name: MatMul, alloc size: 4B."),
    ],
)
def test_out_of_memory_names_what_needs_less(error: Exception, workspace: Workspace) -> None:
    error.place = "iteration 3"  # type: ignore[attr-defined]
    recomputing = {"recompute_granularity": "full", "recompute_method": "uniform", "micro_batch_size": 1}
    for values, flags in (
        ({}, {"--micro-batch-size", "--seq-length", "--recompute-granularity", "--recompute-method", "--bf16"}),
        ({**recomputing, "bf16": True}, {"--seq-length"}),
    ):
        with (
            pytest.raises(UserError, match="iteration 3: out of memory") as raised,
            naming_less_memory(workspace.settings("torch", **values)),
        ):
            raise error
        assert set(raised.value.flags) - {"--use-distributed-optimizer"} == flags


def test_a_real_allocation_that_fails_is_recognised(framework: str) -> None:
    module = importlib.import_module("torch" if framework == "torch" else "numpy")
    with pytest.raises((RuntimeError, MemoryError)) as error:
        module.ones(1 << 60, dtype=module.uint8)  # MindSpore's tensors on CPU hold NumPy's memory
    assert is_out_of_memory(error.value)


def test_other_errors_stay_as_they_are(workspace: Workspace) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), naming_less_memory(workspace.settings("torch")):
        raise RuntimeError("shapes differ")


def test_interleaved_stages_need_micro_batches_for_each(workspace: Workspace) -> None:
    values = {"num_layers_per_virtual_pipeline_stage": 1, "pipeline_model_parallel_size": 2, "global_batch_size": 6}
    with pytest.raises(UserError, match=r"--global-batch-size 6: .* x 2 interleaved pipeline stages = 4"):
        dry_run(workspace.settings("torch", **values), 2)
    dry_run(workspace.settings("torch", **{**values, "global_batch_size": 8}), 2)


def test_a_very_long_run_is_described_in_seconds(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    values = {"train_iters": 10**8, "global_batch_size": 1024, "lr_warmup_iters": 10**6}
    dry_run(workspace.settings("torch", **values), 1)
    assert time.process_time() - began < 20
    assert "100,000,000 steps over 102,400,000,000 samples" in capsys.readouterr().out
