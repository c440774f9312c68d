"""Seeing the data: counts, lengths, and what is trained."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tandem.__main__ import main
from tandem.data.indexed import IndexedDataset
from tandem.data.kinds import CONVERSATIONS
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.statistics import DataView
from tandem.data.tokens.tokenizer import Tokenizer
from workspace import Workspace


def test_trained_text_is_marked(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_another_tokenizer_than_that_of_the_data_is_said(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(workspace.hf, tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<think>", "<thought>"))
    command = ["inspect", "data", str(workspace.instructions), "--show", "1", "--tokenizer-name-or-path"]
    assert main([*command, str(workspace.hf)]) == 0
    assert "is not the tokenizer" not in capsys.readouterr().out
    assert main([*command, str(other)]) == 0
    assert f"> {other} is not the tokenizer that made these data" in capsys.readouterr().out


def test_labels_alone_are_no_text(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [CONVERSATIONS.pair(str(workspace.instructions), "labels"), "--tokenizer-name-or-path", str(workspace.hf)]
    assert main(["inspect", "data", *words]) == 2
    assert f"one of several files of a dataset; give {workspace.instructions} instead" in capsys.readouterr().err
    for suffix in ("bin", "idx"):
        shutil.copy(f"{words[0]}.{suffix}", tmp_path / f"alone.{suffix}")
    assert main(["inspect", "data", str(tmp_path / "alone"), "--show", "1", *words[1:]]) == 2
    assert "these are labels, not tokens" in capsys.readouterr().err


def test_what_follows_the_last_answer_counts(workspace: Workspace, tmp_path: Path) -> None:
    """The line end that a chat template writes behind it is not padding."""
    options = PreprocessOptions((str(workspace.questions),), str(tmp_path / "x"), str(workspace.hf))
    summary = preprocess(dataclasses.replace(options, prompt_type="chat_template"))
    view = DataView(tmp_path / "x")
    assert view.statistics().tokens == summary.tokens
    assert view.statistics().fill_rate == 1
    *_, last = view.spans(0, Tokenizer(workspace.hf))
    assert (last.text, last.trained) == ("\n", False)


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
    stored = IndexedDataset(CONVERSATIONS.pair(str(tmp_path / "x"), "input_ids")).num_tokens
    assert statistics.fill_rate == summary.tokens / stored


def test_preprocess_shows_samples(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", str(workspace.corpus), "--output-prefix", str(tmp_path / "x")]
    assert main(["preprocess", *words, "--tokenizer-name-or-path", str(workspace.hf), "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert "sample 1" in out
    assert "fill rate" in out


def test_upstreams_other_flags(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preprocess", "--input", str(workspace.corpus), "--output-prefix", str(tmp_path / "x"), "--n-subs", "4"]
    words += ["--tokenizer-name-or-path", str(workspace.hf), "--cache-dir", "/nowhere", "--dataset-impl", "mmap"]
    assert main(words) == 0
    assert "without effect here: --n-subs --cache-dir --dataset-impl" in capsys.readouterr().out
    for refused in ("--split-sentences", "--data-obfuscation", "--hf-datasets-params"):
        assert main([*words, refused]) == 2
        assert refused in capsys.readouterr().err


class Page(HTMLParser):
    """Text of each sample, what is marked in it, and every attribute that would fetch something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.samples: list[str] = []
        self.marked: list[str] = []
        self.fetched: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [name for name, _ in attributes if name in ("src", "href", "srcset")]
        self._open.append(tag)
        if tag == "pre":
            self.samples.append("")
        if tag == "mark":
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, text: str) -> None:
        if "pre" in self._open:
            self.samples[-1] += text
        if "mark" in self._open:
            self.marked[-1] += text


def write_page(workspace: Workspace, path: Path) -> str:
    words = ["inspect", "data", str(workspace.instructions), "--show", "2", "--html", str(path)]
    assert main(words) == 0
    return path.read_text(encoding="utf-8")


def test_html_page_stands_alone_and_shows_what_is_trained(workspace: Workspace, tmp_path: Path) -> None:
    text = write_page(workspace, tmp_path / "page.html")
    page = Page(text)
    view, tokenizer = DataView(workspace.instructions), Tokenizer(workspace.hf)
    spans = [view.spans(index, tokenizer) for index in range(2)]
    assert [sample.removeprefix("\n") for sample in page.samples] == ["".join(s.text for s in some) for some in spans]
    assert page.marked == [span.text for some in spans for span in some if span.trained]
    assert page.fetched == []
    assert f"{view.statistics().tokens:,}" in text
    assert "prompt type" in text


def test_preprocess_writes_a_page_of_hostile_text(workspace: Workspace, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({"text": "\n<script>alert(1)</script> & </pre>"}) + "\n")
    words = ["--input", str(source), "--output-prefix", str(tmp_path / "x"), "--html", str(tmp_path / "x.html")]
    assert main(["preprocess", *words, "--tokenizer-name-or-path", str(workspace.hf), "--show", "1"]) == 0
    page = Page((tmp_path / "x.html").read_text())
    assert len(page.samples) == 1
    assert page.samples[0].startswith("\n\n<script>")
    assert page.samples[0].endswith("& </pre>")


def test_a_page_where_a_folder_is_known_before_anything_is_done(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({"text": "x"}) + "\n")
    words = ["--input", str(source), "--output-prefix", str(tmp_path / "x"), "--html", str(tmp_path)]
    assert main(["preprocess", *words, "--tokenizer-name-or-path", str(workspace.hf)]) == 2
    assert main(["inspect", "data", str(workspace.instructions), "--html", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("is not a file; give the name of a file") == 2
    words[-1] = str(source)
    assert main(["preprocess", *words, "--tokenizer-name-or-path", str(workspace.hf)]) == 2
    assert f"{source}: exists and is not an HTML page" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("given", ['{"prompt": ["q"]}', '{"tags": "x"}', '{"messages": {}}'])
def test_map_keys_of_another_type(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    words = ["--input", "x", "--output-prefix", str(tmp_path / "x"), "--map-keys", given]
    assert main(["preprocess", *words, "--tokenizer-name-or-path", str(workspace.hf)]) == 2
    assert "expected " in capsys.readouterr().err.partition("--map-keys")[2]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_html_page_in_a_browser(workspace: Workspace, tmp_path: Path) -> None:
    write_page(workspace, tmp_path / "page.html")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--dump-dom",
    ]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=60, check=True)
    page = Page(done.stdout)
    spans = DataView(workspace.instructions).spans(0, Tokenizer(workspace.hf))
    assert page.samples[0] == "".join(span.text for span in spans)
    assert page.marked[0] in [span.text for span in spans if span.trained]


def test_the_record_names_the_tokenizer_wherever_one_stands(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workspace.hf, tmp_path / "hf")
    shutil.copy(workspace.questions, tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    preprocess(PreprocessOptions(("rows.jsonl",), "x", "hf", prompt_type="qwen3"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["inspect", "data", "../x", "--show", "1"]) == 0
    assert "[[" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["sources"][0]["file"] == str(tmp_path / "rows.jsonl")
    (tmp_path / "hf").rename(tmp_path / "moved")
    assert main(["inspect", "data", "../x", "--show", "1"]) == 2
    message = capsys.readouterr().err
    assert f"names {tmp_path / 'hf'}, which is not here" in message
    assert "--tokenizer-name-or-path" in message
    assert main(["inspect", "data", "../x", "--show", "1", "--tokenizer-name-or-path", "../moved"]) == 0
