"""Readers: every format gives the same records, and every fault its place (C4, C9)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tandem.data.readers import expand_input, iter_rows
from tandem.errors import UserError

RECORDS = [{"text": "one", "n": 1}, {"text": "中文\u2028 two", "n": 2}, {"text": "", "n": 3}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]))  # two members
    elif name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.compress(LINES[:20]) + zstandard.compress(LINES[20:]))  # two frames
    elif name == "array.json":
        path.write_text(json.dumps(RECORDS, indent=1))
    else:
        path.write_bytes(LINES)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "array.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_c9_every_format_gives_the_same_records(name: str, tmp_path: Path) -> None:
    rows = list(iter_rows([write(tmp_path, name)]))
    assert [row.parse() for row in rows] == RECORDS
    separator = "row " if name in ("array.json", "a.parquet") else ""
    assert [row.place for row in rows] == [f"{tmp_path / name}:{separator}{n}" for n in (1, 2, 3)]


def test_files_directories_and_patterns(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.json", "notes.md"):
        write(tmp_path, name)
    names = ["a.jsonl.gz", "b.jsonl", "c.json"]
    assert [file.name for file in expand_input([str(tmp_path)])] == names
    assert [file.name for file in expand_input([str(tmp_path / "*.json*")])] == names
    assert [file.name for file in expand_input([tmp_path / "c.json", tmp_path / "b.jsonl"])] == ["c.json", "b.jsonl"]
    assert len(list(iter_rows(expand_input([tmp_path])))) == 9
    with pytest.raises(UserError, match=r"input '.*absent': no such file"):
        expand_input([str(tmp_path / "absent")])
    with pytest.raises(UserError, match=r"notes\.md: unknown kind of file; expected one of \.json"):
        expand_input([str(tmp_path / "notes.md")])


BAD_LINES = [
    (b"", "empty line"),
    (b"  \t", "empty line"),
    (b'{"text": "cut of', "not valid JSON, perhaps a truncated line"),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff at position 11"),
    (b'["text"]', "expected an object with named fields, found list"),
    (b'"text"', "expected an object with named fields, found str"),
    (b"{'text': 1}", "not valid JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_c4_bad_lines_are_named(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "also good"}\n')
    rows = list(iter_rows([path]))
    assert [rows[0].parse(), rows[2].parse()] == [{"text": "good"}, {"text": "also good"}]
    with pytest.raises(UserError) as caught:
        rows[1].parse()
    assert str(caught.value).startswith(f"{path}:2: {reason}")


def test_c4_damaged_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(LINES * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(LINES * 1000)[:-10])
    (tmp_path / "b.json").write_text('[{"text": 1},\n{"text"')
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    for name, reason in [
        ("a.jsonl.gz", r"a\.jsonl\.gz: cannot be read beyond line"),
        ("d.jsonl.zst", r"d\.jsonl\.zst: cannot be read beyond line"),
        ("b.json", r"b\.json:2: not a valid JSON array"),
    ]:
        with pytest.raises(UserError, match=reason):
            list(iter_rows([tmp_path / name]))
    pytest.importorskip("pyarrow.parquet")
    with pytest.raises(UserError, match="cannot be read beyond row 0"):
        list(iter_rows([tmp_path / "c.parquet"]))


def test_c9_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES)
    rows = iter_rows([path])
    assert next(rows).parse() == RECORDS[0]
    path.write_bytes(LINES + b"{")  # what comes later has not been looked at
    assert len(list(rows)) >= 2
