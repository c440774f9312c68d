"""metrics.jsonl: whole, without duplicates, and cheap."""

from __future__ import annotations

import dataclasses
import json
import time
from io import FileIO
from pathlib import Path

import pytest

from steps import step_record
from tandem.errors import UserError
from tandem.files.jsonl import append_line
from tandem.planning.hardware import peak_flops
from tandem.training.logs.log import StepRecord
from tandem.training.logs.metrics import METRICS_FILE, MetricsFile, metrics_of, read_metrics
from tandem.training.run import train
from workspace import Workspace


def test_rates_are_counted_as_documented() -> None:
    """Trained tokens, and FLOP/s of one device against its peak."""
    values = metrics_of(step_record())
    assert values["tokens_per_second"] == 2000
    assert values["trained_tokens_per_second"] == 1200
    assert values["tflops_per_device"] == 4.0
    assert values["mfu"] == 0.5
    assert metrics_of(step_record(peak_flops=None))["mfu"] is None


def test_peaks_are_those_of_the_named_devices() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float16") == 989.4e12
    assert peak_flops("Ascend910B2", "float32") == 94e12
    assert peak_flops("cpu", "bfloat16") is None
    assert peak_flops("NVIDIA GeForce GTX 1080", "bfloat16") is None


def test_the_longest_name_that_fits_counts() -> None:
    assert peak_flops("NVIDIA H20", "bfloat16") == 148e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "bfloat16") == 312e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA B200", "bfloat16") == 2250e12
    assert peak_flops("NVIDIA GeForce RTX 4090", "bfloat16") == 165.2e12
    for other in ("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GB200"):
        assert peak_flops(other, "bfloat16") is None  # other chips, or other clocks
    assert peak_flops("Ascend910B4-1", "bfloat16") == 280e12
    assert peak_flops("Ascend910_9391", "bfloat16") == 376e12
    assert peak_flops("NVIDIA H200", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H200 NVL", "bfloat16") == 835e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("Ascend910B3", "bfloat16") == 313e12


def test_each_step_is_on_disk_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    for iteration in (1, 2):
        file.on_step(step_record(iteration))
        assert [line["iteration"] for line in read_metrics(tmp_path / "m.jsonl")] == list(range(1, iteration + 1))
    file.close()


@pytest.mark.parametrize("torn", ["", '{"iteration": 4, "lo'])
@pytest.mark.parametrize("resumed_at", [0, 2, 3, 9])
def test_a_resume_drops_what_was_not_saved(tmp_path: Path, resumed_at: int, torn: str) -> None:
    """No step twice, and no half line of a killed run."""
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"iteration": n}) + "\n" for n in (1, 2, 3)) + torn)
    file = MetricsFile(path, resumed_at)
    file.on_step(step_record(resumed_at + 1))
    file.close()
    expected = [n for n in (1, 2, 3) if n <= resumed_at] + [resumed_at + 1]
    assert [line["iteration"] for line in read_metrics(path)] == expected


def test_a_full_disk_is_said_with_the_file() -> None:
    with FileIO("/dev/full", "a") as file, pytest.raises(UserError, match="/dev/full: No space left"):
        append_line(file, {"iteration": 1})


def test_a_damaged_line_costs_that_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named when the file is read, and taken out when lines are added; the file as it was is kept."""
    path = tmp_path / "m.jsonl"
    before = b'{"iteration": 1}\n{"iterat\n\0\0\n{"iteration": 4}\n{"iteration": 5}\n{"it'
    path.write_bytes(before)
    assert [line["iteration"] for line in read_metrics(path)] == [1, 4, 5]
    assert "m.jsonl:2" in (err := capsys.readouterr().err)
    assert "m.jsonl:3" in err
    file = MetricsFile(path, 4)
    file.on_step(step_record(5))
    file.close()
    assert "damaged lines are left out: 2, 3" in capsys.readouterr().err
    assert [line["iteration"] for line in read_metrics(path)] == [1, 4, 5]
    assert capsys.readouterr().err == ""
    assert before.startswith((tmp_path / "m.jsonl.damaged").read_bytes())


def test_a_file_of_another_kind_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("notes\nmore notes\n")
    with pytest.raises(UserError, match=r"m\.jsonl: expected lines of JSON objects with 'iteration'"):
        read_metrics(path)


def test_a_disk_that_fills_up_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(FileIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            return super().write(data[:5])

    with FileIO(tmp_path / "m.jsonl", "a") as file:
        append_line(file, {"iteration": 1})
    with Full(tmp_path / "m.jsonl", "a") as file, pytest.raises(UserError, match="only 5 of"):
        append_line(file, {"iteration": 2})
    assert (tmp_path / "m.jsonl").read_bytes() == b'{"iteration":1}\n'


def test_a_run_that_was_stopped_and_resumed_has_every_step_once(workspace: Workspace, tmp_path: Path) -> None:
    """The values of an unbroken run, with the validation loss where it was taken."""
    common = {"train_iters": 6, "save_interval": 2, "eval_interval": 3, "eval_iters": 2, "split": "80,20,0"}
    train(workspace.settings("torch", save=str(tmp_path / "whole"), **common))
    broken = workspace.settings("torch", save=str(tmp_path / "broken"), **common)

    class Killed(Exception):
        pass

    def kill(step: StepRecord) -> None:
        if step.iteration == 5:
            raise Killed

    with pytest.raises(Killed):
        train(broken, kill)
    train(dataclasses.replace(broken, checkpoint=dataclasses.replace(broken.checkpoint, load=broken.checkpoint.save)))
    whole, repaired = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("whole", "broken"))
    assert [line["iteration"] for line in repaired] == [1, 2, 3, 4, 5, 6]
    assert [(line["loss"], line["epoch"], line["validation"]) for line in repaired] == [
        (line["loss"], line["epoch"], line["validation"]) for line in whole
    ]
    assert [line["iteration"] for line in whole if line["validation"]] == [3, 6]
    assert all(line["memory"] > 1e6 for line in whole)


def test_the_cost_of_a_line_is_small(tmp_path: Path) -> None:
    """Generous: 10 ms is 1 % of a step of 1 s, and a line takes about 0.03 ms."""
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    start = time.perf_counter()
    for iteration in range(1, 101):
        file.on_step(step_record(iteration))
    assert (time.perf_counter() - start) / 100 < 0.01
    file.close()
