"""YAML of settings: variables and the home folder, and a key twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.cli.settings import parse_settings
from tandem.config.parsing import from_dict, from_yaml
from tandem.errors import UserError


def test_the_home_folder_and_variables_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUN", "third")
    file = tmp_path / "run.yaml"
    file.write_text("save: ~/runs/${RUN}\nload: ${HOME}/m\ndata_path: [1, '${HOME}/a']\nwandb-exp-name: ${RUN}\n")
    settings = from_yaml(file)
    assert (settings.checkpoint.save, settings.checkpoint.load) == ("/home/me/runs/third", "/home/me/m")
    assert settings.data.data_path == ("1", "/home/me/a")
    assert settings.logging.wandb_exp_name == "third"


def test_a_variable_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "run.yaml").write_text("checkpoint:\n  save: ${NOWHERE}/x\n")
    with pytest.raises(UserError, match=r"run\.yaml: checkpoint: save .*NOWHERE is not set"):
        from_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lr: 1\nseed: 2\nlr: 3\n", r"run\.yaml:3: lr is also given in line 1"),
        ("optimizer:\n  lr: 1\n  lr: 2\n", r"run\.yaml:3: lr is also given in line 2"),
        ("optimizer:\n  lr: 1\nlr: 2\n", r"lr is also given in .*group optimizer"),
        ("train-iters: 1\ntrain_iters: 2\n", "train_iters is also given"),
    ],
)
def test_a_key_that_is_given_twice_is_an_error(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=named):
        from_yaml(tmp_path / "run.yaml")


def test_anchors_and_merged_keys_still_work(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "optimizer: &o\n  lr: 1\ntraining:\n  seed: 3\nlogging:\n  <<: {log_interval: 4}\n"
    )
    settings = from_yaml(tmp_path / "run.yaml")
    assert (settings.optimizer.lr, settings.logging.log_interval) == (1.0, 4)


@pytest.mark.parametrize("path", ["$HOME/x", "/data/$USER", "a=$HOME/x"])
def test_a_variable_without_braces_is_no_folder(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the name `$HOME` was made. The error's own spelling works, and so does a folder of that name."""
    name = path.rpartition("$")[2].partition("/")[0]
    file = tmp_path / "run.yaml"
    for text in (f"save: {path}\n", f"checkpoint:\n  save: {path}\n", f"valid_data_path: ['{path}']\n"):
        file.write_text(text)
        with pytest.raises(UserError, match=rf"\${name} stands for no .* write \${{{name}}}"):
            from_yaml(file)
    with pytest.raises(UserError, match=r"--save .*leave out single quotes"):
        parse_settings("pretrain", "", ["--save", path], first=())
    monkeypatch.setenv(name, "home")
    file.write_text(f"save: {path.replace(name, f'{{{name}}}')}\n")
    assert from_yaml(file).checkpoint.save == path.replace(f"${name}", "home")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$HOME").mkdir()
    file.write_text("save: $HOME/x\n")
    assert from_yaml(file).checkpoint.save == "$HOME/x"


def test_plain_values_may_hold_a_dollar() -> None:
    assert from_dict({"save": "a${B}"}, "run.json").checkpoint.save == "a${B}"
