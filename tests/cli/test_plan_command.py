"""`tandem plan`: one layout in full, suggestions, and errors that say what to do."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tandem.__main__ import main
from tandem.models.hf_config import to_hf
from toys import toy_config


def test_one_layout(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "2", "--data-parallel-size", "2"]
    more = ["--global-batch-size", "64", "--bf16", "--sequence-parallel", "--hardware", "910b"]
    assert main(["plan", "qwen3-8b", *layout, *more]) == 0
    output = capsys.readouterr().out
    assert "8.19 billion parameters, on 16 x 910b: bf16, sequences of 4,096 tokens, global batch 64" in output
    for expected in ("gradients", "optimizer", "activations", "logits", "fits:", "bubble", "MFU", "Assumed: "):
        assert expected in output


def test_fully_sharded(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "qwen3-8b", "--bf16", "--data-parallel-size", "8", "--global-batch-size", "64"]
    peaks, sent = [], []
    for more in ([], ["--use-torch-fsdp2"]):
        assert main([*given, *more]) == 0
        output = capsys.readouterr().out
        assert ("gathered: " in output) is bool(more)
        peaks.append(float(output.partition("fit")[2].partition(": ")[2].split()[0]))
        sent.append(float(re.search(r"Sent by a rank.*?\n│ 0 .*?│[^│]*│ *([\d.]+) │\n", output, re.DOTALL)[1]))  # type: ignore[index]
    assert peaks[1] < peaks[0]
    assert sent[1] > sent[0]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--pipeline-model-parallel-size 6 --global-batch-size 64", ("gathered", "stage 5", "activations")),
        ("--devices 16 --global-batch-size 64", ("FSDP2", "recompute", "tokens/s", "MFU")),
    ],
)
def test_nothing_is_cut_at_80_columns(
    words: str, shown: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tandem.cli.plan.PLAIN_WIDTH", 80)
    assert main(["plan", "qwen3-8b", "--bf16", *words.split()]) == 0
    output = capsys.readouterr().out
    assert "…" not in output
    assert all(len(line) <= 80 for line in output.splitlines() if not line.startswith("The first one"))
    assert all(part in output for part in shown)


@pytest.mark.parametrize(
    ("size", "hardware", "precision", "fully_sharded"), [("0.6B", "a3", "fp16", False), ("32B", "h100", "bf16", True)]
)
def test_suggestions_end_in_a_command_that_works(
    size: str, hardware: str, precision: str, fully_sharded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["plan", f"qwen3-{size}", "--hardware", hardware]
    assert main([*model, "--devices", "8", "--global-batch-size", "32", f"--{precision}"]) == 0
    suggested = capsys.readouterr().out
    command = re.search(r"The first one: tandem (.*)", suggested)
    assert command
    assert ("--use-torch-fsdp2" in command[1]) is fully_sharded
    assert main(shlex.split(command[1])) == 0
    assert f"on 8 x {hardware}: {precision}" in capsys.readouterr().out


def test_the_suggested_command_keeps_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tandem.cli.plan.PLAIN_WIDTH", 80)
    asked = ["--stage dpo", "--lora-target-modules all-linear", "--lora-r 8", "--seq-length 512", "--hardware 910b"]
    words = f"plan qwen3-30b-a3b --devices 2 --global-batch-size 16 --bf16 {' '.join(asked)}"
    assert main(words.split()) == 0
    suggested = capsys.readouterr().out
    assert "…" not in suggested
    rows = [line.split() for line in suggested.splitlines()]
    titles = next(row for row in rows if row[:1] == ["TP"])
    first = dict(zip(titles, rows[rows.index(titles) + 2]))
    command = re.search(r"The first one: tandem (.*)", suggested)
    assert command
    assert all(flags in command[1] for flags in asked)
    assert ("--expert-model-parallel-size" in command[1]) is (first["EP"] != "1")
    assert main(shlex.split(command[1])) == 0
    tokens_per_second = rows[rows.index(titles) + 2][-2]
    assert f"{tokens_per_second} tokens/s" in capsys.readouterr().out


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(toy_config())))
    assert main(["plan", str(tmp_path), "--hardware", "cpu", "--seq-length", "128"]) == 0
    assert "on 1 x cpu: fp32, sequences of 128 tokens, global batch 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen3-9B"], "Qwen3 has no size '9B': expected one of 0.6B, 1.7B"),
        (["gpt2"], "gpt2: neither a folder nor a published model; published: qwen3-0.6B, "),
        (["qwen3-8B", "--tensor-model-parallel-size", "3"], "-parallel-size 3: the model's num_query_groups 8"),
        (["qwen3-8B", "--data-parallel-size", "0"], "--data-parallel-size 0: expected 1 or more"),
        (["qwen3-8B", "--devices", "8"], "--devices needs --global-batch-size"),
        (["qwen3-8B", "--devices", "8", "--micro-batch-size", "2"], "--micro-batch-size fixes it"),
        (["qwen3-8B", "--hardware", "cpu", "--bf16"], "--bf16, --fp16: this device is not faster in half precision"),
        (["qwen3-8B", "--bf16", "--fp16"], "--fp16 and --bf16 exclude each other"),
        (["qwen3-8B", "--efficiency", "60"], "--efficiency 60.0: expected a share"),
        (["qwen3-32B", "--devices", "1", "--global-batch-size", "8"], "no layout of 1 x h100 fits"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
