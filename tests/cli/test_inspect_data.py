"""Seeing the data: counts, lengths, and what is trained (D5)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.__main__ import main
from tandem.data.indexed import IndexedDataset
from tandem.data.naming import sft_prefix
from tandem.data.preprocess import PreprocessOptions, preprocess
from tandem.data.statistics import DataView
from workspace import Workspace


def test_d5_trained_text_is_marked(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "data", str(workspace.instructions), "--show", "1"]) == 0
    out = capsys.readouterr().out
    sample = out[out.index("sample 0") :]
    assert sample.count("[[") == sample.count("]]") == 1
    assert "user" not in sample[sample.index("[[") :]
    assert sample[: sample.index("]]")].endswith("<|im_end|>\n")
    assert "fill rate" in out


def test_text_and_its_counts(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = f"{workspace.text}_text_document"
    assert main(["inspect", "data", prefix, "--show", "0"]) == 0
    assert f"{IndexedDataset(prefix).num_tokens:,}" in capsys.readouterr().out
    statistics = DataView(prefix).statistics()
    assert sum(count for *_, count in statistics.histogram) == statistics.sequences
    assert main(["inspect", "data", f"{prefix}x"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_neat_packed_rows_count_their_documents_and_no_padding(workspace: Workspace, tmp_path: Path) -> None:
    options = PreprocessOptions(
        (str(workspace.questions),),
        str(tmp_path / "x"),
        str(workspace.hf),
        prompt_type="qwen3",
        seq_length=200,
        pack=True,
        neat_pack=True,
    )
    summary = preprocess(options)
    statistics = DataView(tmp_path / "x").statistics()
    assert (statistics.documents, statistics.tokens) == (summary.kept, summary.tokens)
    assert statistics.trained_tokens == summary.trained_tokens
    stored = IndexedDataset(sft_prefix(str(tmp_path / "x"), "input_ids")).num_tokens
    assert statistics.fill_rate == summary.tokens / stored


def test_preprocess_shows_samples(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", str(workspace.corpus), "--output-prefix", str(tmp_path / "x")]
    assert main(["preprocess", *words, "--tokenizer-name-or-path", str(workspace.hf), "--show", "2"]) == 0
    assert "sample 1" in capsys.readouterr().out
