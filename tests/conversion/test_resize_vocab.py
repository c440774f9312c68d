"""A tokenizer with more tokens than the model has rows: found early, and `--resize-vocab` makes room."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tandem.__main__ import main
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.checkpoints.views import LargerVocabulary
from tandem.conversion.verify import fixed_batch
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.models.tensors import EMBEDDING, OUTPUT, tensor_table
from tandem.parallel.slices import Part
from toys import toy_config
from workspace import Workspace

ADDED = 100  # tokens; the toy model has room for fewer


@pytest.fixture
def enlarged(workspace: Workspace, tmp_path: Path) -> Path:
    """The toy model with a tokenizer that has more tokens than the model has rows."""
    folder = tmp_path / "hf"
    shutil.copytree(workspace.hf, folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<|new_{number}|>" for number in range(ADDED)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def rows_of(folder: Path) -> tuple[int, int]:
    """Rows of the model, and rows that its tokenizer needs."""
    return json.loads((folder / "config.json").read_text())["vocab_size"], Tokenizer(folder).rows_needed


def test_rows_that_a_tokenizer_needs(enlarged: Path, workspace: Workspace) -> None:
    """The highest id counts, not the number of tokens."""
    tokenizer = json.loads((enlarged / "tokenizer.json").read_text())
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    assert rows_of(enlarged)[1] == max(ids) + 1
    assert rows_of(workspace.hf)[1] <= rows_of(workspace.hf)[0]


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_a_run_finds_it_at_the_start(
    framework: str, more: list[str], enlarged: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, needed = rows_of(enlarged)
    assert rows < needed
    words = ["pretrain", "--load", str(enlarged), "--data-path", f"{workspace.text}_text_document", *more]
    words += ["--train-iters", "1", "--seq-length", "32", "--lr", "1e-3", "--ai-framework", framework]
    assert main(words) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"tokens up to id {needed - 1:,}, and the model in {enlarged} has {rows:,} rows" in error
    assert f"--resize-vocab {needed}" in error


def test_a_prompt_with_such_a_token_is_refused(
    framework: str, enlarged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", str(enlarged), "--max-new-tokens", "2", "--ai-framework", framework, "--prompt"]
    assert main([*asked, "Hi"]) == 0
    assert main([*asked, f"<|new_{ADDED - 1}|>"]) == 2
    assert f"token id {rows_of(enlarged)[1] - 1}" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["hf", "mg"])
def test_convert_makes_room(
    target: str, enlarged: Path, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, needed = rows_of(enlarged)
    words = ["convert", "--load-dir", str(enlarged), "--save-model-type", target, "--save-dir"]
    if target == "mg":
        assert main([*words, str(tmp_path / "small")]) == 0
        assert f"the tokenizer has tokens up to id {needed - 1:,}" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "m"), "--resize-vocab", str(needed)]) == 0
    printed = capsys.readouterr().out
    assert "verified with" in printed
    assert "tokens up to id" not in printed
    source, before = open_source(tmp_path / "m"), open_source(enlarged)
    assert source.config.vocab_size == needed
    embedding, old = source.read(EMBEDDING), before.read(EMBEDDING)
    assert np.array_equal(embedding[:rows], old)
    assert np.allclose(embedding[rows:], old.mean(axis=0), atol=1e-7)
    assert main(["inspect", "checkpoint", str(tmp_path / "m"), "--quick"]) == 0
    assert f"{needed:,}; rows from {rows:,} on were added as the mean of the others" in capsys.readouterr().out
    run = ["pretrain", "--load", str(tmp_path / "m"), "--data-path", f"{workspace.text}_text_document", "--dry-run"]
    data = ["--tokenizer-name-or-path", str(workspace.hf), "--train-iters", "1", "--seq-length", "32", "--lr", "1e-3"]
    assert main([*run, *data]) == 0


def test_the_record_travels_and_grows(enlarged: Path, tmp_path: Path) -> None:
    """Through a checkpoint to an export, which transformers loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows, needed = rows_of(enlarged)
    words = ["--load-dir", str(enlarged), "--save-dir", str(tmp_path / "m"), "--ckpt-format", "torch", "--no-verify"]
    assert main(["convert", *words, "--resize-vocab", str(needed)]) == 0
    words = ["--load-dir", str(tmp_path / "m"), "--save-dir", str(tmp_path / "n"), "--load-model-type", "mg"]
    assert main(["convert", *words, "--no-verify", "--resize-vocab", str(needed + 8)]) == 0
    assert main(["export", "--load", str(tmp_path / "n"), "--save-dir", str(tmp_path / "o")]) == 0
    steps = json.loads((tmp_path / "o/tandem.json").read_text())["resized_vocabulary"]
    assert [(step["from"], step["to"]) for step in steps] == [(rows, needed), (needed, needed + 8)]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert (
        model.get_input_embeddings().weight.shape[0] == needed + 8 > len(AutoTokenizer.from_pretrained(tmp_path / "o"))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_part_has_the_same_rows(dtype: str, tmp_path: Path) -> None:
    """What ranks read, in blocks or at once, and the logits of the former tokens."""
    config = toy_config(untie_embeddings_and_output_weights=True, vocab_size=211)
    copy(RandomSource(config, 3, dtype), HFSink(tmp_path / "hf", config, dtype, Companions()))
    source = open_source(tmp_path / "hf")
    larger = LargerVocabulary(source, 220)
    assert fixed_batch(larger.config).tokens.max() < 220
    for name in (EMBEDDING, OUTPUT):
        old = source.read(name)
        mean = old.astype(np.float64).mean(axis=0).astype(old.dtype)
        expected = np.concatenate([old, np.tile(mean, (9, 1))])
        whole = larger.read(name)
        assert whole.tobytes() == expected.tobytes()
        assert whole.shape == tensor_table(larger.config)[name].shape
        for first, last in ((0, 211), (105, 215), (211, 220), (215, 220), (0, 220)):
            part = Part((((first, last), (0, 48)),))
            assert larger.read_part(name, part).tobytes() == expected[first:last].tobytes()
            assert np.concatenate(list(larger.stream(name, part))).tobytes() == expected[first:last].tobytes()
    norm = "decoder.final_layernorm.weight"
    assert larger.read(norm).tobytes() == source.read(norm).tobytes()


def test_rows_are_added_and_never_dropped(enlarged: Path) -> None:
    source = open_source(enlarged)
    with pytest.raises(UserError, match=r"--resize-vocab 8: .* expected more: rows are added"):
        LargerVocabulary(source, 8)
