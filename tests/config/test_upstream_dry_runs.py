"""Upstream's own scripts of experts and of interleaved stages, at their sizes: all is checked but computing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from itertools import islice
from pathlib import Path

import pytest
from test_upstream_scripts import ACCEPTED, PROGRAMS, SCRIPTS, size_of

from frameworks import require_framework
from tandem.__main__ import main
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.models.hf_config import to_hf
from tandem.models.published import qwen3_config

Usage = namedtuple("Usage", "total used free")
FLAGS = {"--num-experts", "--num-layers-per-virtual-pipeline-stage"}
CHOSEN = [name for name in ACCEPTED if FLAGS.intersection(SCRIPTS[name])]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> dict[str, str]:
    """Prefixes of a long text and of a few questions, also packed, and with two answers each."""
    root, tokenizer = tmp_path_factory.mktemp("data"), str(shared_data / "qwen3-0.6b")
    with (shared_data / "text/free.jsonl").open(encoding="utf-8") as lines:
        long_text = " ".join(json.loads(line)["text"] for line in islice(lines, 50))
    (root / "text.jsonl").write_text(json.dumps({"text": long_text}), encoding="utf-8")
    questions = json.loads((shared_data / "instruct/gsm8k_train_alpaca.json").read_text(encoding="utf-8"))
    (root / "questions.json").write_text(json.dumps(questions[:20]), encoding="utf-8")
    preprocess(PreprocessOptions((str(root / "text.jsonl"),), str(root / "text"), tokenizer))
    chat = (str(root / "questions.json"),)
    preprocess(PreprocessOptions(chat, str(root / "chat"), tokenizer, prompt_type="qwen3"))
    packed = PreprocessOptions(
        chat, str(root / "packed"), tokenizer, prompt_type="qwen3", pack=True, neat_pack=True, seq_length=4096
    )
    preprocess(packed)
    pairs = [
        {"instruction": one["instruction"], "input": "", "chosen": one["output"], "rejected": "?"}
        for one in questions[:20]
    ]
    (root / "two_answers.json").write_text(json.dumps(pairs), encoding="utf-8")
    preprocess(
        PreprocessOptions((str(root / "two_answers.json"),), str(root / "pairs"), tokenizer, prompt_type="qwen3")
    )
    names = {"pretrain": "text_text_document", "dpo": "pairs", "pack": "packed", "tune": "chat"}
    return {kind: str(root / name) for kind, name in names.items()}


def test_how_many_are_chosen() -> None:
    assert len(CHOSEN) == 17


@pytest.mark.slow("sizes")
@pytest.mark.parametrize("name", CHOSEN)
def test_it_could_start(
    name: str, data: dict[str, str], shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    framework = require_framework("mindspore" if name.startswith("mindspore/") else "torch")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**15, 0, 10**15))
    monkeypatch.chdir(tmp_path)
    words = list(SCRIPTS[name])
    (program,) = set(words) & set(PROGRAMS)
    words.remove(program)
    first = words.index("--load")
    del words[first : first + 2]
    (tmp_path / "config.json").write_text(json.dumps(to_hf(qwen3_config(size_of(name)))), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(shared_data / "qwen3-0.6b" / file)
    kind = next(kind for kind in data if kind in name)
    ours = ["--init", "random", "--dry-run", "--device", "npu", "--ai-framework", framework]
    paths = ["--tokenizer-name-or-path", str(tmp_path), "--data-path", data[kind], "--save", str(tmp_path / "run")]
    assert main([PROGRAMS[program], *words, *paths, *ours]) == 0
