import errno
import os
from pathlib import Path

import pytest

from tandem.files import large_file
from tandem.files.large_file import CHUNK, CHUNKS, TOGETHER, LargeFile, chunk_for


@pytest.mark.parametrize("size", [0, 1, 4096, CHUNK - 1, CHUNK, CHUNK + 1, (CHUNKS + 2) * CHUNK + 4097])
def test_holds_what_was_written(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    file = LargeFile(tmp_path / "folder" / "file")
    places = []
    for start in range(0, size, 1_000_003):  # pieces end inside chunks and cross their borders
        places.append((file.tell(), start))
        file.write(data[start : start + 1_000_003])
    assert all(position == start for position, start in places)
    assert file.tell() == size
    file.close()
    assert (tmp_path / "folder" / "file").read_bytes() == data


def test_many_files_share_their_memory(tmp_path: Path) -> None:
    assert chunk_for(100) * CHUNKS * 100 <= TOGETHER
    data = os.urandom(CHUNK + 12345)
    files = [LargeFile(tmp_path / str(number), chunk_for(1000)) for number in range(3)]
    for start in range(0, len(data), 50_001):
        for file in files:
            file.write(data[start : start + 50_001])
    for file in files:
        file.close()
        assert file.path.read_bytes() == data


def test_replaces_a_longer_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * CHUNK))
    file = LargeFile(tmp_path / "file")
    file.write(b"short")
    file.close()
    assert (tmp_path / "file").read_bytes() == b"short"


@pytest.mark.skipif(not large_file.DIRECT, reason="this system has no O_DIRECT")
@pytest.mark.parametrize("refused_by", ["open", "pwrite"])
def test_a_disk_that_refuses_direct_writes_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_by: str
) -> None:
    refusals = []

    def refuse(*arguments: object) -> None:
        refusals.append(arguments)
        raise OSError(errno.EINVAL, "Invalid argument")

    real_open, real_pwrite = os.open, os.pwrite
    if refused_by == "open":
        monkeypatch.setattr(
            large_file.os,
            "open",
            lambda path, flags, mode: refuse(path) if flags & large_file.DIRECT else real_open(path, flags, mode),
        )
    else:
        monkeypatch.setattr(large_file.os, "pwrite", lambda *call: real_pwrite(*call) if refusals else refuse(*call))
    data = os.urandom(2 * CHUNK + 5)
    file = LargeFile(tmp_path / "file")
    file.write(data)
    file.close()
    assert len(refusals) == 1
    assert (tmp_path / "file").read_bytes() == data


def test_a_write_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(large_file.os, "pwrite", full)
    file = LargeFile(tmp_path / "file")
    with pytest.raises(OSError, match="No space left on device") as raised:
        file.write(bytes((CHUNKS + 1) * CHUNK))
    assert raised.value.filename == str(tmp_path / "file")
    file.abort()
