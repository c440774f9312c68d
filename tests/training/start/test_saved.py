"""The folder of --save is examined before anything is written there: damage is named, and nothing is replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runs import run
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.folders import RELEASE, TRACKER, iteration_folder
from tandem.checkpoints.native.format import INDEX
from tandem.checkpoints.prompt import PROMPT_FILE, prompt_entry
from tandem.conversion.convert import convert
from tandem.conversion.options import ConvertOptions
from tandem.errors import UserError
from tandem.launch.world import World
from tandem.training.start.prepare import ModelAndProcesses, check_model_and_processes, prepare
from tandem.training.start.state import SETTINGS_FILE, STATE_FILE
from workspace import Workspace

SHORT = {"lr_warmup_iters": 0, "train_iters": 6}


@pytest.fixture(scope="module")
def finished(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 iterations with the checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(workspace, "torch", save=str(folder), save_interval=2, **SHORT)
    return folder


@pytest.fixture
def saved(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def start(workspace: Workspace, **values: object) -> ModelAndProcesses:
    """What a run with these settings would start with."""
    return check_model_and_processes(workspace.settings("torch", **{**SHORT, **values}), World())


def without_tracker(folder: Path) -> str:
    (folder / TRACKER).unlink()
    return f"has no {TRACKER}"


def empty_tracker(folder: Path) -> str:
    (folder / TRACKER).write_text("")
    return "expected the number of an iteration"


def without_newest(folder: Path) -> str:
    shutil.rmtree(iteration_folder(folder, 6))
    return "names iteration 6, and iter_0000006 is missing"


def without(name: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        (iteration_folder(folder, 6) / name).unlink()
        return name

    return damage


def cut(name: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        file = iteration_folder(folder, 6) / name
        file.write_bytes(file.read_bytes()[: -file.stat().st_size // 2])
        return f"{name}: damaged"

    return damage


def binary(name: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        (iteration_folder(folder, 6) / name).write_bytes(b"\xff\xfe\0")
        return f"{name}: damaged"

    return damage


@pytest.mark.parametrize(
    ("damage", "iteration"),
    [
        (without_tracker, 6),
        (empty_tracker, 6),
        (without_newest, 4),
        (without(STATE_FILE), 4),
        (cut(STATE_FILE), 4),
        (binary(STATE_FILE), 4),
        (binary(SETTINGS_FILE), 4),
        (cut(INDEX), 4),
    ],
)
@pytest.mark.parametrize("command", ["same", "load"])
def test_damage_is_named_and_the_newest_whole_iteration_taken(
    workspace: Workspace,
    saved: Path,
    damage: Callable[[Path], str],
    iteration: int,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the same command, and by `--load SAVE`."""
    named = damage(saved)
    started = start(workspace, save=str(saved), **({"load": str(saved)} if command == "load" else {}))
    assert started.state is not None
    assert (started.state.iteration, started.source.iteration) == (iteration, iteration)
    out = capsys.readouterr().out
    assert named in out
    assert "; taking the" in out


def test_a_damaged_template_is_an_error_that_names_the_file(workspace: Workspace, tmp_path: Path) -> None:
    run(workspace, "torch", instructions=True, save=str(tmp_path), save_interval=1, train_iters=2, lr_warmup_iters=0)
    for content in ('{"name": "qwe', "[]"):
        (iteration_folder(tmp_path, 2) / PROMPT_FILE).write_text(content)
        with pytest.raises(UserError, match=rf"iter_0000002/{PROMPT_FILE}: damaged") as caught:
            prompt_entry(open_source(tmp_path))
        assert caught.value.flags == ("--ckpt-step",)
    assert prompt_entry(open_source(tmp_path, 1)) is not None  # what the error says


def test_a_state_that_is_gone_everywhere_ends_the_start(workspace: Workspace, saved: Path) -> None:
    for file in saved.rglob(STATE_FILE):
        file.unlink()
    for load in (str(workspace.hf), str(saved)):
        with pytest.raises(UserError, match=f"{STATE_FILE} is missing") as caught:
            start(workspace, load=load, save=str(saved))
        assert set(caught.value.flags) == {"--finetune", "--save"}
    again = start(workspace, load=str(saved), finetune=True, save=str(saved.parent / "new"))  # what the error says
    assert again.state is None


def test_a_tracker_alone_is_not_a_new_run(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("6")
    with pytest.raises(UserError, match=f"or remove {TRACKER} to begin again"):
        start(workspace, save=str(tmp_path))
    (tmp_path / TRACKER).unlink()
    assert start(workspace, save=str(tmp_path)).state is None


@pytest.mark.parametrize("link", [False, True])
def test_a_new_run_replaces_no_checkpoints(workspace: Workspace, saved: Path, link: bool) -> None:
    """Fine-tuning from the checkpoints in --save, also where a link leads there."""
    save = saved
    if link:
        save = saved.parent / "link"
        save.symlink_to(saved)
    with pytest.raises(UserError, match="begins at iteration 0: it would replace them") as caught:
        start(workspace, load=str(saved), finetune=True, save=str(save))
    assert caught.value.flags == ("--save",)
    assert start(workspace, load=str(saved), finetune=True, save=str(saved.parent / "new")).state is None


def test_the_weights_of_a_conversion_are_not_replaced(workspace: Workspace, tmp_path: Path) -> None:
    folder = str(tmp_path / "converted")
    convert(ConvertOptions(load_dir=str(workspace.hf), save_dir=folder))
    with pytest.raises(UserError, match="it would replace them"):
        start(workspace, load=folder, save=folder)
    assert start(workspace, load=folder, save=str(tmp_path / "run")).state is None


def test_the_folder_of_the_initial_weights_is_not_saved_to(workspace: Workspace, tmp_path: Path) -> None:
    hf = Path(shutil.copytree(workspace.hf, tmp_path / "hf"))
    with pytest.raises(UserError, match="holds a Hugging Face model") as caught:
        start(workspace, load=str(hf), save=f"{hf}/")
    assert caught.value.flags == ("--save",)
    for weights in hf.glob("*.safetensors"):  # a config and a tokenizer alone are nobody's weights
        weights.unlink()
    assert start(workspace, save=str(hf)).state is None


def test_an_iteration_is_not_the_folder_of_a_run(workspace: Workspace, finished: Path) -> None:
    with pytest.raises(UserError, match="is one iteration of a checkpoint"):
        start(workspace, save=str(iteration_folder(finished, 6)))


def test_a_folder_with_two_models_is_not_guessed(workspace: Workspace, saved: Path) -> None:
    for file in workspace.hf.iterdir():
        shutil.copy(file, saved / file.name)
    with pytest.raises(UserError, match="holds two models") as caught:
        open_source(saved)
    assert "--ckpt-step" in caught.value.flags
    with pytest.raises(UserError, match="holds two models"):
        start(workspace, load=str(saved), save=str(saved.parent / "new"))
    assert open_source(saved, 4).iteration == 4
    for weights in saved.glob("*.safetensors"):  # a copy of the config next to a run does no harm
        weights.unlink()
    assert open_source(saved).iteration == 6


def test_an_iteration_in_two_formats_is_not_guessed(workspace: Workspace, tmp_path: Path) -> None:
    for ckpt_format in ("native", "torch"):
        folder = tmp_path / ckpt_format
        convert(ConvertOptions(load_dir=str(workspace.hf), save_dir=str(folder), ckpt_format=ckpt_format))
    shutil.copytree(tmp_path / "torch", tmp_path / "native", dirs_exist_ok=True)
    with pytest.raises(UserError, match="holds two checkpoints"):
        open_source(tmp_path / "native")


def test_another_load_is_heard_after_a_resume_with_load_save(workspace: Workspace, saved: Path, tmp_path: Path) -> None:
    """The run remembers what it started from."""
    again = {"save": str(saved), "lr_warmup_iters": 0, "train_iters": 7}
    assert len(run(workspace, "torch", load=str(saved), **again)) == 1
    other = str(shutil.copytree(workspace.hf, tmp_path / "other"))
    with pytest.raises(UserError, match=r"another run, with load .*; here it is .*other") as caught:
        start(workspace, load=other, save=str(saved))
    assert caught.value.flags == ("--save", "--load")
    for load in (str(workspace.hf), str(saved)):  # the second is what the error says
        resumed = start(workspace, load=load, save=str(saved))
        assert resumed.state is not None
        assert resumed.state.iteration == 7
    with pytest.raises(UserError, match="another run, with init None; here it is random"):
        start(workspace, load=None, init="random", hf_cfg_dir=str(workspace.hf), save=str(saved))


def test_paths_in_any_spelling_are_the_same_run(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weights and of the data: with a slash, through a link, and from another folder."""
    project = tmp_path / "project"
    shutil.copytree(workspace.root, project)
    monkeypatch.chdir(project)
    text = f"{workspace.text.name}_text_document"
    run(workspace, "torch", load="hf", data_path=text, save="run", exit_interval=2, **SHORT)
    (tmp_path / "link").symlink_to(project)

    def goes_on(folder: Path, load: str, data_path: str, save: str) -> None:
        monkeypatch.chdir(folder)
        settings = workspace.settings("torch", **SHORT, load=load, data_path=data_path, save=save)
        prepared = prepare(settings, World())
        assert prepared.state is not None
        assert prepared.state.iteration == 2
        mixture = prepared.data.identity["mixture"]
        assert mixture["prefixes"] == [os.path.normpath(data_path)]
        assert len(mixture["segments"]) == 1

    goes_on(project, "./hf/", f"./{text}", "run/")
    goes_on(project, str(project / "hf"), str(project / text), str(project / "run"))
    goes_on(tmp_path, "link/hf", f"link/{text}", "link/run")
    with pytest.raises(
        UserError, match=rf"with load {project}/hf; here it is {workspace.root}/hf"
    ):  # the same words for something else
        goes_on(workspace.root, "hf", text, str(project / "run"))
    with pytest.raises(UserError, match=rf"with data_path {project}/\S+; here it is {workspace.root}/"):
        goes_on(workspace.root, str(project / "hf"), text, str(project / "run"))
    project.rename(tmp_path / "moved")  # a folder that moves takes its run along
    goes_on(tmp_path / "moved", "hf", text, "run")


def test_a_run_without_optimizer_goes_on_as_its_error_says(workspace: Workspace, tmp_path: Path) -> None:
    save, common = str(tmp_path / "run"), {"no_save_optim": True, **SHORT}
    run(workspace, "torch", save=save, exit_interval=2, **common)
    again = {"save": save, "exit_interval": 2, **common}
    with pytest.raises(UserError, match="contains no optimizer") as caught:
        run(workspace, "torch", **again)
    assert set(caught.value.flags) == {"--no-save-optim", "--no-load-optim", "--load", "--finetune", "--save"}
    assert len(run(workspace, "torch", no_load_optim=True, **again)) == 2
    assert len(run(workspace, "torch", no_load_optim=True, **{**again, "load": save})) == 2
    new = {"load": save, "finetune": True, "save": str(tmp_path / "new")}
    assert len(run(workspace, "torch", **{**common, **new})) == 6


def test_a_dropped_optimizer_is_dropped_once(workspace: Workspace, saved: Path) -> None:
    """`--load SAVE --no-load-optim --save SAVE` drops it at its first start, and keeps its own at the next."""
    common = {"load": str(saved), "save": str(saved), "no_load_optim": True, "lr_warmup_iters": 0, "train_iters": 12}
    assert start(workspace, **common).loading.no_load_optim
    run(workspace, "torch", exit_interval=7, **common)
    assert not start(workspace, **common).loading.no_load_optim


def test_the_seed_is_kept_as_its_notice_says(
    workspace: Workspace, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {**SHORT, "save": str(saved), "seed": 6}
    assert prepare(workspace.settings("torch", **common), World()).settings.training.seed != 6
    assert "--no-load-rng keeps yours" in capsys.readouterr().out
    settings = workspace.settings("torch", **common, no_load_rng=True)
    assert prepare(settings, World()).settings.training.seed == 6


def test_a_run_with_nothing_left_says_so_and_what_differs(
    workspace: Workspace, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {**SHORT, "save": str(saved), "lr": 1e-4, "seed": 6}
    assert run(workspace, "torch", **common) == []
    out = capsys.readouterr().out
    assert "nothing is left to train: the weights are from iteration 6 of 6" in out
    assert "replaces --seed 6" in out
    assert ["lr", "0.003", "0.0001"] in [line.split()[1:] for line in out.splitlines()]
    assert len(run(workspace, "torch", **{**common, "train_iters": 7})) == 1  # what it says
    assert len(run(workspace, "torch", **{**common, "save": f"{saved}-new"})) == 6


def test_a_learning_rate_that_jumps_is_said(
    workspace: Workspace, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cosine of 6 iterations had come to its end; that of 12 is in its middle."""
    said = "the learning rate of the next step is"
    common = {"save": str(saved), "lr_warmup_iters": 0, "exit_interval": 7}
    run(workspace, "torch", train_iters=12, **common)
    line = next(line for line in capsys.readouterr().out.splitlines() if said in line)
    assert "1.500000E-03; the settings of the checkpoint gave 0.000000E+00" in line
    run(workspace, "torch", train_iters=12, **common)
    assert said not in capsys.readouterr().out


def test_fine_tuning_that_goes_on_with_a_pretraining_is_said(
    workspace: Workspace, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"instructions": True, "load": str(saved), "save": str(tmp_path / "tuned"), "lr_warmup_iters": 0}
    assert run(workspace, "torch", train_iters=6, **common) == []
    out = capsys.readouterr().out
    assert "the checkpoint is of training on plain text, and this is on conversations" in out
    assert "--finetune begins at iteration 0" in out
    assert len(run(workspace, "torch", train_iters=1, finetune=True, **common)) == 1
    assert "the checkpoint is of training" not in capsys.readouterr().out


def test_a_release_is_not_continued(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "released"
    convert(ConvertOptions(load_dir=str(workspace.hf), save_dir=str(folder), ckpt_format="torch"))
    iteration_folder(folder, 1).rename(folder / RELEASE)
    (folder / TRACKER).write_text(RELEASE)
    with pytest.raises(UserError, match="it would replace them"):
        start(workspace, load=str(folder), save=str(folder))
