"""Every command, run as its user runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tandem.__main__ import COMMANDS, main
from workspace import Workspace


def tandem(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def test_the_four_steps_and_what_follows(
    workspace: Workspace, framework: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mcore, text, chat = tmp_path / "mcore", tmp_path / "text", tmp_path / "chat"
    tandem(
        *("convert", "--load-model-type", "hf", "--save-model-type", "mg", "--model-type-hf", "qwen3"),
        *("--load-dir", workspace.hf, "--save-dir", mcore),
        *("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2),
    )
    out = capsys.readouterr().out
    assert f"  successfully saved checkpoint from iteration       1 to {mcore}\nDone!\n" in out
    tokenizer = ("--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", workspace.hf)
    tandem("preprocess", "--input", workspace.corpus, "--output-prefix", text, *tokenizer, "--append-eod")
    tandem(
        *("preprocess", "--input", workspace.questions, "--output-prefix", chat, *tokenizer),
        *("--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3", "--seq-length", 64),
    )
    assert sorted(path.name for path in tmp_path.glob("*.idx")) == [
        "chat_packed_attention_mask_document.idx",
        "chat_packed_input_ids_document.idx",
        "chat_packed_labels_document.idx",
        "text_text_document.idx",
    ]
    common = (
        *("--ai-framework", framework, "--seq-length", 32, "--micro-batch-size", 1, "--global-batch-size", 2),
        *("--train-iters", 2, "--lr", 1e-3, "--bf16", "--log-interval", 1, "--eval-iters", 0, "--use-flash-attn"),
    )
    tandem("pretrain", *common, "--load", mcore, "--save", tmp_path / "pre", "--data-path", f"{text}_text_document")
    tandem(
        "finetune", *common, "--load", tmp_path / "pre", "--finetune", "--save", tmp_path / "sft", "--data-path", chat
    )
    out = capsys.readouterr().out
    assert len(re.findall(r"iteration +\d+/ +2 \| .* lm loss: \d", out)) == 4
    assert "accepted, without effect here: --use-flash-attn" in out
    tandem("export", "--load", tmp_path / "sft", "--save-dir", tmp_path / "hf", "--params-dtype", "bf16")
    capsys.readouterr()
    for model in (tmp_path / "sft", tmp_path / "hf"):
        tandem("generate", "--load", model, "--ai-framework", framework, "--prompt", "Sort 31.", "--max-new-tokens", 3)
    assert capsys.readouterr().out.count("> Sort 31.") == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"tandem {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["pretrian"], "did you mean 'pretrain'"),
        (["pretrain", "--train-itrs", "3"], "--train-iters"),
        (["convert", "--load-dir", "x", "--save-dir", "y", "--target-tensor-paralel-size", "2"], "--target-tensor-par"),
        (["convert", "--load-dir", "/no/such", "--save-dir", "y"], "/no/such does not exist"),
        (["pretrain", "--spec", "other", "layer_spec"], "--spec"),
        (["pretrain", "--ai-framework", "torch", "--lr", "1"], "--train-iters is required"),
        (["pretrain", "--ai-framework", "jax", "--lr", "1"], "expected one of ['torch', 'mindspore', 'pytorch']"),
        (["pretrain", "--nnodes", "2"], "--nnodes 2 --node-rank 0: also give --nproc-per-node"),
    ],
)
def test_bad_input_exits_with_2_and_says_why(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as exit_:
        code = exit_.code  # type: ignore[assignment]
    assert code == 2
    assert named in " ".join(capsys.readouterr().err.split())


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
