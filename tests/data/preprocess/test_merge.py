"""Merging datasets that were preprocessed in parts: their bytes, their records, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_toys import ALPACA, byte_tokenizer, options, write_jsonl, written
from tandem.data.indexed import IndexedDataset, IndexedWriter, merging
from tandem.data.preprocess.merge import merge_groups
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.record import check_record, read_record
from tandem.data.templates.catalog import get_template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    return byte_tokenizer(tmp_path / "tokenizer")


texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=6).filter(any)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=texts, second=texts)
def test_merge_equals_preprocessing_both(
    first: list[str], second: list[str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    files = [
        write_jsonl(tmp_path / f"{n}.jsonl", *({"text": t} for t in part)) for n, part in enumerate((first, second))
    ]
    parts = [preprocess(options(file, tmp_path / f"part{file.stem}", tokenizer_folder)) for file in files]
    with merging({str(tmp_path / "merged"): [part.prefixes["text"] for part in parts]}):
        pass
    whole = preprocess(options(files, tmp_path / "whole", tokenizer_folder))
    merged = {f"text.{suffix}": (tmp_path / f"merged.{suffix}").read_bytes() for suffix in ("bin", "idx")}
    assert merged == written(whole)


@pytest.mark.parametrize("pack", [False, True])
def test_merged_conversations_have_the_record_of_all(tokenizer_folder: Path, tmp_path: Path, pack: bool) -> None:
    (tmp_path / "parts").mkdir()
    files = [write_jsonl(tmp_path / f"{n}.jsonl", *part) for n, part in enumerate((ALPACA[:10], ALPACA[10:]))]
    changes = {"prompt_type": "qwen3", "seq_length": 80, "pack": pack}
    for file in files:
        preprocess(options(file, tmp_path / "parts" / file.stem, tokenizer_folder, **changes))
    keys = [f"packed_{key}_document" for key in ("input_ids", "attention_mask", "labels")]
    merge_groups(tmp_path / "parts", keys, str(tmp_path / "all"))
    summary = preprocess(options(files, tmp_path / "whole", tokenizer_folder, **changes))
    (path, merged), (_, whole) = read_record(tmp_path / "all"), read_record(tmp_path / "whole")  # type: ignore[misc]
    assert path == tmp_path / "all.json"
    assert check_record(tmp_path / "all", Tokenizer(tokenizer_folder), get_template("qwen3"), 80) is None
    sequences = sum(len(IndexedDataset(tmp_path / "parts" / f"{n}_{keys[0]}")) for n in range(2))
    assert merged["counts"] == {**whole["counts"], "sequences": sequences}
    assert merged["sources"] == whole["sources"]
    if not pack:
        names = {key: str(tmp_path / f"all_packed_{key}_document") for key in summary.prefixes}
        assert written(dataclasses.replace(summary, prefixes=names)) == written(summary)

    inside = tmp_path / "parts" / ".." / "parts" / "again"
    for _ in range(2):  # the output is not a part, however its path is written
        merge_groups(tmp_path / "parts", keys, str(inside))
        assert read_record(inside)[1]["counts"] == merged["counts"]  # type: ignore[index]
    for path in inside.parent.glob("again*"):
        path.unlink()
    with pytest.raises(UserError, match=r"all_packed_labels_document, which would have none after this merge"):
        merge_groups(tmp_path / "parts", keys[:1], str(tmp_path / "all"))
    merge_groups(tmp_path / "parts", keys[:1], str(tmp_path / "one"))  # one key only: there can be no record
    assert read_record(tmp_path / f"one_{keys[0]}") is None
    (tmp_path / "parts" / "0.json").unlink()
    merge_groups(tmp_path / "parts", keys, str(tmp_path / "all"))
    assert read_record(tmp_path / "all") is None


def test_the_record_of_a_merge_has_the_options_that_all_parts_share(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for number, on_bad in enumerate(("skip", "stop")):
        source = write_jsonl(tmp_path / f"{number}.jsonl", {"text": "a", "title": "b"})
        prefix = tmp_path / "parts" / str(number)
        preprocess(options(source, prefix, tokenizer_folder, json_keys=("text", "title"), on_bad=on_bad))
    merge_groups(tmp_path / "parts", ["text", "title"], str(tmp_path / "all"))  # `read_record` would not find a record
    assert not (tmp_path / "all.json").exists()
    merge_groups(tmp_path / "parts", ["text_document", "title_document"], str(tmp_path / "all"))
    for key in ("text_document", "title_document"):
        path, record = read_record(tmp_path / f"all_{key}")  # type: ignore[misc]
        assert path == tmp_path / "all.json"
        assert record["options"]["json_keys"] == ["text", "title"]
        assert record["options"]["on_bad"] is None  # not the same in all


def test_a_merge_names_its_parts_wherever_one_stands(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("p1", "p2"):
        preprocess(options(write_jsonl(tmp_path / f"{name}.jsonl", {"text": name}), Path(name), tokenizer_folder))
    merge_groups(".", ["text_document"], "all")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"all_text_document: an earlier merge made this of .*p1\.json"):
        merge_groups("..", ["text_document"], "more")


def test_a_part_is_not_merged_with_an_earlier_merge_of_it(tokenizer_folder: Path, tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        source = write_jsonl(tmp_path / f"{name}.jsonl", {"text": name})
        preprocess(options(source, tmp_path / name, tokenizer_folder))
    merge_groups(tmp_path, ["text_document"], str(tmp_path / "all"))
    with pytest.raises(UserError, match=r"all_text_document: an earlier merge made this of .*p1\.json"):
        merge_groups(tmp_path, ["text_document"], str(tmp_path / "again"))


def test_groups_are_merged_by_name(tmp_path: Path) -> None:
    for number, name in enumerate(("b_text_document", "a_text_document", "a_code_document")):
        with IndexedWriter(tmp_path / name) as writer:
            writer.add_document([number] * (number + 1))
    assert merge_groups(tmp_path, ["text"], str(tmp_path / "all")) == [f"{tmp_path}/all_text"]
    expected = [[1, 1], [0]]
    assert [sequence.tolist() for sequence in IndexedDataset(tmp_path / "all_text")] == expected
    merge_groups(tmp_path, ["text"], str(tmp_path / "all"))  # again: the output is not a part
    assert [sequence.tolist() for sequence in IndexedDataset(tmp_path / "all_text")] == expected
    with pytest.raises(UserError, match=r"no \.bin/\.idx pair"):
        merge_groups(tmp_path, ["maths"], str(tmp_path / "all"))
    (tmp_path / "c_text_document.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"its \.idx is missing"):
        merge_groups(tmp_path, ["text"], str(tmp_path / "all"))


def test_a_merge_that_fails_leaves_all_as_it_was(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path / "tokenizer")
    parts = tmp_path / "parts"
    parts.mkdir()
    keys = ("a", "b")
    for name in ("p1", "p2"):
        source = write_jsonl(tmp_path / "x.jsonl", {"a": name, "b": f"{name}{name}"})
        preprocess(
            PreprocessOptions((str(source),), str(parts / name), str(tmp_path / "tokenizer"), json_keys=("a", "b"))
        )
    names = [f"{key}_document" for key in keys]
    merge_groups(parts, names, str(tmp_path / "all"))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("all*")}
    assert len(before) == 5
    tokens = (parts / "p2_b_document.bin").read_bytes()
    (parts / "p2_b_document.bin").write_bytes(tokens[:-1])
    with pytest.raises(UserError, match=r"p2_b_document\.bin"):
        merge_groups(parts, names, str(tmp_path / "all"))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("all*")} == before
    assert not list(tmp_path.glob(".all*"))


def test_parts_must_have_equal_options(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path / "tokenizer")
    parts = tmp_path / "parts"
    parts.mkdir()
    source = write_jsonl(tmp_path / "x.jsonl", {"text": "abc"})
    for name, append_eod in (("p1", True), ("p2", True), ("p3", False)):
        options = PreprocessOptions((str(source),), str(parts / name), str(tmp_path / "tokenizer"))
        preprocess(dataclasses.replace(options, append_eod=append_eod))
    with pytest.raises(UserError, match=r"p3\.json: append_eod is False, but True in .*p1\.json"):
        merge_groups(parts, ["text"], str(tmp_path / "all"))
    for path in parts.glob("p3*"):
        path.unlink()
    for _ in range(2):  # what an earlier merge wrote may be replaced
        assert merge_groups(parts, ["text"], str(tmp_path / "all")) == [f"{tmp_path}/all_text"]
    (parts / "p2.json").unlink()
    with pytest.raises(UserError, match=r"p1\.json: is the record of other data"):
        merge_groups(parts, ["text_document"], str(parts / "p1"))
