"""A path that is not what a command needs is described as what it is, with the step that helps."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tandem.__main__ import main
from workspace import Workspace

PREPROCESS = "preprocess --input {corpus} --output-prefix {root}/x --tokenizer-name-or-path"
TRAIN = "pretrain --load {hf} --seq-length 32 --train-iters 1 --lr 1e-3 --data-path"
CASES = [
    ("verify {root}/absent", "{root}/absent does not exist: expected a folder that `tandem export` wrote"),
    ("verify {root}/absent/certificate.json", "{root}/absent does not exist"),
    ("verify {hf}", "{hf} holds no certificate.json: only `tandem export` writes it"),
    ("verify {root}/run", "{root}/run is a run, which is not verified: export it first"),
    ("verify {hf}/config.json", "{hf}/config.json is a file: expected a folder"),
    ("verify {root}/other", "{root}/other/certificate.json: not a certificate of Tandem: export again"),
    ("inspect data {corpus}", "{corpus}: this is a raw file: preprocess it first with `tandem preprocess --input"),
    ("inspect data {root}/raw", "{root}/raw: is a folder of raw files: preprocess it first"),
    ("inspect data {root}/run", "{root}/run: is the folder of a run or a checkpoint, and not of data"),
    ("inspect data {hf}", "{hf}: is the folder of a model, and not of data"),
    ("inspect data {hf}/tokenizer.json.old", "is a file, and no data"),
    ("inspect data {root}/empty", "{root}/empty: is a folder without data"),
    ("inspect data {text}_text_document.idx", "_text_document.idx: expected a prefix: leave out .idx"),
    ("inspect data {chat}_packed_labels_document.idx", "expected a prefix: give {chat}"),
    ("inspect data {text}", "give {text}_text_document, as {text}.json names them"),
    ("inspect data {text}_text_documents", "the folder has {text}_text_document (for `tandem pretrain`)"),
    (f"{TRAIN} {{hf}}", "input '{hf}' is the folder of a model, and not of data"),
    (f"{TRAIN} {{root}}/run", "input '{root}/run' is the folder of a run or a checkpoint, and not of data"),
    ("evaluate {hf} {root}/raw --seq-length 32", "{root}/raw: is a folder of raw files: preprocess it first"),
    ("report {root}/absent", "{root}/absent does not exist: expected the --save folder of a training run"),
    ("report {root}", "{root} is no training run, as it has no run.json: give one of the runs in it: {root}/run"),
    ("rerun {hf}", "{hf} is no training run, as it has no run.json: expected the --save folder"),
    ("rerun {hf}/config.json", "{hf}/config.json is a file: expected the --save folder"),
    (f"{PREPROCESS} {{root}}/absent", "{root}/absent does not exist: expected a Hugging Face folder with a tokenizer"),
    (f"{PREPROCESS} {{root}}/othr", "did you mean 'other'?"),
    (f"{PREPROCESS} {{corpus}}", "{corpus} is a file: expected a Hugging Face folder with a tokenizer"),
    (f"{PREPROCESS} {{root}}/run", "give {root}/run/iter_0000003/hf, which has one"),
    (f"{PREPROCESS} {{root}}/older", "the folder has its older form, vocab.json and merges.txt"),
    ("generate {hf} --prompts-file {root}/absent --device cpu", "--prompts-file {root}/absent: No such file"),
]


@pytest.fixture(scope="module")
def root(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("paths")
    shutil.copytree(workspace.hf, root / "run" / "iter_0000003" / "hf")
    (root / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    (root / "run" / "run.json").write_text("{}")
    for name in ("raw", "empty", "other", "older"):
        (root / name).mkdir()
    (root / "raw" / "a.jsonl").write_text('{"text": "x"}\n')
    (root / "other" / "certificate.json").write_text(json.dumps({"issued": "elsewhere"}))
    (root / "older" / "vocab.json").write_text("{}")
    shutil.copytree(workspace.hf, root / "hf")
    (root / "hf" / "tokenizer.json.old").write_text("{}")
    return root


@pytest.mark.parametrize(("line", "said"), CASES)
def test_a_path_is_described(
    line: str, said: str, root: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "root": root,
        "hf": root / "hf",
        "corpus": workspace.corpus,
        "text": workspace.text,
        "chat": workspace.instructions,
    }
    assert main(shlex.split(line.format(**names))) == 2
    assert said.format(**names) in capsys.readouterr().err
