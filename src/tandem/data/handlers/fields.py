"""Reading the fields of a record, with errors that name the field, what was expected and what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.errors import UserError, nearest


def field(record: Mapping[str, Any], column: str, named_by: str) -> Any:
    """The value of a column that must exist. `named_by` is the option that names the column."""
    if column not in record:
        raise UserError(
            f"field {column!r} ({named_by}) is missing; the record has {sorted(record)}"
            f"{nearest(column, sorted(record))}"
        )
    return record[column]


def string(record: Mapping[str, Any], column: str, named_by: str) -> str:
    """The text of a column that must exist and hold a string."""
    value = field(record, column, named_by)
    if not isinstance(value, str):
        raise UserError(f"field {column!r}: expected a string, found {described(value)}")
    return value


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing: null, an empty text, list or object. A number and false are something.

    >>> is_empty(""), is_empty(0)
    (True, False)
    """
    return value is None or (isinstance(value, str | list | dict) and not value)


def described(value: Any) -> str:
    """A value's type and how it begins, for messages.

    >>> described(["a", 1])
    "list ['a', 1]"
    """
    shown = repr(value)
    return "null" if value is None else f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
