"""Fields of a record, and the errors that name them: field, what was expected, what was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.errors import UserError, nearest


def field(record: Mapping[str, Any], column: str, named_by: str) -> Any:
    """The value of a column that must be there; `named_by` is the option that names it."""
    if column not in record:
        raise UserError(
            f"field {column!r} ({named_by}) is missing; found {sorted(record)}{nearest(column, sorted(record))}"
        )
    return record[column]


def string(record: Mapping[str, Any], column: str, named_by: str) -> str:
    """The text of a column that must be there."""
    value = field(record, column, named_by)
    if not isinstance(value, str):
        raise UserError(f"field {column!r}: expected a string, found {described(value)}")
    return value


def described(value: Any) -> str:
    """A value's type and beginning, for messages."""
    shown = repr(value)
    return "null" if value is None else f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
