"""Folders of outputs are made where they are missing, whatever writes into them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.__main__ import main
from workspace import Workspace

SHORT = "--max-new-tokens 1 --device cpu --ai-framework torch"
# A command, and what it writes.
OUTPUTS = [
    ("convert --load-dir {hf} --save-dir {new} --no-verify", "{new}/latest_checkpointed_iteration.txt"),
    ("convert --load-dir {hf} --save-dir {new} --no-verify --ckpt-format torch", "{new}/iter_0000001"),
    ("export {hf} {new} --no-verify", "{new}/config.json"),
    ("preprocess --input {corpus} --output-prefix {new} --tokenizer-name-or-path {hf}", "{new}_text_document.idx"),
    ("inspect data {text}_text_document --show 0 --html {new}.html", "{new}.html"),
    (f"generate {{hf}} hi --output {{new}}.jsonl {SHORT}", "{new}.jsonl"),
    ("report {run} --output {new}.html", "{new}.html"),
    (
        "pretrain --load {hf} --data-path {corpus} --tokenizer-name-or-path {hf} --data-cache-path {new}/cache "
        "--seq-length 32 --micro-batch-size 2 --global-batch-size 2 --train-iters 2 --lr 1e-3 --split 100,0,0 "
        "--eval-iters 0 --device cpu --ai-framework torch --save {new}/save --tensorboard-dir {new}/tensorboard "
        "--profile --profile-step-start 1 --profile-step-end 2 --profile-save-path {new}/profile",
        "{new}/cache {new}/save/run.json {new}/tensorboard {new}/profile",
    ),
]


@pytest.fixture(scope="module")
def run(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_framework("torch")
    folder = tmp_path_factory.mktemp("output") / "run"
    line = (
        f"pretrain --load {workspace.hf} --data-path {workspace.text}_text_document --seq-length 32 --train-iters 1 "
        f"--lr 1e-3 --split 100,0,0 --eval-iters 0 --device cpu --ai-framework torch --save {folder}"
    )
    assert main(shlex.split(line)) == 0
    return folder


@pytest.mark.parametrize(("line", "written"), OUTPUTS, ids=[line.split(" ", 1)[0] for line, _ in OUTPUTS])
def test_missing_folders_are_made(line: str, written: str, workspace: Workspace, run: Path, tmp_path: Path) -> None:
    names = {
        "new": tmp_path / "not" / "there" / "yet",
        "hf": workspace.hf,
        "corpus": workspace.corpus,
        "text": workspace.text,
        "run": run,
    }
    assert main(shlex.split(line.format(**names))) == 0
    assert all(Path(path).exists() for path in written.format(**names).split())
