"""Megatron's indexed dataset, `.bin/.idx`, byte for byte: a memory-mapped reader, a streaming writer, a merge.

The `.bin` file is the tokens of all sequences, end to end. The `.idx` file, little endian:

    0    9 bytes  b"MMIDIDX\\0\\0"
    9    u64      version, 1
    17   u8       dtype code
    18   u64      S, number of sequences
    26   u64      D, number of documents + 1
    34   i32[S]   tokens of each sequence
         i64[S]   byte offset of each sequence in .bin
         i64[D]   document_indices: 0, then the number of sequences up to the end of each document
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from tandem.data.kinds import datasets_in_folder_of
from tandem.errors import UserError
from tandem.files.publish import check_writable
from tandem.files.real import check_real

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CHECKED_AT_ONCE = 1 << 20  # entries of an index
DTYPE_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}


class IndexedDataset:
    """The sequences of `{prefix}.bin` and `{prefix}.idx`, memory-mapped.

    Attributes:
        dtype: type of the tokens.
        lengths: int32 [sequences], number of tokens of each.
        document_indices: int64 [documents + 1]; document d has the sequences from entry d up to entry d + 1.

    Raises:
        UserError: a file is missing, truncated, or not a Megatron dataset. Or a length, a pointer or a document index
            is wrong: each is checked.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        for suffix in (".idx", ".bin"):
            check_real(f"{self.prefix}{suffix}")
        self.dtype, self.lengths, self._pointers, self.document_indices = _read_index(Path(f"{self.prefix}.idx"))
        self._tokens = _map_tokens(Path(f"{self.prefix}.bin"), self.dtype, self.lengths, self._pointers)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of one sequence, dtype [length], read-only."""
        return self.get(range(len(self))[index])

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens of sequence `index`, from `offset` on; without a length, all up to the end."""
        available = int(self.lengths[index]) - offset
        length = available if length is None else length
        assert 0 <= length <= available, (index, offset, length)
        start = int(self._pointers[index]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


class IndexedWriter:
    """Writes `{prefix}.bin` and `{prefix}.idx` as documents arrive. Only the lengths stay in memory.

    Both files have temporary names until `publish`. The `.idx` gets its final name last, so a `.bin` next to an `.idx`
    is always complete. As a context manager, it publishes at the end; after an exception it removes its files.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.typing.DTypeLike = np.int32) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in DTYPE_CODES:
            raise UserError(
                f"{prefix}: dtype {np.dtype(dtype)} cannot be stored; use one of {sorted(map(str, DTYPE_CODES))}"
            )
        check_writable(Path(self.prefix).absolute().parent)
        Path(self.prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
        self._lengths: list[np.ndarray] = []
        self._documents: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._sequences = 0
        self._bin_part = part_of(Path(f"{self.prefix}.bin"))
        self._bin = self._bin_part.open("wb")

    def add_document(self, tokens: np.typing.ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Append one document: `tokens` [t] are its sequences end to end, `lengths` the number of tokens of each.

        By default the document is one sequence; `lengths=[]` is an empty document.
        """
        tokens = self._as_tokens(tokens)
        lengths = [tokens.size] if lengths is None else lengths
        self._append(tokens, np.asarray(lengths, np.int64), np.array([len(lengths)], np.int64))

    def add_documents(self, tokens: np.typing.ArrayLike, lengths: np.typing.ArrayLike) -> None:
        """Append documents of one sequence each: `tokens` [t] end to end, `lengths` [documents] tokens of each."""
        lengths = np.asarray(lengths, np.int64)
        self._append(self._as_tokens(tokens), lengths, np.ones(lengths.size, np.int64))

    def add_dataset(self, prefix: str | os.PathLike[str]) -> None:
        """Append all documents of another dataset by copying its bytes."""
        dtype, lengths, pointers, documents = _read_index(Path(f"{os.fspath(prefix)}.idx"))
        if dtype != self.dtype:
            raise UserError(f"{prefix}: tokens are {dtype}, expected {self.dtype}; only equal dtypes can be merged")
        if not np.array_equal(pointers, _pointers(lengths, dtype.itemsize)):
            raise UserError(
                f"{prefix}.idx: sequences are not stored end to end, so it cannot be merged; write it again"
            )
        _map_tokens(Path(f"{os.fspath(prefix)}.bin"), dtype, lengths, pointers)  # raises when truncated
        with Path(f"{os.fspath(prefix)}.bin").open("rb") as source:
            shutil.copyfileobj(source, self._bin, 16 << 20)
        self._extend_index(lengths, np.diff(documents))

    def publish(self) -> None:
        """Write the index and give both files their final names."""
        _flush_to_disk(self._bin)
        self._bin.close()
        lengths = np.concatenate([*self._lengths, np.empty(0, np.int32)])
        publish(self._bin_part, lengths, self.dtype, self.prefix, np.cumsum(np.concatenate(self._documents)))

    def discard(self) -> None:
        """Remove the temporary files. Files under the final names stay as they were."""
        self._bin.close()
        self._bin_part.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.publish()
        else:
            self.discard()

    def _as_tokens(self, tokens: np.typing.ArrayLike) -> np.ndarray:
        given = np.asarray(tokens)
        if given.size == 0:
            return np.empty(0, self.dtype)
        if self.dtype.kind in "iu" and given.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            if given.min() < limits.min or given.max() > limits.max:
                raise UserError(
                    f"{self.prefix}: tokens {given.min()} .. {given.max()} do not fit {self.dtype}; use a wider dtype"
                )
        return given.astype(self.dtype, copy=False)

    def _append(self, tokens: np.ndarray, lengths: np.ndarray, sequences_of_document: np.ndarray) -> None:
        assert tokens.ndim == 1
        assert tokens.size == lengths.sum()
        self._bin.write(tokens.tobytes())
        self._extend_index(lengths, sequences_of_document)

    def _extend_index(self, lengths: np.ndarray, sequences_of_document: np.ndarray) -> None:
        self._lengths.append(lengths.astype(np.int32))
        self._documents.append(sequences_of_document)


@contextmanager
def merging(groups: Mapping[str, Sequence[str | os.PathLike[str]]]) -> Iterator[None]:
    """Write the documents of several parts, in order, under each output prefix: the bytes that one run would write.

    The body of the `with` runs when all files are written and before any gets its final name.
    """
    with ExitStack() as stack:
        for output, parts in groups.items():
            if not parts:
                raise UserError(f"{output}: nothing to merge; name at least one dataset")
            dtype, *_ = _read_index(Path(f"{os.fspath(parts[0])}.idx"))
            writer = stack.enter_context(IndexedWriter(output, dtype))
            for part in parts:
                writer.add_dataset(part)
        yield


def publish(
    tokens: Path,
    lengths: np.ndarray,
    dtype: np.typing.DTypeLike,
    prefix: str | os.PathLike[str],
    document_indices: np.ndarray | None = None,
) -> None:
    """Rename the file `tokens` to the `.bin` of `prefix`, and write its `.idx`, which gets its name last.

    `lengths` are the tokens of each sequence; `document_indices` as in `write_index`.
    """
    bin_path, idx_path = (Path(f"{os.fspath(prefix)}.{suffix}") for suffix in ("bin", "idx"))
    idx_part = part_of(idx_path)
    try:
        write_index(idx_part, lengths, dtype, document_indices)
        idx_path.unlink(missing_ok=True)  # an old index must never meet the new tokens
        os.replace(tokens, bin_path)
        os.replace(idx_part, idx_path)
    finally:
        idx_part.unlink(missing_ok=True)


def write_index(
    path: Path, lengths: np.ndarray, dtype: np.typing.DTypeLike, document_indices: np.ndarray | None = None
) -> None:
    """Write an `.idx` file. `document_indices` is int64 [documents + 1]; None makes each sequence a document."""
    documents = np.arange(len(lengths) + 1) if document_indices is None else document_indices
    dtype = np.dtype(dtype)
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, DTYPE_CODES[dtype], lengths.size, documents.size))
        file.write(lengths.astype("<i4").tobytes())
        file.write(_pointers(lengths, dtype.itemsize).astype("<i8").tobytes())
        file.write(documents.astype("<i8").tobytes())
        _flush_to_disk(file)


def part_of(path: Path) -> Path:
    """The temporary name under which a file is written."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _flush_to_disk(file: object) -> None:
    file.flush()  # type: ignore[attr-defined]
    os.fsync(file.fileno())  # type: ignore[attr-defined]


def _pointers(lengths: np.ndarray, itemsize: int) -> np.ndarray:
    """Byte offset of each sequence, int64: 32 bits overflow beyond 2 GiB."""
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    return np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """dtype, lengths int32 [S], pointers int64 [S], document_indices int64 [D]."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        advice = f"a dataset prefix is its path without `.bin` or `.idx`{datasets_in_folder_of(path)}"
        raise UserError(f"{path}: no such file; {advice}") from None
    except ValueError:  # an empty file cannot be mapped
        raise UserError(f"{path}: the file is empty; the program that wrote it did not finish") from None
    if data.size < _HEADER.size or bytes(data[:9]) != _MAGIC:
        raise UserError(f"{path}: not a Megatron index: begins with {bytes(data[:9])!r}, expected {_MAGIC!r}")
    _, version, code, sequences, documents = _HEADER.unpack(bytes(data[: _HEADER.size]))
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{path}: version {version}, dtype code {code}; expected version 1 and a code in {sorted(_DTYPES)}"
        )
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if data.size == expected + sequences and sequences:
        raise UserError(f"{path}: a multimodal index (it stores a mode per sequence); only text datasets can be read")
    if data.size != expected:
        raise UserError(
            f"{path}: has {data.size} bytes, but {sequences} sequences and {documents} document entries need "
            f"{expected}; the file is damaged or was not written to its end"
        )
    body = data[_HEADER.size :]
    lengths = np.frombuffer(body, "<i4", sequences)
    pointers = np.frombuffer(body, "<i8", sequences, 4 * sequences)
    document_indices = np.frombuffer(body, "<i8", documents, 12 * sequences)
    if documents == 0 or document_indices[0] != 0 or document_indices[-1] != sequences:
        raise UserError(
            f"{path}: document indices must go from 0 to {sequences} (the number of sequences); write it again"
        )
    dtype = np.dtype(_DTYPES[code])
    _require_each(path, "length of sequence", lengths, lambda part, _: part >= 0, "0 or more")
    _require_each(path, "pointer of sequence", pointers, lambda part, _: part >= 0, "0 or more")
    _require_each(path, "pointer of sequence", pointers, _rises, "no less than the pointer before it")
    _require_each(
        path,
        "pointer of sequence",
        pointers,
        lambda part, _: part % dtype.itemsize == 0,
        f"a multiple of {dtype.itemsize}, the bytes of a token",
    )
    _require_each(path, "document index", document_indices, _rises, "no less than the one before it")
    return dtype, lengths, pointers, document_indices


_Holds = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of values and the values before them: bool for each


def _rises(part: np.ndarray, before: np.ndarray) -> np.ndarray:
    return np.asarray(part >= before)


def _require_each(path: Path, name: str, values: np.ndarray, holds: _Holds, expected: str) -> None:
    """Raise UserError with the first value for which `holds` is false. Memory does not grow with the file."""
    for begin in range(0, len(values), _CHECKED_AT_ONCE):
        part = values[begin : begin + _CHECKED_AT_ONCE]
        before = np.concatenate([values[max(0, begin - 1) : max(1, begin)], part[:-1]])
        wrong = np.flatnonzero(~holds(part, before))
        if len(wrong):
            number = begin + int(wrong[0])
            raise UserError(
                f"{path}: {name} {number:,} is {int(values[number]):,}, expected {expected}; the file is damaged: copy "
                f"it again, or preprocess again"
            )


def _map_tokens(path: Path, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: no such file, though its .idx exists; copy both files")
    expected = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if len(lengths) else 0
    size = path.stat().st_size
    if size != expected:
        raise UserError(
            f"{path}: has {size} bytes, but its .idx describes {expected}; one is damaged, or they do not match"
        )
    for begin in range(0, len(lengths), _CHECKED_AT_ONCE):  # pointers rise, but a length may reach too far
        part = slice(begin, begin + _CHECKED_AT_ONCE)
        ends = pointers[part] + lengths[part].astype(np.int64) * dtype.itemsize
        for number in np.flatnonzero(ends > size)[:1].tolist():
            raise UserError(
                f"{path.with_suffix('.idx')}: sequence {begin + number:,} ends at byte {int(ends[number]):,}, but "
                f"{path} has {size:,}; the .idx is damaged: copy it again, or preprocess again"
            )
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)
