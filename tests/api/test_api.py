"""Tandem from Python: every function does what its command does, says what is wrong, and prints nothing unasked."""

from __future__ import annotations

import ast
import inspect
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tandem
from tandem.checkpoints.describe import Description
from tandem.config.settings import Settings
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.statistics import Statistics
from tandem.errors import UserError
from tandem.options import options_of
from tandem.planning.run import LayoutPlan, Suggestions
from tandem.training.logs.metrics import read_metrics
from workspace import Workspace

FUNCTIONS = sorted(name for name in tandem.__all__ if inspect.isfunction(getattr(tandem, name)))
SHORT: dict[str, Any] = {"seq_length": 32, "micro_batch_size": 2, "train_iters": 2, "lr": 1e-3, "eval_iters": 0}


def test_every_function_has_a_docstring_and_the_flags_names_and_defaults() -> None:
    assert {"preprocess", "convert", "train", "pretrain", "finetune", "evaluate", "export", "plan", "inspect"} <= {
        *FUNCTIONS
    }
    for name in FUNCTIONS:
        assert inspect.getdoc(getattr(tandem, name)), name
    taken = inspect.signature(tandem.preprocess).parameters
    assert taken["over_long"].default == options_of(PreprocessOptions)["over_long"].default == "trim"
    settings = inspect.signature(tandem.train).parameters
    assert settings.keys() == {name for group in Settings().to_dict().values() for name in group}
    assert settings["seq_length"].default == 4096


def test_from_text_to_an_answer(workspace: Workspace, tmp_path: Path, framework: str) -> None:
    data = tandem.preprocess(str(workspace.corpus), tmp_path / "text", workspace.hf, append_eod=True)
    assert data.prefixes == {"text": str(tmp_path / "text_text_document")}
    assert data.sequences > 0
    converted = tandem.convert(workspace.hf, tmp_path / "mcore", target_tensor_parallel_size=2, no_verify=True)
    assert (converted.folder, converted.iteration) == (tmp_path / "mcore", 1)

    run = tandem.pretrain(
        load=converted.folder,
        data_path=data.prefixes["text"],
        save=tmp_path / "run",
        ai_framework=framework,
        **SHORT,
    )
    recorded = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert run.losses == [step["loss"] for step in recorded]
    assert (run.iteration, len(run.losses), run.save) == (2, 2, tmp_path / "run")

    (result,) = tandem.evaluate(run.save, data.prefixes["text"], seq_length=32, ai_framework=framework).values()
    assert 0 < result.loss < run.losses[0]  # type: ignore[union-attr]
    exported = tandem.export(run.save, tmp_path / "hf", no_verify=True)
    model = tandem.load(exported.folder, ai_framework=framework)
    one, several = model.generate("Reverse 12.", max_new_tokens=3), model.generate(["a", "b"], max_new_tokens=2)
    assert isinstance(one, str)
    assert isinstance(several, list)
    assert len(several) == 2

    seen = tandem.inspect(tmp_path / "run")
    assert isinstance(seen, Description)
    assert seen.integrity.startswith("every slice has the sha256")
    assert isinstance(tandem.inspect(data.prefixes["text"]), Statistics)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("hf", "mcore", "run", "text.json", "text_text_document.bin", "text_text_document.idx")
    ]


def test_a_run_is_given_as_settings_too(workspace: Workspace) -> None:
    values = {"load": workspace.hf, "data_path": f"{workspace.text}_text_document", "ai_framework": "torch", **SHORT}
    pytest.importorskip("torch", reason="torch is not installed")
    assert tandem.train(Settings(**values)).losses == tandem.train(**values).losses


def test_processes_are_started_and_give_the_same_losses(workspace: Workspace, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    values = {"load": workspace.hf, "data_path": f"{workspace.text}_text_document", "ai_framework": "torch", **SHORT}
    with pytest.raises(UserError, match="--nproc-per-node 2: give --save"):
        tandem.train(nproc_per_node=2, **values)
    job = tandem.train(nproc_per_node=2, tensor_model_parallel_size=2, save=tmp_path / "run", **values)
    assert job.losses == pytest.approx(tandem.train(**values).losses, abs=1e-4)
    with pytest.raises(UserError, match="2 processes: expected a multiple"):
        tandem.train(nproc_per_node=2, pipeline_model_parallel_size=3, save=tmp_path / "other", **values)


def test_finetuning_takes_conversations(workspace: Workspace) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    values = {"load": workspace.hf, "ai_framework": "torch", **SHORT, "seq_length": 64}
    assert len(tandem.finetune(data_path=workspace.instructions, **values).losses) == 2
    with pytest.raises(UserError, match="these data are conversations, for `tandem finetune`"):
        tandem.pretrain(data_path=workspace.instructions, **values)


def test_planning_gives_objects() -> None:
    layout = tandem.plan("qwen3-0.6B", hardware="910b", bf16=True)
    assert isinstance(layout, LayoutPlan)
    assert layout.fits
    assert layout.peak == layout.memories[0].peak > 0
    suggestions = tandem.plan("qwen3-8B", hardware="910b", devices=16, global_batch_size=64, bf16=True)
    assert isinstance(suggestions, Suggestions)
    assert suggestions.plans[0].job.devices == 16


@pytest.mark.parametrize(
    ("call", "problems"),
    [
        (
            lambda: tandem.preprocess("x.jsonl", "y", "z", appendeod=True, seq_length="long"),  # type: ignore[call-arg]
            ("appendeod: unknown; did you mean 'append_eod'?", "seq_length='long': expected a whole number"),
        ),
        (
            lambda: tandem.convert("nowhere"),  # type: ignore[call-arg]
            ("save_dir is required: Target folder; must not hold anything yet",),
        ),
        (
            lambda: Settings(lrr=1, bf16="yes"),
            ("lrr: unknown; did you mean 'lr'?", "bf16='yes': expected true or false"),
        ),
        (
            lambda: tandem.preprocess("x", "y", "z", neat_pack=True, workers=0),
            ("--workers 0: expected 1 or more", "--neat-pack needs --pack; give both"),
        ),
    ],
)
def test_all_that_is_wrong_is_told_at_once(call: Any, problems: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as raised:
        call()
    assert raised.value.problems == problems


def test_what_the_functions_do_not_do_is_refused() -> None:
    for call, flag in (
        (lambda: tandem.train(dry_run=True), "--dry-run"),
        (lambda: tandem.evaluate("m", "d", nproc_per_node=2), "--nproc-per-node"),
    ):
        with pytest.raises(UserError) as raised:
            call()
        assert flag in raised.value.flags
    with pytest.raises(UserError, match="valid_data_path"):
        tandem.evaluate("m", "d", valid_data_path="e")


def test_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        tandem.load(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        tandem.convert(tmp_path, tmp_path / "x")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings(load="~/m", data_path=["0.3", "~/a", "0.7", "~/b"], valid_data_path="x=~/c")
    assert settings.checkpoint.load == f"{tmp_path}/m"
    assert settings.data.data_path == ("0.3", f"{tmp_path}/a", "0.7", f"{tmp_path}/b")
    assert settings.data.valid_data_path == (f"x={tmp_path}/c",)


QUIET = """
import sys
import tandem
hf, text = sys.argv[1:]
tandem.pretrain(load=hf, data_path=text, ai_framework="torch", seq_length=32, train_iters=1, lr=1e-3, eval_iters=0,
                log_interval=1)
"""


def test_nothing_is_printed_unless_it_is_asked_for(workspace: Workspace, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    words = [str(workspace.hf), f"{workspace.text}_text_document"]
    quiet = subprocess.run(
        [sys.executable, "-c", QUIET, *words], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert (quiet.stdout, quiet.stderr) == ("", "")
    assert not list(tmp_path.iterdir())
    asked = "import logging; logging.basicConfig(format='%(message)s', level=logging.INFO)\n" + QUIET
    spoken = subprocess.run(
        [sys.executable, "-c", asked, *words], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "iteration        1/       1" in spoken.stderr
    assert logging.getLogger("tandem").name == "tandem"


def test_importing_is_quick_because_it_imports_nothing() -> None:
    """No timing: what is loaded is counted."""
    names = ("numpy", "torch", "mindspore", "yaml", "rich")
    script = f"import sys, tandem; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []
    script = script.replace("import sys, tandem", "import sys; from tandem.__main__ import main; main(['--help'])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == []


def test_a_path_of_data_and_of_a_model_is_not_guessed(workspace: Workspace, tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(f"{workspace.text}_text_document.{suffix}", tmp_path / f"both.{suffix}")
    assert isinstance(tandem.inspect(tmp_path / "both"), Statistics)
    shutil.copytree(workspace.hf, tmp_path / "both")
    with pytest.raises(UserError, match="both is preprocessed data, and also a folder with a model"):
        tandem.inspect(tmp_path / "both")
