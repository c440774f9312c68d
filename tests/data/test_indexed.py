"""`.bin/.idx`: byte equality with Megatron's own files, and what is said of damaged ones."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data.indexed import DTYPE_CODES, IndexedDataset, IndexedWriter, merging
from tandem.errors import UserError


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "int32") -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in documents:
            writer.add_document([t for sequence in sequences for t in sequence], [len(s) for s in sequences])
    return prefix


def both_files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_written_bytes_equal_megatrons(dtype: str, shared_data: Path, tmp_path: Path) -> None:
    golden = shared_data / "golden/indexed"
    documents = json.loads((golden / "golden.json").read_text())["docs"]
    assert both_files(write(tmp_path / "x", documents, dtype)) == both_files(golden / dtype)


def test_empty_document_and_merge_equal_megatrons(shared_data: Path, tmp_path: Path) -> None:
    golden = shared_data / "golden/indexed"
    read = IndexedDataset(golden / "emptydoc")
    documents = [[read[0].tolist()], [], [read[1].tolist()]]
    assert both_files(write(tmp_path / "empty", documents, "uint16")) == both_files(golden / "emptydoc")
    with merging({str(tmp_path / "merged"): [golden / "int32", golden / "int32"]}):
        pass
    assert both_files(tmp_path / "merged") == both_files(golden / "merged")


def test_reading_megatrons_files(shared_data: Path) -> None:
    golden = shared_data / "golden/indexed"
    documents = json.loads((golden / "golden.json").read_text())["docs"]
    dataset = IndexedDataset(golden / "uint16")
    assert dataset.dtype == np.uint16
    assert [s.tolist() for s in dataset] == [s for sequences in documents for s in sequences]
    assert dataset.document_indices.tolist() == [0, 1, 3, 4, 7, 8]
    assert (dataset.num_documents, len(dataset), dataset.num_tokens) == (5, 8, 38)
    assert dataset.get(4, 2, 3).tolist() == documents[3][0][2:5]


@pytest.mark.parametrize("dtype", sorted(map(str, DTYPE_CODES)))
def test_every_dtype_comes_back(dtype: str, tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", [[[1, 2, 3]], [[100]]], dtype))
    assert dataset.dtype == np.dtype(dtype)
    assert [s.tolist() for s in dataset] == [[1, 2, 3], [100]]


documents_strategy = st.lists(st.lists(st.lists(st.integers(-100, 2**31 - 1), max_size=4), max_size=3), max_size=5)


@settings(max_examples=40, deadline=None)
@given(first=documents_strategy, second=documents_strategy)
def test_merge_equals_writing_in_one_go(first: list, second: list, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("merge")
    with merging({str(folder / "merged"): [write(folder / "a", first), write(folder / "b", second)]}):
        pass
    assert both_files(folder / "merged") == both_files(write(folder / "whole", first + second))


def test_many_documents_at_once_equal_one_by_one(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "many") as writer:
        writer.add_documents(np.arange(7), [3, 0, 4])
    with IndexedWriter(tmp_path / "single") as writer:
        for document in ([0, 1, 2], [], [3, 4, 5, 6]):
            writer.add_document(document)
    assert both_files(tmp_path / "many") == both_files(tmp_path / "single")


def test_offsets_beyond_two_gigabytes(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "huge")
    writer._extend_index(np.full(3, 2**30), np.ones(3, np.int64))  # the index alone: 12 GB of tokens are not needed
    writer.publish()
    with open(tmp_path / "huge.bin", "r+b") as file:
        file.truncate(3 * 2**32)  # sparse
    assert IndexedDataset(tmp_path / "huge")._pointers.tolist() == [0, 2**32, 2**33]
    assert IndexedDataset(tmp_path / "huge").get(2, 2**30 - 2).tolist() == [0, 0]


def test_nothing_appears_under_the_final_name_before_the_end(tmp_path: Path) -> None:
    class Interrupt(Exception):
        pass

    def interrupted() -> None:
        with IndexedWriter(tmp_path / "x") as writer:
            writer.add_document([1, 2])
            assert not list(tmp_path.glob("x.*"))
            raise Interrupt

    with pytest.raises(Interrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def damaged(kind: str, prefix: Path) -> None:
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    content = index.read_bytes()
    if kind == "no idx":
        index.unlink()
    elif kind == "no bin":
        tokens.unlink()
    elif kind == "empty idx":
        index.write_bytes(b"")
    elif kind == "foreign idx":
        index.write_bytes(b"TNTIDX\x00\x00" + content[8:])
    elif kind == "short idx":
        index.write_bytes(content[:-3])
    elif kind == "short bin":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif kind == "bad dtype":
        index.write_bytes(content[:17] + b"\x63" + content[18:])
    elif kind == "bad documents":
        index.write_bytes(content[:-8] + struct.pack("<q", 1))
    elif kind == "multimodal":
        index.write_bytes(content + b"\x00\x00")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no idx", r"x\.idx: no such file"),
        ("no bin", r"x\.bin: no such file, though its \.idx exists"),
        ("empty idx", r"x\.idx: the file is empty"),
        ("foreign idx", r"x\.idx: not a Megatron index: begins with b'TNTIDX"),
        ("short idx", r"x\.idx: has \d+ bytes, but 2 sequences and 3 document entries need"),
        ("short bin", r"x\.bin: has 15 bytes, but its \.idx describes 16"),
        ("bad dtype", r"x\.idx: version 1, dtype code 99"),
        ("bad documents", r"x\.idx: document indices must go from 0 to 2"),
        ("multimodal", r"x\.idx: a multimodal index"),
    ],
)
def test_damaged_files_are_named(kind: str, message: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[[1, 2, 3]], [[4]]])
    damaged(kind, prefix)
    with pytest.raises(UserError, match=message):
        IndexedDataset(prefix)


# The index of two sequences of int32: 34 bytes of header, 2 lengths, 2 pointers, 3 document indices.
@pytest.mark.parametrize(
    ("form", "offset", "value", "message"),
    [
        ("<i", 34, -1, "length of sequence 0 is -1, expected 0 or more"),
        ("<i", 34, 9, "sequence 0 ends at byte 36, but .* has 16"),
        ("<q", 42, -(2**31), "pointer of sequence 0 is -2,147,483,648, expected 0 or more"),
        ("<q", 42, 2, "pointer of sequence 0 is 2, expected a multiple of 4"),
        ("<q", 42, 16, "pointer of sequence 1 is 12, expected no less than the pointer before it"),
        ("<q", 66, 3, "document index 2 is 2, expected no less than the one before it"),
        ("<q", 66, -1, "document index 1 is -1, expected no less"),
    ],
)
@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_every_entry_of_an_index_is_checked(
    form: str, offset: int, value: int, message: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.data.indexed._CHECKED_AT_ONCE", at_once)
    prefix = write(tmp_path / "x", [[[1, 2, 3]], [[4]]])
    assert [s.tolist() for s in IndexedDataset(prefix)] == [[1, 2, 3], [4]]
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    struct.pack_into(form, index, offset, value)
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(UserError, match=message):
        IndexedDataset(prefix)
    with pytest.raises(UserError, match=r"x\.idx: "), merging({str(tmp_path / "merged"): [prefix]}):
        pass


def test_an_error_about_a_missing_dataset_lists_the_others_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"without `.bin` or `.idx`$"):
        IndexedDataset(tmp_path / "text")
    for name in ("text_text_document", *(f"chat_packed_{key}_document" for key in ("input_ids", "labels"))):
        write(tmp_path / name, [[[1, 2, 3]]])
    text, chat = tmp_path / "text_text_document", tmp_path / "chat"
    listed = re.escape(f"; the folder has {text} (for `tandem pretrain`) and {chat} (for `tandem finetune`)")
    with pytest.raises(UserError, match=f"{listed}$"):
        IndexedDataset(tmp_path / "text")


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"tokens 65536 \.\. 65536 do not fit uint16"),
        IndexedWriter(tmp_path / "x", "uint16") as writer,
    ):
        writer.add_document([65536])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, where a folder is expected"):
        IndexedWriter(tmp_path / "file" / "x")
    parts = [write(tmp_path / "a", [[[1]]]), write(tmp_path / "b", [[[1]]], "int64")]
    with pytest.raises(UserError, match="only equal dtypes can be merged"), merging({str(tmp_path / "c"): parts}):
        pass


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_pointer_of_git_lfs_is_no_data(suffix: str, tmp_path: Path) -> None:
    for name in (".idx", ".bin"):
        (tmp_path / f"a{name}").write_bytes(b"")
    (tmp_path / f"a{suffix}").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(UserError, match=rf"a{suffix}: a Git-LFS pointer"):
        IndexedDataset(tmp_path / "a")
