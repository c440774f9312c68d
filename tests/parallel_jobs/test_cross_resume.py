"""Save in one layout on one backend, go on in another layout on the other: the losses of the unbroken run."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from frameworks import require_framework
from launchers import launcher
from tandem.__main__ import main
from tandem.checkpoints.detect import open_source
from tandem.models.tensors import is_trained, tensor_table
from workspace import Workspace, make_mixture

LAYOUTS = {
    "plain": ({}, 1),
    "tp2": ({"tensor-model-parallel-size": 2, "sequence-parallel": None}, 2),
    "fsdp2": ({"use-torch-fsdp2": None}, 2),
    "dp2": ({"use-distributed-optimizer": None}, 2),
    "vpp": ({"pipeline-model-parallel-size": 2, "num-layers-per-virtual-pipeline-stage": 1}, 2),
    "ep2": ({"expert-model-parallel-size": 2, "use-distributed-optimizer": None}, 2),
    "tp2ep2": (
        {
            "tensor-model-parallel-size": 2,
            "expert-tensor-parallel-size": 1,
            "expert-model-parallel-size": 2,
            "sequence-parallel": None,
        },
        2,
    ),
    "pp2ep2": ({"pipeline-model-parallel-size": 2, "expert-model-parallel-size": 2}, 4),
    "tp2pp2": ({"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2}, 4),
}
# (backend, layout) of the iterations up to 4, 8, and 12
ROADS = [
    [("torch", "tp2pp2"), ("mindspore", "tp2"), ("torch", "dp2")],
    [("mindspore", "dp2"), ("torch", "fsdp2"), ("mindspore", "plain")],
    [("mindspore", "vpp"), ("torch", "vpp"), ("mindspore", "tp2")],
]


@pytest.mark.slow("jobs")
@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize("road", ROADS)
def test_any_layout_of_any_backend_goes_on(
    workspace: Workspace, road: list[tuple[str, str]], instructions: bool, tmp_path: Path
) -> None:
    require_framework("torch")
    require_framework("mindspore")
    train(workspace, instructions, "torch", "plain", 12, tmp_path / "unbroken")
    for leg, (framework, layout) in enumerate(road, 1):
        train(workspace, instructions, framework, layout, 4 * leg, tmp_path / "road")
    expected, found = losses(tmp_path / "unbroken"), losses(tmp_path / "road")
    assert (len(expected), len(found)) == (12, 12)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


BALANCE = {"moe-aux-loss-coeff": 0.01, "lr": 2e-4}


@pytest.mark.slow("jobs")
@pytest.mark.parametrize(
    "road",
    [
        [("torch", "pp2ep2"), ("mindspore", "tp2ep2"), ("torch", "plain")],
        [("mindspore", "ep2"), ("torch", "tp2ep2"), ("mindspore", "vpp")],
    ],
)
def test_experts_go_on_however_ranks_share_them(
    workspace: Workspace, road: list[tuple[str, str]], tmp_path: Path
) -> None:
    require_framework("torch")
    require_framework("mindspore")
    settings = {"load": make_mixture(workspace.hf, tmp_path / "moe"), **BALANCE}
    train(workspace, True, "torch", "plain", 12, tmp_path / "unbroken", settings)
    for leg, (framework, layout) in enumerate(road, 1):
        train(workspace, True, framework, layout, 4 * leg, tmp_path / "road", settings)
    np.testing.assert_allclose(losses(tmp_path / "road"), losses(tmp_path / "unbroken"), rtol=1e-5)


LORA = {"lora-target-modules": "all-linear", "lora-r": 4, "lora-alpha": 8, "lr": 3e-3}


@pytest.mark.slow("jobs")
def test_adapters_go_on(workspace: Workspace, tmp_path: Path) -> None:
    """Begun on tensor ranks of MindSpore, ended on data ranks of PyTorch: losses and adapters of either alone."""
    require_framework("torch")
    require_framework("mindspore")
    for leg, (framework, layout) in enumerate([("mindspore", "tp2"), ("torch", "dp2")], 1):
        train(workspace, True, framework, layout, 6 * leg, tmp_path / "road", LORA)
    road = open_source(tmp_path / "road")
    adapters = [name for name, spec in tensor_table(road.config).items() if is_trained(road.config, spec)]
    assert len(adapters) > 0
    for framework in ("torch", "mindspore"):
        train(workspace, True, framework, "plain", 12, tmp_path / framework, LORA)
        np.testing.assert_allclose(losses(tmp_path / "road"), losses(tmp_path / framework), rtol=1e-5)
        alone = open_source(tmp_path / framework)
        for name in adapters:
            np.testing.assert_allclose(road.read(name), alone.read(name), atol=1e-5, err_msg=name)


FP16 = {"fp16": None, "initial-loss-scale": 2**20, "loss-scale-window": 4, "hysteresis": 1}


@pytest.mark.slow("jobs")
def test_fp16_goes_on_with_its_scale(workspace: Workspace, tmp_path: Path) -> None:
    """Overflows, and where the scale stands, are those of the unbroken run; losses to fp16's rounding."""
    require_framework("torch")
    require_framework("mindspore")
    train(workspace, False, "mindspore", "plain", 12, tmp_path / "unbroken", FP16)
    for leg, (framework, layout) in enumerate([("torch", "dp2"), ("mindspore", "tp2"), ("mindspore", "dp2")], 1):
        train(workspace, False, framework, layout, 4 * leg, tmp_path / "road", FP16)
    np.testing.assert_allclose(losses(tmp_path / "road"), losses(tmp_path / "unbroken"), rtol=1e-3)
    expected, found = (metrics(tmp_path / name, "loss_scale") for name in ("unbroken", "road"))
    assert found == expected
    assert len(set(expected)) > 2


def train(
    workspace: Workspace,
    instructions: bool,
    framework: str,
    layout: str,
    until: int,
    save: Path,
    settings: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """The same command each time, but for backend and layout; it goes on from `save`."""
    flags, processes = LAYOUTS[layout]
    values = {
        "ai-framework": framework,
        "device": "cpu",
        "load": workspace.hf,
        "data-path": workspace.instructions if instructions else f"{workspace.text}_text_document",
        "split": "100,0,0",
        "seq-length": 32,
        "micro-batch-size": 2,
        "global-batch-size": 8,
        "train-iters": 12,
        "exit-interval": until,
        "lr": 1e-3,
        "eval-iters": 0,
        "save": save,
        **flags,
        **settings,
    }
    words = [
        word for name, value in values.items() for word in ([f"--{name}"] + ([] if value is None else [str(value)]))
    ]
    command = ["finetune" if instructions else "pretrain", *map(str, words)]
    save.mkdir(exist_ok=True)
    if processes == 1:
        assert main(command) == 0
        return
    done = subprocess.run(
        [*launcher(framework, processes, forked=True), "-m", "tandem", *command],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def losses(folder: Path) -> list[float]:
    return metrics(folder, "loss")


def metrics(folder: Path, name: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["iteration"] for record in records] == list(range(1, len(records) + 1))
    return [record[name] for record in records]
