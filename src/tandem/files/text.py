"""Text files of users: errors name the file, what is wrong with it, and for another encoding the command that helps."""

from __future__ import annotations

import codecs
import json
import os
import shlex
from pathlib import Path
from typing import Any

from tandem.errors import UserError

_SAMPLE_BYTES = 1 << 16
_BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CHINESE = ("\u4e00", "\u9fff")  # first and last of the common characters
_PROGRAMS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}  # what reads and writes files with such names


def read_text(path: str | Path, flag: str = "") -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        flag: the flag that named the file, for errors.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    content = _read_bytes(path, flag)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: {not_utf8(content, error, path)}".lstrip()) from None


def read_lines(path: str | Path, flag: str = "") -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that hold something, with their numbers from 1, without a byte order mark.

    Only ends of lines divide them: a JSON text may hold other characters that Python takes for such, as U+2028.

    Args:
        flag: the flag that named the file, for errors.

    Raises:
        UserError: the file cannot be read, or a line is not UTF-8.
    """
    found = []
    for number, content in enumerate(_read_bytes(path, flag).split(b"\n"), 1):
        try:
            line = content.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: {not_utf8(content, error, path)}") from None
        if line.strip():
            found.append((number, line))
    return found


def _read_bytes(path: str | Path, flag: str = "") -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {unreadable(path, error)}".lstrip()) from None


def read_json(path: str | Path) -> Any:
    """The value in a UTF-8 file of JSON.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None


def unreadable(path: str | Path, error: OSError) -> str:
    """A file, and why it cannot be read: `x.json: is a link to y.json, which is not there`."""
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return f"{path}: is a link to {os.readlink(path)}, which is not there: copy the file that it should name"
    if isinstance(error, PermissionError):
        return f"{path}: {error.strerror}: have it made readable, for example with chmod a+r"
    return f"{path}: {error.strerror}"


def not_utf8(content: bytes, error: UnicodeDecodeError, path: str | Path) -> str:
    """What is wrong with bytes of a file that are not UTF-8, which encoding they look like, and how to convert it."""
    where = f"not UTF-8: byte {content[error.start]:#04x} at position {error.start + 1}"
    encoding = likely_encoding(content)
    if encoding is None:
        return f"{where}. Convert it from the ENCODING that it was written in: {conversion(path, 'ENCODING')}"
    return f"{where}. It looks like {encoding}; convert it: {conversion(path, encoding)}"


def conversion(path: str | Path, encoding: str) -> str:
    """The shell's command that puts a file in UTF-8 in the place of one in another encoding, which it keeps.

    What named the file then finds it converted: a flag, a folder, a pattern. Given twice, it does no harm.

    >>> conversion("my data.json", "GBK")
    "mv -n 'my data.json' 'my data.json.gbk' && iconv -f GBK -t UTF-8 'my data.json.gbk' > 'my data.json'"
    """
    new, old = shlex.quote(str(path)), shlex.quote(f"{path}.{encoding.lower()}")
    program = _PROGRAMS.get(Path(path).suffix.lower())
    convert = f"iconv -f {encoding} -t UTF-8"
    convert = f"{program} -dc < {old} | {convert} | {program}" if program else f"{convert} {old}"
    return f"mv -n {new} {old} && {convert} > {new}"


def likely_encoding(content: bytes) -> str | None:
    """The encoding that bytes look like; None for one that is not recognised.

    >>> likely_encoding("中文".encode("gbk")), likely_encoding("text".encode("utf-16"))
    ('GBK', 'UTF-16')
    """
    sample = content[:_SAMPLE_BYTES]
    if sample.startswith(_BYTE_ORDER_MARKS) or sample.count(0) > len(sample) // 4:
        return "UTF-16"
    for encoding in ("gbk", "gb18030"):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(sample)
        except UnicodeDecodeError:
            continue
        others = [character for character in text if character > "\x7f"]
        # Bytes of a Western encoding are rarely valid in these, and then give rare characters.
        if sum(_CHINESE[0] <= character <= _CHINESE[1] for character in others) * 2 > len(others):
            return encoding.upper()
    return None
