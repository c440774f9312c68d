"""Help and errors as recorded examples: whoever changes one sees it here.

To record again what is right: python tests/cli/test_help_and_errors.py
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.__main__ import COMMANDS, main

RECORDED = Path(__file__).with_name("recorded")
ONE_SCREEN = 60  # lines
ERRORS = {
    "several": "pretrain --train-itrs 3 --seq-length long --lr 1",
    "missing": "preprocess --over-long keep --workers 0",
    "together": "preprocess --input x --output-prefix y --tokenizer-name-or-path z --neat-pack --over-long drop",
    "settings": "pretrain --lr 1e-3 --fp16 --bf16 --global-batch-size 3 --micro-batch-size 2",
    "range": "finetune --micro-batch-size 0 --adam-beta2 1 --lr nan",
    "positional": "evaluate A B --load C",
    "word": "export run --save-dir x y",
    "choice": "convert --load-dir a --save-dir b --params-dtype int8",
    "no value": "rerun run --tolerance",
}


def output_of(line: str) -> str:
    """What `tandem LINE` prints, on a terminal of 100 columns, without paths of this machine."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(out),
        contextlib.suppress(SystemExit),
    ):
        patch.setenv("COLUMNS", "100")
        patch.setattr("tandem.frameworks.default_framework", lambda: "torch")
        main(line.split())
    return out.getvalue()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_is_as_recorded_and_fits_one_screen(command: str) -> None:
    line = "inspect checkpoint --help" if command == "inspect" else f"{command} --help"
    text = output_of(line)
    assert text == (RECORDED / f"{command}.txt").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= ONE_SCREEN


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_as_recorded(name: str) -> None:
    examples = (RECORDED / "errors.txt").read_text(encoding="utf-8")
    assert f"$ tandem {ERRORS[name]}\n{output_of(ERRORS[name])}" in examples


def test_all_options_are_listed_on_request() -> None:
    brief, whole = output_of("finetune --help"), output_of("finetune --help-all")
    assert "--lr-wsd-decay-iters" in whole
    assert "--lr-wsd-decay-iters" not in brief
    evaluate = output_of("evaluate --help-all")
    assert "--tensor-model-parallel-size" in evaluate
    assert "--clip-grad" not in evaluate


def test_words_come_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (f"report {tmp_path} --output x.html", f"report --output x.html {tmp_path}"):
        assert main(line.split()) == 2
        assert str(tmp_path) in capsys.readouterr().err
    for line in ("evaluate CKPT DATA --seq-length 64", "evaluate --seq-length 64 CKPT DATA"):
        assert main(line.split()) == 2
        assert "CKPT" in capsys.readouterr().err
    for line in (f"rerun {tmp_path} --tolerance 1e-4", f"rerun --tolerance 1e-4 {tmp_path}"):
        assert main(line.split()) == 2
        assert str(tmp_path) in capsys.readouterr().err


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data-path: ~/text\n")
    assert main(["export", "~/nothing", "--save-dir", "~/x"]) == 2
    assert f"{tmp_path}/nothing" in capsys.readouterr().err
    words = ["--config", "~/run.yaml", "--init", "random", "--lr", "1", "--train-iters", "1"]
    assert main(["pretrain", *words]) == 2
    assert f"{tmp_path}/text" in capsys.readouterr().err


def test_head_ends_it_quietly() -> None:
    script = [sys.executable, "-m", "tandem", "pretrain", "--help-all"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""


if __name__ == "__main__":
    os.chdir(RECORDED)
    for command in COMMANDS:
        line = "inspect checkpoint --help" if command == "inspect" else f"{command} --help"
        Path(f"{command}.txt").write_text(output_of(line), encoding="utf-8")
    examples = "\n".join(f"$ tandem {line}\n{output_of(line)}" for line in ERRORS.values())
    Path("errors.txt").write_text(examples, encoding="utf-8")
