"""What a command tells the user to do works: an error or a summary is followed as it stands, and it goes on.

Advice that other tests follow: YaRN in config.json, and an earlier iteration (tests/training), `iconv`
(tests/files/test_text_files.py), locks (tests/files/test_lock.py), DPO's defaults (tests/training).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from advice_cases import CASES, EPOCH, PREPROCESS, RUN, changed

from frameworks import require_framework
from tandem.__main__ import main
from workspace import Workspace

EMBEDDING, MATRIX = "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"
PAIR = {"prompt": "Sort 1909.", "chosen": "0199", "rejected": "1909"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "bad_rows": [{"instruction": "Reverse 1.", "output": "1"}, {"instruction": 5}],
    "messages": [{"messages": [{"role": "user", "content": "hello"}]}],
    "alpaca": [{"instruction": "Reverse 1.", "output": "1"}] * 40,
    "variables": [{"instruction": "Reverse 1.", "output": "1", "chat_template_kwargs": {"mood": "good"}}],
    "split_texts": [{"chosen": "Sort 1909. 0199", "rejected": "Sort 1909. 1909"}],
    "pairs": [PAIR] * 8,
}
FOLDERS = (
    *("full", "no_record", "other_text", "no_optimizer", "fewer_rows", "counted", "lora", "base", "moved"),
    *("packed", "bare", "large", "no_end"),
)


@pytest.fixture(scope="module")
def places(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    """What commands name in braces."""
    require_framework("torch")
    root = tmp_path_factory.mktemp("advice")
    for name, rows in ROWS.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, Path | str] = {
        "hf": workspace.hf,
        "text": f"{workspace.text}_text_document",
        "chat": workspace.instructions,
        "corpus": workspace.corpus,
        "questions": workspace.questions,
        "adapters": root / "adapters" / "peft",
        **{name: root / f"{name}.jsonl" for name in ROWS},
        **{name: root / name for name in FOLDERS},
    }
    make_folders(workspace, root)
    adapters = f"{RUN} --lora-r 4 --lora-target-modules linear_qkv"
    for line in (
        f"{changed(RUN, '--save', '{no_optimizer}')} --no-save-optim --exit-interval 1",
        changed(changed(adapters, "--load", "{base}"), "--save", "{lora}"),
        "export {lora} {adapters} --save-lora-to-hf",
        f"{EPOCH} --exit-interval 1",
        changed(PREPROCESS, "--output-prefix", "{packed}") + " --seq-length 128 --over-long drop --pack",
    ):
        assert main(shlex.split(line.format(**names))) == 0
    (root / "base").rename(root / "moved")
    return names


def make_folders(workspace: Workspace, root: Path) -> None:
    """Models and data that lack something, or have too much."""
    (root / "full").mkdir()
    (root / "full" / "file").write_text("")
    for end in ("bin", "idx"):
        for name in ("no_record", "other_text"):
            shutil.copy(f"{workspace.text}_text_document.{end}", root / f"{name}.{end}")
    shutil.copytree(workspace.hf, root / "base")
    shutil.copytree(workspace.hf, root / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    shutil.copytree(workspace.hf, root / "no_end")
    change(root / "no_end" / "tokenizer_config.json", eos_token=None)
    change(root / "no_end" / "config.json", eos_token_id=None)
    with_tensor(workspace.hf, root / "large", MATRIX, lambda tensor: tensor * np.float32(1e7))
    with_tensor(workspace.hf, root / "fewer_rows", EMBEDDING, lambda tensor: tensor[:200].copy())
    change(root / "fewer_rows" / "config.json", vocab_size=200)


def with_tensor(source: Path, target: Path, name: str, other: Callable[[np.ndarray], np.ndarray]) -> None:
    """The same model with another tensor in place of one."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file({**tensors, name: other(tensors[name])}, target / "model.safetensors", {"format": "pt"})


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", CASES)
def test_advice_works(
    name: str, places: dict[str, Path | str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    if "mindspore" in case.line:
        require_framework("mindspore")
    names = {**places, "new": tmp_path / "new"}
    if "no_optimizer" in case.line:  # going on changes it
        names["no_optimizer"] = shutil.copytree(places["no_optimizer"], tmp_path / "no_optimizer")
    assert main(shlex.split(case.line.format(**names))) == case.ends
    said = "".join(capsys.readouterr())
    found = re.search(case.advice, said)
    assert found, said
    followed = case.follow(case.line, found)
    for line in [followed] if isinstance(followed, str) else followed:
        code = main(shlex.split(line.format(**names)))
        said = "".join(capsys.readouterr())
        assert code == 0, said
    assert case.says in said
