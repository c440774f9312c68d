"""TensorBoard, W&B and the live view: what they show, and that they are closed whatever happens."""

from __future__ import annotations

import builtins
import io
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steps import step_record
from tandem.config.settings import LoggingSettings
from tandem.errors import UserError
from tandem.training.logs.live import LiveView, sparkline
from tandem.training.logs.log import StepRecord
from tandem.training.logs.loggers import LoggedRun, step_loggers
from tandem.training.logs.scalars import scalars
from tandem.training.logs.tensorboard import TensorBoardWriter
from tandem.training.logs.wandb import WandbRun
from tandem.training.run import train
from workspace import Workspace

RUN = LoggedRun("torch", iteration=0, folder=None, settings={})


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars_have_megatrons_tags() -> None:
    values = scalars(step_record(validation={"validation": 2.0, "code": 1.0}))
    assert {"lm loss", "learning-rate", "batch-size", "grad-norm", "loss-scale", "iteration-time", "throughput"} <= set(
        values
    )
    assert values["lm loss validation ppl"] == pytest.approx(7.389, abs=1e-3)
    assert values["lm loss validation code"] == 1.0
    assert "mfu" not in scalars(step_record(peak_flops=None))


def test_preferences_have_trls_tags_and_no_perplexity() -> None:
    metrics = {"rewards/chosen": 0.5, "rewards/accuracies": 0.75}
    record = step_record(
        validation={"validation": 0.6, "held": 0.7},
        metrics=metrics,
        validation_metrics={"validation": metrics, "held": {"rewards/accuracies": 0.25}},
    )
    values = scalars(record)
    assert (values["rewards/chosen"], values["rewards/accuracies"]) == (0.5, 0.75)
    assert values["eval_rewards/chosen"] == 0.5
    assert values["eval_held_rewards/accuracies"] == 0.25
    assert values["lm loss validation"] == 0.6
    assert not [tag for tag in values if "ppl" in tag]


def test_tensorboard_reads_a_run_and_forgets_unsaved_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for start, stop in ((0, 5), (3, 6)):
        writer = TensorBoardWriter(str(tmp_path), 1, start)
        for iteration in range(start + 1, stop + 1):
            writer.on_step(step_record(iteration, loss=float(iteration + 10 * start)))
        writer.close()
    assert points(tmp_path)["lm loss"] == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36)]


def test_tensorboard_interval_keeps_every_evaluation(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    writer = TensorBoardWriter(str(tmp_path), 4, 0)
    for iteration in range(1, 9):
        writer.on_step(step_record(iteration, validation={"validation": 2.0} if iteration == 6 else {}))
    writer.close()
    assert [step for step, _ in points(tmp_path)["lm loss"]] == [4, 6, 8]


def test_a_run_writes_what_it_is_asked_for(workspace: Workspace, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    records: list = []
    folder = str(tmp_path / "tb")
    train(workspace.settings("torch", train_iters=3, lr_warmup_iters=0, tensorboard_dir=folder), records.append)
    assert points(tmp_path / "tb")["lm loss"] == [(r.iteration, pytest.approx(r.loss)) for r in records]


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboard", lambda: TensorBoardWriter("x", 1, 0)),
        ("wandb", lambda: WandbRun(LoggingSettings(wandb_project="p"), None, {})),
    ],
)
def test_a_missing_library_is_named_with_its_command(
    package: str, make: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"pip install 'tandem-llm\[{package}\]'"):
        make()


def offline_runs(folder: Path) -> list[list[Any]]:
    """What `wandb sync` would send of each run, oldest first."""
    import wandb

    wandb.teardown()  # a process of its own writes the files, which offline nothing but this waits for
    return [
        list(wandb_records(path)) for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime)
    ]


def wandb_records(path: Path) -> Iterator[Any]:
    """wandb has no reader of its own in Python: 7 bytes of header, then LevelDB's log format, with fragments of
    records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = path.read_bytes(), 7, b""
    while position < len(data):
        room = 2**15 - position % 2**15
        if room < 7:
            position += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or its last fragment
            yield Record.FromString(record)
            record = b""


def wandb_config(records: list[Any]) -> dict[str, Any]:
    (run,) = (record.run for record in records if record.HasField("run"))
    return {item.key: json.loads(item.value_json) for item in run.config.update}


def wandb_steps(records: list[Any]) -> list[dict[str, float]]:
    histories = [record.history for record in records if record.HasField("history")]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in history.item} for history in histories]


def wandb_exit(records: list[Any]) -> int:
    (code,) = (record.exit.exit_code for record in records if record.HasField("exit"))
    return code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The library, told to send nothing, for someone who is not logged in."""
    library = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'tandem-llm[wandb]'")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    library.teardown()  # it keeps what the environment said


@pytest.mark.usefixtures("wandb")
def test_wandb_gets_settings_and_steps(workspace: Workspace, tmp_path: Path) -> None:
    """Each process that resumes is a run of its own, with the steps that it computed."""
    options = {"train_iters": 5, "lr_warmup_iters": 0, "wandb_project": "p", "wandb_exp_name": "n"}
    records: list[StepRecord] = []
    for exit_interval in (3, None):
        train(workspace.settings("torch", save=str(tmp_path), exit_interval=exit_interval, **options), records.append)
    runs = offline_runs(tmp_path / "wandb")
    for run in runs:
        (start,) = (record.run for record in run if record.HasField("run"))
        assert (start.project, start.display_name, start.run_group) == ("p", "n", "n")
        assert wandb_config(run)["training"]["train_iters"] == 5
        assert wandb_exit(run) == 0
    assert [[step["_step"] for step in wandb_steps(run)] for run in runs] == [[1, 2, 3], [4, 5]]
    for step, record in zip([step for run in runs for step in wandb_steps(run)], records, strict=True):
        expected = scalars(record)
        assert {name: step[name] for name in expected} == expected


@pytest.mark.usefixtures("wandb")
def test_wandb_that_refuses_ends_the_run_before_it_begins(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    records: list[StepRecord] = []
    values = {"train_iters": 1, "lr_warmup_iters": 0, "wandb_project": "p", "wandb_save_dir": str(tmp_path)}
    with pytest.raises(UserError, match="--wandb-project p: No API key"):
        train(workspace.settings("torch", **values), records.append)
    assert not records


@pytest.mark.usefixtures("wandb")
def test_a_run_that_fails_is_closed_and_has_failed_on_wandb(tmp_path: Path) -> None:
    logging = LoggingSettings(wandb_project="p", wandb_save_dir=str(tmp_path), no_live_view=True)
    with pytest.raises(RuntimeError), step_loggers(logging, RUN):
        raise RuntimeError
    (records,) = offline_runs(tmp_path)
    assert wandb_exit(records) == 1


def test_the_live_view_shows_where_the_run_stands() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    view = LiveView(console)
    view.on_step(step_record(7, validation={"code": 2.0}))
    view.on_step(step_record(8, loss=0.625))
    view.close()
    plain = Console(file=io.StringIO(), width=100)
    plain.print(view.render())
    shown = plain.file.getvalue()  # type: ignore[attr-defined]
    for part in ("step 8 of 100", "loss 0.6250", "2,000 tokens/s", "1,200 trained", "MFU 50.0%", "perplexity 7.389"):
        assert part in shown, shown
    assert "0:00:46 left" in shown  # 92 steps of half a second


@pytest.mark.parametrize(
    ("terminal", "off", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_the_live_view_is_for_terminals_and_can_be_turned_off(
    terminal: bool, off: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list = []

    class View:
        def __init__(self) -> None:
            opened.append(self)

        def on_step(self, record: object) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("tandem.training.logs.loggers.LiveView", View)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    with step_loggers(LoggingSettings(no_live_view=off), RUN):
        pass
    assert bool(opened) == shown


def test_sparkline_means_stretches() -> None:
    assert sparkline([0.0, 1.0], 10) == "▁█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3.0, 3.0], 2) == "▁▁"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_live_view_outlives_a_bad_step(bad: float) -> None:
    """With --on-bad-step skip a run goes on, and so does what shows it."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    view = LiveView(console)
    view.on_step(step_record(1, loss=bad))
    view.render()
    view.on_step(step_record(2, loss=0.5))
    view.on_step(step_record(3, loss=bad))
    view.close()


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_view_shows_every_row(width: int) -> None:
    """The bar has a line of its own, and no value is cut."""
    view = LiveView(Console(width=width, file=io.StringIO()))
    try:
        for iteration in range(1, 30):
            view.on_step(step_record(iteration, loss=3.25, validation={"validation": 2.0}))
        out = io.StringIO()
        Console(width=width, file=out).print(view.render())
    finally:
        view.close()
    lines = out.getvalue().splitlines()
    assert "step 29 of 100" in lines[0]
    assert "━" in lines[1]
    assert "loss" not in lines[1]
    assert "loss 3.2500" in lines[2]
    for value in ("grad norm 1.500", "tokens/s", "MFU 50.0%", "GB", "loss 2.0000", "perplexity 7.389"):
        assert value in out.getvalue()
