"""What people type: switches both ways, names of other tools, words without a flag, and keys like Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tandem
from tandem import other_names
from tandem.__main__ import main
from tandem.cli.arguments import _given as given
from tandem.cli.arguments import parse
from tandem.cli.generate import GenerateOptions
from tandem.cli.preprocess import PreprocessFlags
from tandem.cli.settings import parse_settings
from tandem.config.checks import OF_STAGES
from tandem.config.parsing import to_yaml
from tandem.config.settings import PreferenceSettings, Settings
from tandem.conversion.options import ConvertOptions, ExportOptions
from tandem.errors import UserError
from tandem.options import flag_of, opposite, options_of
from tandem.planning.options import PlanOptions
from tandem.quickstart.run import QuickstartOptions
from tandem.training.rerun import RerunOptions
from workspace import Workspace

COMMANDS = (
    *(Settings, ConvertOptions, ExportOptions, PreprocessFlags, GenerateOptions, PlanOptions),
    *(QuickstartOptions, RerunOptions),
)


def settings(*words: str) -> Settings:
    return parse_settings("pretrain", "", words)[0]


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_switch_has_a_flag_for_true_and_one_for_false(kind: type) -> None:
    options = options_of(kind)
    flags = {flag for option in options.values() for flag in option.flags}
    for name, option in options.items():
        if option.is_switch:
            for flag in option.flags:
                assert given(options, [flag], {}, str, may_be_values=False) == ({name: True}, [])
                if opposite(flag) not in flags:  # --verify and --no-verify are two options
                    assert given(options, [opposite(flag)], {}, str, may_be_values=False) == ({name: False}, [])


def test_a_switch_of_a_file_can_be_given_again_and_turned_off(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("bf16: true\nno-shuffle: true\n")
    for words, bf16, no_shuffle in (
        (["--bf16"], True, True),
        (["--no-bf16", "--shuffle"], False, False),
        (["--no_bf16", "--bf16"], True, True),  # the last one counts, as for every flag
    ):
        read = settings("--config", str(file), *words)
        assert (read.training.bf16, read.data.no_shuffle) == (bf16, no_shuffle)


@pytest.mark.parametrize("words", [["--bf16", "true"], ["--bf16=false"], ["--no-bf16", "True"]])
def test_a_value_for_a_switch_is_answered_with_both_flags(words: list[str]) -> None:
    with pytest.raises(UserError, match="takes no value") as error:
        settings(*words)
    assert set(error.value.flags) == {"--bf16", "--no-bf16"}


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("pretrain --model X", "--load"),
        ("pretrain --data Y", "--data-path"),
        ("pretrain --learning-rate 1", "--lr"),
        ("finetune --output_dir x", "--save"),
        ("finetune --per_device_train_batch_size=4", "--micro-batch-size"),
        ("convert --model x", "--load"),
        ("inspect checkpoint --model x", "--load"),
        ("convert --tp 2", "--target-tensor-parallel-size"),
        ("preprocess --train-file x", "--input"),
        ("generate x --max-tokens 4", "--max-new-tokens"),
        ("export x --output-dir y", "--save-dir"),
        ("quickstart --framework torch", "--backend"),
        ("pretrain --train-itrs 3", "--train-iters"),
    ],
)
def test_the_name_of_another_tool_is_answered_with_ours(
    line: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert f"did you mean {flag!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("--gradient-accumulation-steps", "'--global-batch-size', which is micro-batch size x accumulation x data-"),
        ("--simpo-gamma", "'--gamma-beta-ratio', which is simpo_gamma / beta?"),
        ("--beta", "'--dpo-beta', or that of another stage: orpo, simpo and kto have their own?"),
    ],
)
def test_a_name_with_another_value_is_answered_with_what_ours_is(
    name: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", name, "3"]) == 2
    assert f"did you mean {told}" in capsys.readouterr().err


def test_every_suggested_name_is_an_option_and_no_option_has_another_meaning() -> None:
    known = {flag for kind in COMMANDS for option in options_of(kind).values() for flag in option.flags}
    known |= {"--output"}  # of `tandem report`
    assert {flag_of(name) for names in other_names.OTHER_NAMES.values() for name in names} <= known
    assert {flag_of(name) for name, _ in other_names.OTHER_VALUES.values()} <= known


@pytest.mark.parametrize(
    "command",
    [
        *("pretrain", "finetune", "evaluate", "generate", "chat", "serve", "export", "convert", "verify", "plan"),
        "inspect checkpoint",
    ],
)
def test_a_model_is_the_first_word_or_load(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways end in the same error, which is about the model, or about what else is missing."""
    errors = []
    for words in (["nowhere/m"], ["--load", "nowhere/m"]):
        assert main([*command.split(), *words]) == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1]
    assert "unknown flag" not in errors[0]
    assert "give either --load" not in errors[0]


def test_names_of_other_tools_in_yaml_and_python(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1\noptimizer:\n  max_grad_norm: 1\n")
    with pytest.raises(UserError, match=r"max_grad_norm.*did you mean 'clip_grad'"):
        settings("--config", str(file))
    file.write_text("learning_rate: 1\n")
    with pytest.raises(UserError, match=r"run\.yaml: learning_rate.*did you mean 'lr'"):
        settings("--config", str(file))
    with pytest.raises(UserError, match="did you mean 'lr'"):
        Settings(learning_rate=1)


@pytest.mark.parametrize("line", ["pretrain run.yaml", "finetune --lr 1 run.yml"])
def test_a_recipe_without_its_flag_is_answered_with_the_flag(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert f"--config {line.split()[-1]}" in capsys.readouterr().err


def test_folders_and_prompts_need_no_flag(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(workspace.hf), str(tmp_path / "m"), "--no-verify"]) == 0
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "hf"), "--no-verify"]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "hf"), "hi", "you", "--max-new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert out.index("> hi") < out.index("> you")


@pytest.mark.parametrize("words", [["--load", "m", "hi", "you"], ["hi", "you", "--load=m"], ["m", "hi", "you"]])
def test_what_a_flag_gives_takes_no_word(words: list[str]) -> None:
    read = parse(GenerateOptions, "generate", "", words)
    assert (read.model.load, [*read.prompt]) == ("m", ["hi", "you"])


def test_a_word_more_than_flags_have_left_room_for_is_named() -> None:
    with pytest.raises(UserError, match=r"^b: .*--save-dir gives TARGET already"):
        parse(ConvertOptions, "convert", "", ["a", "b", "--save-dir", "c"])


def test_prompts_are_asked_for_on_a_terminal(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Typed("hi\n\nyou\n"))
    assert main(["generate", str(workspace.hf), "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("> ") == 4  # two answers, an empty line, the end of input
    assert printed.err.count("> keys and values: up to ") == 1


@pytest.mark.parametrize("words", [["--save", "~nobody-here/x"], ["--valid-data-path", "a=~nobody-here/x"]])
def test_the_home_of_an_unknown_user_is_no_folder_named_so(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"no user nobody-here.* give \./~nobody-here/x") as error:
        settings(*words)
    assert words[0] in error.value.flags


# --- ends that are not errors of the code


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tandem.cli.report.read_runs", interrupted)
    assert main(["report", "x"]) == 130
    assert capsys.readouterr().err == "tandem report: interrupted\n"


def test_ctrl_c_at_a_prompt(workspace: Workspace) -> None:
    """A real terminal, a real signal."""
    terminal, other = pty.openpty()
    command = [sys.executable, "-m", "tandem", "generate", str(workspace.hf)]
    with subprocess.Popen(command, stdin=other, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.set_blocking(process.stdout.fileno(), True)
        assert b"Ctrl-D" in process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b"tandem generate: interrupted\n"
    os.close(terminal)
    os.close(other)


def test_a_name_that_is_too_long_and_a_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / ("x" * 300)
    for line in (["generate", str(long), "hi"], ["inspect", "checkpoint", str(long)], ["convert", str(long), "y"]):
        assert main(line) == 2
        assert "File name too long" in capsys.readouterr().err

    def refused(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied", "model/config.json")

    monkeypatch.setattr(Path, "read_bytes", refused)
    (tmp_path / "config.json").write_text("{}")
    assert main(["plan", str(tmp_path)]) == 2
    assert "chmod" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune", "--dpo-beta", "0.1"], "--dpo-beta 0.1: is for --stage dpo, and this is --stage sft"),
        (
            ["finetune", "--stage", "simpo", "--dpo_beta=0.1"],
            "--dpo-beta 0.1: is for --stage dpo, and this is --stage simpo",
        ),
        (["finetune", "--refer-model-iter", "2"], "--refer-model-iter 2: is for --stage dpo or kto, and this is"),
        (
            ["finetune", "--stage", "simpo", "--refer-model-iter", "2"],
            "--refer-model-iter 2: is for --stage dpo or kto",
        ),
        (["evaluate", "--stage", "dpo", "--orpo-beta", "0.1", "M", "D"], "--orpo-beta 0.1: is for --stage orpo"),
    ],
)
def test_a_flag_of_another_stage_is_refused_even_with_its_default(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_every_setting_of_preferences_has_its_stages() -> None:
    assert {name for names in OF_STAGES.values() for name in names} == set(options_of(PreferenceSettings))


def test_a_setting_of_another_stage_is_refused_in_files_and_python_too(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("stage: simpo\ndpo_beta: 0.1\n")
    message = "--dpo-beta 0.1: is for --stage dpo, and this is --stage simpo"
    with pytest.raises(UserError, match=message):
        settings("--config", str(own))
    with pytest.raises(UserError, match=message):
        tandem.train(stage="simpo", dpo_beta=0.1)
    record = tmp_path / "record.yaml"
    record.write_text(to_yaml(Settings(stage="simpo")))
    assert settings("--config", str(record)).preferences.dpo_beta == 0.1


def test_a_folder_with_the_name_of_a_setting_is_no_flag() -> None:
    assert settings("--save", "ref-model", "--lr", "1").checkpoint.save == "ref-model"
