"""Readers: every format gives the same records, and every fault its place."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.data.record import write_record
from tandem.data.sources.files import expand_input
from tandem.data.sources.json_array import iter_elements
from tandem.data.sources.readers import iter_blocks, parse_row
from tandem.errors import UserError

RECORDS = [{"text": "one", "n": 1}, {"text": "中文\u2028 two", "n": 2}, {"text": "", "n": 3}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def places_and_rows(files: list[Path]) -> list[tuple[str, Any]]:
    return [(block.place(i), row) for block in iter_blocks(files) for i, row in enumerate(block.rows())]


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif name.endswith(".arrow"):
        table = pytest.importorskip("pyarrow").Table.from_pylist(RECORDS)
        ipc = pytest.importorskip("pyarrow.ipc")
        new = ipc.new_file if name.startswith("file") else ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    elif name.endswith(".xz"):
        path.write_bytes(lzma.compress(LINES[:20]) + lzma.compress(LINES[20:]))
    elif name.endswith(".bz2"):
        path.write_bytes(bz2.compress(LINES[:20]) + bz2.compress(LINES[20:]))
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


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "lines.json", "array.json", "a.ndjson", "A.JSONL", "a.parquet", "file.arrow", "stream.arrow"),
        *("a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.json.bz2"),
    ],
)
def test_every_format_gives_the_same_records(name: str, tmp_path: Path) -> None:
    rows = places_and_rows([write(tmp_path, name)])
    assert [parse_row(row) for _, row in rows] == RECORDS
    separator = "row " if name.endswith(("array.json", "parquet", "arrow")) else ""
    assert [place for place, _ in rows] == [f"{tmp_path / name}:{separator}{n}" for n in (1, 2, 3)]


def test_lines_of_text_and_rows_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n中文".encode())
    (tmp_path / "b.csv").write_text('\ufefftext,n\n"two\nlines, ""quoted""",1\nx,\n', encoding="utf-8")
    rows = places_and_rows([tmp_path / "a.txt", tmp_path / "b.csv"])
    assert [parse_row(row) for _, row in rows] == [
        *({"text": text} for text in ("one", "", "中文")),
        {"text": 'two\nlines, "quoted"', "n": "1"},
        {"text": "x", "n": ""},
    ]
    assert rows[2][0] == f"{tmp_path / 'a.txt'}:3"
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "bad.csv").write_bytes(b'\ntext,n\nx,1\n\ny\n"z",2\n')
    with pytest.raises(UserError, match="not UTF-8"):
        parse_row(places_and_rows([tmp_path / "bad.txt"])[0][1])
    rows = places_and_rows([tmp_path / "bad.csv"])
    assert rows[1][0] == f"{tmp_path / 'bad.csv'}:row 2"
    with pytest.raises(UserError, match="line 5: 1 fields, but the header names 2"):
        parse_row(rows[1][1])
    assert [parse_row(rows[i][1]) for i in (0, 2)] == [{"text": "x", "n": "1"}, {"text": "z", "n": "2"}]


@pytest.mark.parametrize("compress", [lambda content: content, gzip.compress, lzma.compress, bz2.compress])
def test_tables_of_texts_are_compressed_too(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    suffix = {gzip.compress: ".gz", lzma.compress: ".XZ", bz2.compress: ".bz2"}.get(compress, "")
    for name, separator in (("a.csv", ","), ("b.TSV", "\t")):
        (tmp_path / f"{name}{suffix}").write_bytes(compress(f'text{separator}n\n"one ""two"""{separator}1\n'.encode()))
    rows = [parse_row(row) for _, row in places_and_rows(expand_input([tmp_path]))]
    assert rows == [{"text": 'one "two"', "n": "1"}] * 2
    damaged = tmp_path / f"a.csv{suffix}"
    if suffix:
        damaged.write_bytes(damaged.read_bytes()[:-4])
        with pytest.raises(UserError, match=r"cannot be read after line .* damaged"):
            places_and_rows([damaged])


def test_numbers_that_json_lacks_do_no_harm_where_nobody_reads_them() -> None:
    record = parse_row(b'{"text": "x", "score": NaN, "best": -Infinity}')
    assert (record["text"], record["best"]) == ("x", float("-inf"))
    for line in (b'{"text": "NaN", "n": }', b'{"text": "\\ud800", "n": NaN}', b'{"a": NaN, "n": ' + b"[" * 5000):
        with pytest.raises(UserError, match="not valid JSON"):
            parse_row(line)


def test_what_a_table_adds_to_the_objects_of_a_column_is_left_out(tmp_path: Path) -> None:
    calls = [[{"name": "f", "arguments": {"a": 1, "n": [{"x": 1}, {"y": 2}]}}], [{"name": "g", "arguments": {"b": 2}}]]
    records = [{"calls": value, "system": system} for value, system in zip(calls, [None, "s"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "x.parquet")
    assert [parse_row(row) for _, row in places_and_rows([tmp_path / "x.parquet"])] == records


def test_files_directories_and_patterns(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.json", "notes.md"):
        write(tmp_path, name)
    names = ["a.jsonl.gz", "b.jsonl", "c.json"]
    assert [file.name for file in expand_input([str(tmp_path)])] == names
    assert [file.name for file in expand_input([str(tmp_path / "*.json*")])] == names
    assert [file.name for file in expand_input([tmp_path / "c.json", tmp_path / "b.jsonl"])] == ["c.json", "b.jsonl"]
    assert len(places_and_rows(expand_input([tmp_path]))) == 9
    with pytest.raises(UserError, match=r"input '.*absent': no such file"):
        expand_input([str(tmp_path / "absent")])
    with pytest.raises(UserError, match=r"notes\.md: unknown kind of file; expected one of \.json"):
        expand_input([str(tmp_path / "notes.md")])


def test_what_an_earlier_run_left_in_a_folder_is_no_input(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl")
    write_record(tmp_path / "out", {}, {})
    (tmp_path / "out.rejects.jsonl").write_text("{}\n")
    (tmp_path / "out_text_document.bin").write_bytes(b"")
    for entry in (tmp_path, tmp_path / "*.json*", tmp_path / "*"):
        assert [file.name for file in expand_input([entry])] == ["b.jsonl"]
    assert [file.name for file in expand_input([tmp_path / "out.rejects.jsonl"])] == ["out.rejects.jsonl"]


def test_files_that_describe_data_are_no_input(tmp_path: Path) -> None:
    """As `save_to_disk` of the datasets library leaves them, and LLaMA-Factory's list of data sets."""
    write(tmp_path, "data-00000-of-00001.arrow")
    (tmp_path / "state.json").write_text('{"_data_files": [], "_fingerprint": "x"}')
    (tmp_path / "dataset_info.json").write_text('{"features": {}, "citation": ""}')
    for entry in (tmp_path, tmp_path / "*"):
        assert [file.name for file in expand_input([entry])] == ["data-00000-of-00001.arrow"]
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "x.json"}}')
    assert [file.name for file in expand_input([tmp_path])] == ["data-00000-of-00001.arrow"]
    (tmp_path / "state.json").write_text('[{"text": "Ohio"}]')  # data that have such a name
    assert [file.name for file in expand_input([tmp_path])] == ["data-00000-of-00001.arrow", "state.json"]


def test_data_that_lie_deeper_are_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "data-00000-of-00001.arrow")
    with pytest.raises(UserError, match="lie deeper") as error:
        expand_input([tmp_path])
    pattern = str(tmp_path / "**" / "*.arrow")
    assert repr(pattern) in str(error.value)
    assert str(tmp_path / "train") in str(error.value)
    assert len(expand_input([pattern])) == 2


def test_text_of_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: not UTF-8: byte 0xff after row 0"):
        places_and_rows([tmp_path / "x.parquet"])


BAD_LINES = [
    (b"", "empty line"),
    (b"  \t", "empty line"),
    (b'{"text": "cut of', "not valid JSON: .*; the line is truncated, or a value takes several lines"),
    (b"{", "not valid JSON: .*; the line is truncated, or a value takes several lines"),
    (b'{"text": "x"},', "not valid JSON: [^;]*$"),
    (b'{"text": ' + b"[" * 2000 + b"]" * 2000 + b"}", "not valid JSON: [^;]*$"),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff at position 11"),
    (b'["text"]', "expected an object with named fields, found list"),
    (b'"text"', "expected an object with named fields, found str"),
    (b"{'text': 1}", "not valid JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_lines_are_named(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "also good"}\n')
    (_, good), (place, bad), (_, also_good) = places_and_rows([path])
    assert [parse_row(good), parse_row(also_good)] == [{"text": "good"}, {"text": "also good"}]
    assert place == f"{path}:2"
    with pytest.raises(UserError, match=f"^{reason}"):
        parse_row(bad)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(LINES * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(LINES * 1000)[:-10])
    (tmp_path / "b.json").write_text('[{"text": 1},\n{"text"')
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    for name, reason in [
        ("a.jsonl.gz", r"a\.jsonl\.gz: cannot be read after line"),
        ("d.jsonl.zst", r"d\.jsonl\.zst: cannot be read after line"),
        ("b.json", r"b\.json: the JSON array does not end: truncated in row 2"),
    ]:
        with pytest.raises(UserError, match=reason):
            places_and_rows([tmp_path / name])
    pytest.importorskip("pyarrow.parquet")
    with pytest.raises(UserError, match="cannot be read after row 0"):
        places_and_rows([tmp_path / "c.parquet"])


def test_a_block_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.data.sources.readers._BLOCK_BYTES", 10)
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES * 3)
    blocks = list(iter_blocks([path]))
    assert [(block.first, len(block.rows())) for block in blocks] == [(n, 1) for n in range(1, 10)]
    assert [parse_row(row) for block in blocks for row in block.rows()] == RECORDS * 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(
        st.recursive(st.text() | st.integers() | st.none(), lambda v: st.lists(v) | st.dictionaries(st.text(), v))
    ),
    indent=st.none() | st.integers(0, 2),
    step=st.integers(1, 40),
)
def test_an_array_is_read_in_pieces(
    values: list[Any], indent: int | None, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.data.sources.json_array._READ_BYTES", step)
    path = tmp_path / "x.json"
    path.write_bytes(b" \n" + json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    expected = json.loads(path.read_bytes())
    with path.open("rb") as stream:
        assert [json.loads(element) for element in iter_elements(path, stream)] == expected


def test_what_is_no_file_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    for name in ("b.json", "c.jsonl.gz", "d.parquet"):
        (tmp_path / name).mkdir()  # folders in folders are not read
    assert [file.name for file in expand_input([str(tmp_path)])] == ["a.jsonl"]
    for name in ("e.json", "e.csv"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
        with pytest.raises(UserError, match=rf"{name}: a link to .*gone, which is not there"):
            expand_input([str(tmp_path)])
        (tmp_path / name).unlink()


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,n,text\nfirst,1,second\n")
    with pytest.raises(UserError, match=r"x\.csv: the header names 'text' more than once"):
        places_and_rows([tmp_path / "x.csv"])


def test_a_string_longer_than_many_reads(tmp_path: Path) -> None:
    """It is read in ever larger pieces, for each time it is looked at from its beginning."""
    text = 'a\\"\n]},' * 900_000
    (tmp_path / "x.json").write_text(json.dumps([{"text": text}, {"text": "b"}]))
    reads = []

    class Noted(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            reads.append(size)
            return super().read(size)

    with Noted(io.FileIO(tmp_path / "x.json")) as stream:
        elements = list(iter_elements(tmp_path / "x.json", stream))
    assert [json.loads(element)["text"] for element in elements] == [text, "b"]
    assert len([size for size in reads if size != 1]) < 8  # of a megabyte each it would be more than 10


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_data(name: str, tmp_path: Path) -> None:
    """Its lines would be trained as text."""
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=rf"{name}: a Git-LFS pointer, .*git lfs pull"):
            expand_input([str(place)])
