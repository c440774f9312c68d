"""The fields of a request: a table says what each may hold, and one function reads them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem.data.handlers.fields import described
from tandem.errors import nearest
from tandem.server.errors import bad_request

Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Field:
    """What a field may hold.

    Attributes:
        expected: in words, for the error.
        default: its value where it is missing or null.
    """

    check: Check
    expected: str
    default: Any = None


def number(low: float, high: float = float("inf")) -> Field:
    return Field(lambda value: _is_number(value) and low <= value <= high, f"a number {_between(low, high)}")


def above(low: float) -> Field:
    return Field(lambda value: _is_number(value) and value > low, f"a number above {low:g}")


def whole(low: int, high: float = float("inf"), default: int | None = None) -> Field:
    return Field(
        lambda value: type(value) is int and low <= value <= high, f"a whole number {_between(low, high)}", default
    )


def flag(default: bool | None = False) -> Field:
    return Field(lambda value: isinstance(value, bool), "true or false", default)


def text() -> Field:
    return Field(lambda value: isinstance(value, str), "a text")


def an_object() -> Field:
    return Field(lambda value: isinstance(value, dict), "an object", {})


def anything() -> Field:
    return Field(lambda _: True, "")


def ignored() -> Field:
    """A field that says something about the client, and changes no answer."""
    return anything()


def only(*values: Any, because: str) -> Field:
    """A field of which only values that change nothing are taken."""
    return Field(lambda value: value in values, f"{' or '.join(map(repr, values))}: {because}")


def texts(most: int) -> Field:
    """A text, or a list of them; none of them empty."""

    def is_right(value: Any) -> bool:
        items = value if isinstance(value, list) else [value]
        return len(items) <= most and all(isinstance(item, str) and item for item in items)

    return Field(is_right, f"a text that is not empty, or a list of at most {most} of them", ())


def read(body: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The values of all fields of a request.

    Raises:
        ApiError: the body is no object, a field is unknown, or a value is not what its field may hold.
    """
    if not isinstance(body, dict):
        raise bad_request(f"the body is {described(body)}; expected a JSON object")
    for name, value in body.items():
        if name not in fields and value is not None:  # clients write null for what they do not ask
            raise bad_request(f"unknown field {name!r}{nearest(name, list(fields))}", name)
    values = {}
    for name, field in fields.items():
        value = body.get(name)
        if value is not None and not field.check(value):
            raise bad_request(f"{name}: expected {field.expected}; found {described(value)}", name)
        values[name] = field.default if value is None else value
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _between(low: float, high: float) -> str:
    return f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
