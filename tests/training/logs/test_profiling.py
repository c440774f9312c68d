"""`--profile`: which steps, what of them, and that it is kept."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tandem.errors import UserError
from tandem.training.logs.log import StepRecord
from tandem.training.logs.profiling import read_profiles
from tandem.training.run import train
from workspace import Workspace

MODULES = {
    "torch": {"linear layers", "norms", "attention", "SwiGLU", "head and loss", "optimizer", "gradient norm"},
    "mindspore": {"linear layers, head", "attention", "optimizer", "outside operators"},
}


def test_a_run_tells_where_the_time_of_its_profiled_steps_went(
    workspace: Workspace, framework: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds: list[float] = []

    def keep(record: StepRecord) -> None:
        seconds.append(record.seconds)

    settings = workspace.settings(
        framework,
        train_iters=5,
        lr_warmup_iters=0,
        save=str(tmp_path),
        profile=True,
        profile_step_start=2,
        profile_step_end=4,
    )
    train(settings, keep)
    (profile,) = read_profiles(tmp_path)
    assert (profile["first"], profile["last"]) == (3, 4)
    assert profile["seconds"].keys() >= MODULES[framework]
    assert Path(profile["trace"]).exists()
    # Several threads may be busy at once, and steps are not all that happens.
    assert 0.2 * sum(seconds[2:4]) < sum(profile["seconds"].values()) < 4 * sum(seconds[2:4]) + 1
    assert "profile of iterations 3 to 4" in capsys.readouterr().out


def test_every_function_of_a_model_has_a_module() -> None:
    """But what begins a chunk, and the ends of what ranks share, which are collectives inside."""
    torch = pytest.importorskip("torch")
    importlib.import_module("tandem.backends.torch.engine")
    profiling = importlib.import_module("tandem.backends.torch.profiling")
    functions = [kind for kind in torch.autograd.Function.__subclasses__() if kind.__module__.startswith("tandem.")]
    modules = {
        kind.__name__: profiling.module_of(SimpleNamespace(name=kind.__name__, cpu_parent=None)) for kind in functions
    }
    assert {name for name, module in modules.items() if module == profiling.REST} == {"_Begin", "_Enter", "_Leave"}
    assert {modules[name] for name in ("_Linear", "_AdaptedLinear", "_EnteredLinear")} == {"linear layers"}
    assert (modules["_Mixture"], modules["_Flash"]) == ("experts", "attention")


def test_names_of_parts_are_no_kernels() -> None:
    torch = pytest.importorskip("torch")
    profiling = importlib.import_module("tandem.backends.torch.profiling")

    def event(name: str, device: object, *, annotated: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotated, cpu_parent=None)

    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    names = [event("optimizer", cpu, annotated=True), event("optimizer", cuda, annotated=True)]
    assert profiling.count([*names, event("aten::mm", cpu)]) == {"operators": 1}
    there = [event("gemm", cuda), event("Memcpy HtoD", cuda), event("cudaStreamSynchronize", cpu)]
    assert profiling.count([*names, *there]) == {"kernels": 1, "copies to the device": 1, "waits": 1}


def test_the_start_of_a_profiler_belongs_to_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the start of MindSpore's took two seconds: twenty times as long as the step."""
    profiling = pytest.importorskip("tandem.backends.mindspore.profiling")
    start, begun = profiling.profile.start, []

    def slow(self: object) -> None:
        start(self)
        time.sleep(1)
        begun.append(time.perf_counter())

    monkeypatch.setattr(profiling.profile, "start", slow)
    profiler = profiling.start(tmp_path / "profile")
    ms = profiling.ms
    ms.ops.matmul(ms.ops.ones((8, 8)), ms.ops.ones((8, 8))).asnumpy()
    spent = time.perf_counter() - begun[0]
    seconds, _ = profiler.stop()
    assert 0 < sum(seconds.values()) < spent + 0.5


def test_a_profile_that_is_not_whole_is_said(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends inside the profiled steps, before them, or goes on after them."""
    common = {"lr_warmup_iters": 0, "profile": True, "profile_step_end": 9, "save": str(tmp_path)}
    for train_iters, first, said in (
        (3, 1, "the run ended inside them"),
        (4, 8, "the run ended before them"),
        (5, 1, "goes on after iteration 4, so nothing is profiled"),
    ):
        train(workspace.settings("torch", train_iters=train_iters, profile_step_start=first, **common))
        out = capsys.readouterr().out
        assert f"--profile of iterations {first + 1} to 9" in out
        assert said in out
        assert read_profiles(tmp_path) == []


@pytest.mark.parametrize(
    ("values", "named"),
    [({"profile_step_start": 12}, "start < end"), ({"save": None}, "--profile-save-path")],
)
def test_wrong_profiles_are_refused(workspace: Workspace, tmp_path: Path, values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        train(workspace.settings("torch", **{"profile": True, "save": str(tmp_path), **values}))
