"""Handlers: what the fields of a record mean. Each turns one record into texts or into a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tandem.data.templates import Message
from tandem.errors import UserError, nearest


@dataclass(frozen=True)
class GeneralPretrainHandler:
    """Plain text: the fields named by `json_keys`."""

    json_keys: tuple[str, ...] = ("text",)

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        """One text per key."""
        return [_string(record, key, "json_keys") for key in self.json_keys]


@dataclass(frozen=True)
class InstructionHandler:
    """A conversation; `map_keys` renames the fields it is read from, "" leaves one out."""

    defaults: ClassVar[dict[str, str]]
    needed: ClassVar[tuple[str, ...]]  # of the defaults, what every record has
    map_keys: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.map_keys:
            if name not in self.defaults:
                raise UserError(
                    f"map_keys: {type(self).__name__} has no field {name!r}; it has {sorted(self.defaults)}"
                    f"{nearest(name, sorted(self.defaults))}"
                )

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        """[system], then user and assistant in turn.

        Raises:
            UserError: a field is missing or of another type; names field, expected and found.
        """
        raise NotImplementedError

    def _column(self, name: str) -> str:
        return self.map_keys.get(name, self.defaults[name])

    def _required(self, record: Mapping[str, Any], name: str) -> str:
        return _string(record, self._column(name), f"map_keys {name!r}")

    def _optional(self, record: Mapping[str, Any], name: str) -> str:
        """A field that may be null, and absent unless the user named its column."""
        column = self._column(name)
        if not column or (column not in record and name not in self.map_keys):
            return ""
        value = _field(record, column, f"map_keys {name!r}")
        return "" if value is None else _string(record, column, f"map_keys {name!r}")


class AlpacaStyleInstructionHandler(InstructionHandler):
    """`instruction`, `input`, `output`; on request `system` and `history` (pairs of user and assistant)."""

    defaults: ClassVar[dict[str, str]] = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "",
        "history": "",
    }
    needed: ClassVar[tuple[str, ...]] = ("prompt", "response")

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        question = [self._required(record, "prompt"), self._optional(record, "query")]
        return [
            *_system_message(self._optional(record, "system")),
            *self._history(record),
            Message("user", "\n".join(part for part in question if part)),
            Message("assistant", self._required(record, "response")),
        ]

    def _history(self, record: Mapping[str, Any]) -> list[Message]:
        column = self._column("history")
        history = _field(record, column, "map_keys 'history'") if column else None
        if history is None:
            return []
        if not isinstance(history, list):
            raise UserError(f"field {column!r}: expected a list of [user, assistant] pairs, found {_kind(history)}")
        messages = []
        for number, pair in enumerate(history, start=1):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise UserError(
                    f"field {column!r}, turn {number}: expected [user, assistant] strings, found {_kind(pair)}"
                )
            messages += [Message("user", pair[0]), Message("assistant", pair[1])]
        return messages


class OpenAIInstructionHandler(InstructionHandler):
    """`messages`: a list of objects with `role` (system, user, assistant), `content` and, for an assistant,
    `reasoning_content`; on request a `system` field."""

    defaults: ClassVar[dict[str, str]] = {"messages": "messages", "system": ""}
    needed: ClassVar[tuple[str, ...]] = ("messages",)

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        column = self._column("messages")
        value = _field(record, column, "map_keys 'messages'")
        if not isinstance(value, list) or not value:
            raise UserError(f"field {column!r}: expected a list of messages, found {_kind(value)}")
        messages = [self._message(f"{column!r}, message {n}", entry) for n, entry in enumerate(value, start=1)]
        return [*_system_message(self._optional(record, "system")), *messages]

    @staticmethod
    def _message(place: str, entry: Any) -> Message:
        if not isinstance(entry, dict):
            raise UserError(f"field {place}: expected an object with role and content, found {_kind(entry)}")
        role = entry.get("role")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"field {place}: role is {role!r}, expected 'system', 'user' or 'assistant'")
        if entry.get("tool_calls"):
            raise UserError(f"field {place}: has tool_calls, which are not supported; leave such records out")
        content, reasoning = entry.get("content"), entry.get("reasoning_content")
        if not isinstance(content, str):
            raise UserError(f"field {place}: content: expected a string, found {_kind(content)}")
        if reasoning is not None and not isinstance(reasoning, str):
            raise UserError(f"field {place}: reasoning_content: expected a string, found {_kind(reasoning)}")
        return Message(role, content, reasoning or "")


PretrainHandler = GeneralPretrainHandler
Handler = PretrainHandler | InstructionHandler
_INSTRUCTION_HANDLERS: dict[str, type[InstructionHandler]] = {
    handler.__name__: handler for handler in (AlpacaStyleInstructionHandler, OpenAIInstructionHandler)
}
HANDLER_NAMES = [GeneralPretrainHandler.__name__, *_INSTRUCTION_HANDLERS]


def make_handler(name: str, json_keys: Sequence[str] = ("text",), map_keys: Mapping[str, str] | None = None) -> Handler:
    """The handler of a `--handler-name`; an unknown name is an error."""
    if name not in HANDLER_NAMES:
        raise UserError(f"handler {name!r}: expected one of {HANDLER_NAMES}{nearest(name, HANDLER_NAMES)}")
    if name in _INSTRUCTION_HANDLERS:
        return _INSTRUCTION_HANDLERS[name](dict(map_keys or {}))
    if map_keys:
        raise UserError(f"map_keys: {name} reads the fields of json_keys and renames none")
    return GeneralPretrainHandler(tuple(json_keys))


def detect_handler(record: Mapping[str, Any], json_keys: Sequence[str], map_keys: Mapping[str, str] | None) -> str:
    """The name of the handler whose fields `record` has: instructions before plain text.

    Raises:
        UserError: none fits.
    """
    for name, handler in _INSTRUCTION_HANDLERS.items():
        columns = {**handler.defaults, **(map_keys or {})}
        if all(columns[key] in record for key in handler.needed):
            return name
    if all(key in record for key in json_keys):
        return GeneralPretrainHandler.__name__
    raise UserError(
        f"fields {sorted(record)} fit no handler: expected {list(json_keys)} (plain text), instruction and output "
        f"(alpaca) or messages (OpenAI); name them with json_keys or map_keys, or choose one of {HANDLER_NAMES}"
    )


def _system_message(system: str) -> list[Message]:
    return [Message("system", system)] if system else []


def _field(record: Mapping[str, Any], column: str, named_by: str) -> Any:
    if column not in record:
        raise UserError(
            f"field {column!r} ({named_by}) is missing; found {sorted(record)}{nearest(column, sorted(record))}"
        )
    return record[column]


def _string(record: Mapping[str, Any], column: str, named_by: str) -> str:
    value = _field(record, column, named_by)
    if not isinstance(value, str):
        raise UserError(f"field {column!r}: expected a string, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    shown = repr(value)
    return "null" if value is None else f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
