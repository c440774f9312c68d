"""Handlers of conversations: they read the messages of a record, and the tools that it offers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from typing import Any, ClassVar

from tandem.data.handlers.fields import described, field, string
from tandem.data.kinds import CONVERSATIONS, Kind
from tandem.data.templates.messages import Message, ToolCall, split_thought
from tandem.errors import UserError, nearest


@dataclass(frozen=True)
class InstructionHandler:
    """Reads a conversation. `map_keys` names the fields to read; the name "" leaves a field out."""

    kind: ClassVar[Kind] = CONVERSATIONS
    defaults: ClassVar[dict[str, str]]
    needed: ClassVar[tuple[str, ...]]  # the keys of `defaults` that every record must have
    map_keys: Mapping[str, Any] = dataclass_field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in self.map_keys.items():
            if name not in self.defaults and name not in self._nested_keys():
                raise UserError(
                    f"map_keys: {type(self).__name__} has no field {name!r}; it has {sorted(self.defaults)}"
                    f"{nearest(name, sorted(self.defaults))}"
                )
            if name in self.defaults and not isinstance(column, str):
                raise UserError(f"map_keys {name!r}: expected the name of a field, found {described(column)}")

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        """An optional system message, then user (or tool results) and assistant in turn.

        Raises:
            UserError: a field is missing or has another type.
        """
        raise NotImplementedError

    def tools(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """The JSON text of each tool that the record offers. The field is a list, or the JSON text of a list."""
        column = self._columns["tools"] if "tools" in self.defaults else ""
        if not column or (column not in record and "tools" not in self.map_keys):
            return ()
        value = field(record, column, "map_keys 'tools'") or []
        if isinstance(value, str):
            value = _parse_json(value, f"field {column!r}")
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise UserError(f"field {column!r}: expected a list of tools, each an object, found {described(value)}")
        return tuple(_json_text(tool, f"field {column!r}") for tool in value)

    @staticmethod
    def _nested_keys() -> tuple[str, ...]:
        """Keys of `map_keys` whose value is an object of names."""
        return ()

    @cached_property
    def _columns(self) -> dict[str, str]:
        return {name: self.map_keys.get(name, column) for name, column in self.defaults.items()}

    def _required(self, record: Mapping[str, Any], name: str) -> str:
        column = self._columns[name]
        value = record.get(column)
        return value if isinstance(value, str) else string(record, column, f"map_keys {name!r}")

    def _optional(self, record: Mapping[str, Any], name: str) -> str:
        """A field that may be null. It may be missing, too, unless the user named its column."""
        column = self._columns[name]
        value = record.get(column) if column else ""
        if isinstance(value, str):
            return value
        if column not in record and name not in self.map_keys:
            return ""
        value = field(record, column, f"map_keys {name!r}")
        return "" if value is None else string(record, column, f"map_keys {name!r}")

    def _entries(self, record: Mapping[str, Any]) -> list[Any]:
        column = self._columns["messages"]
        value = field(record, column, "map_keys 'messages'")
        if not isinstance(value, list) or not value:
            raise UserError(f"field {column!r}: expected a list of messages, found {described(value)}")
        return value

    def _with_system(self, record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
        """Add the `system` field, unless the conversation begins with a system message."""
        system = self._optional(record, "system")
        return messages if not system or messages[0].role == "system" else [Message("system", system), *messages]


class AlpacaStyleInstructionHandler(InstructionHandler):
    """`instruction`, `input`, `output`; `system` and `history` (pairs of texts) where `map_keys` names them."""

    defaults: ClassVar[dict[str, str]] = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "",
        "history": "",
    }
    needed: ClassVar[tuple[str, ...]] = ("prompt", "response")

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        return [*self._prompt(record), Message("assistant", self._required(record, "response"))]

    def _prompt(self, record: Mapping[str, Any]) -> list[Message]:
        """All messages before the answer."""
        question = [self._required(record, "prompt"), self._optional(record, "query")]
        user = Message("user", "\n".join(filter(None, question)))
        return self._with_system(record, [*self._history(record), user])

    def _history(self, record: Mapping[str, Any]) -> list[Message]:
        column = self._columns["history"]
        history = field(record, column, "map_keys 'history'") if column else None
        if history is None:
            return []
        if not isinstance(history, list):
            raise UserError(f"field {column!r}: expected a list of [user, assistant] pairs, found {described(history)}")
        messages = []
        for number, pair in enumerate(history, start=1):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise UserError(
                    f"field {column!r}, turn {number}: expected [user, assistant] strings, found {described(pair)}"
                )
            messages += [Message("user", pair[0]), Message("assistant", pair[1])]
        return messages


class SharegptStyleInstructionHandler(InstructionHandler):
    """`conversations`: a list of `{from, value}`; `from` is human, gpt, observation, function_call or system.

    `tags` in `map_keys` renames all of these. `system` and `tools` are read where `map_keys` names them.
    """

    defaults: ClassVar[dict[str, str]] = {"messages": "conversations", "system": "", "tools": ""}
    needed: ClassVar[tuple[str, ...]] = ("messages",)
    tags: ClassVar[dict[str, str]] = {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.map_keys.get("tags", {})
        if not isinstance(given, dict):
            raise UserError(f"map_keys 'tags': expected an object of names, found {described(given)}")
        for name, tag in given.items():
            if name not in self.tags:
                raise UserError(
                    f"map_keys 'tags': no tag {name!r}; expected one of {sorted(self.tags)}"
                    f"{nearest(name, sorted(self.tags))}"
                )
            if not isinstance(tag, str):
                raise UserError(f"map_keys 'tags': {name}: expected a string, found {described(tag)}")

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        column = self._columns["messages"]
        entries = enumerate(self._entries(record), start=1)
        return self._with_system(record, [self._message(f"{column!r}, turn {n}", entry) for n, entry in entries])

    def _message(self, place: str, entry: Any) -> Message:
        tags = {**self.tags, **self.map_keys.get("tags", {})}
        roles = {
            tags["user_tag"]: "user",
            tags["assistant_tag"]: "assistant",
            tags["observation_tag"]: "tool",
            tags["function_tag"]: "function",
            tags["system_tag"]: "system",
        }
        if not isinstance(entry, dict):
            raise UserError(
                f"field {place}: expected an object with {tags['role_tag']} and {tags['content_tag']}, "
                f"found {described(entry)}"
            )
        tag, value = entry.get(tags["role_tag"]), entry.get(tags["content_tag"])
        if not isinstance(tag, str) or tag not in roles:
            raise UserError(f"field {place}: {tags['role_tag']} is {tag!r}, expected one of {sorted(roles)}")
        if not isinstance(value, str):
            raise UserError(f"field {place}: {tags['content_tag']}: expected a string, found {described(value)}")
        return _function_call(value, place) if roles[tag] == "function" else Message(roles[tag], value)

    @staticmethod
    def _nested_keys() -> tuple[str, ...]:
        return ("tags",)


class OpenAIInstructionHandler(InstructionHandler):
    """`messages`: a list of objects with `role` (system, user, assistant, tool) and `content`; `tools`.

    An assistant's message may have `reasoning_content` and `tool_calls`. `system` is read where `map_keys` names it.
    """

    defaults: ClassVar[dict[str, str]] = {"messages": "messages", "system": "", "tools": "tools"}
    needed: ClassVar[tuple[str, ...]] = ("messages",)

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        column = self._columns["messages"]
        entries = enumerate(self._entries(record), start=1)
        return self._with_system(record, [self._message(f"{column!r}, message {n}", entry) for n, entry in entries])

    @staticmethod
    def _message(place: str, entry: Any) -> Message:
        if not isinstance(entry, dict):
            raise UserError(f"field {place}: expected an object with role and content, found {described(entry)}")
        role = entry.get("role")
        if role not in ("system", "user", "assistant", "tool"):
            raise UserError(f"field {place}: role is {role!r}, expected 'system', 'user', 'assistant' or 'tool'")
        content, reasoning = entry.get("content"), entry.get("reasoning_content")
        calls = _tool_calls(entry.get("tool_calls") or [], place)
        if content is None and calls:
            content = ""  # as OpenAI writes it
        if not isinstance(content, str):
            raise UserError(f"field {place}: content: expected a string, found {described(content)}")
        if reasoning is not None and not isinstance(reasoning, str):
            raise UserError(f"field {place}: reasoning_content: expected a string, found {described(reasoning)}")
        return Message(role, content, reasoning, calls)


def _function_call(text: str, place: str) -> Message:
    """A `function_call` turn of ShareGPT: one call or a list of calls as JSON, perhaps after a thought."""
    reasoning, rest = split_thought(text)
    value = _parse_json(rest, f"field {place}")
    return Message(
        "assistant", "", reasoning or None, _tool_calls(value if isinstance(value, list) else [value], place)
    )


def _tool_calls(value: Any, place: str) -> tuple[ToolCall, ...]:
    """A list of calls `{name, arguments}`, or `{function: {name, arguments}}` as OpenAI writes them.

    The arguments are an object or a text.
    """
    if not isinstance(value, list):
        raise UserError(f"field {place}: tool_calls: expected a list, found {described(value)}")
    calls = []
    for entry in value:
        call = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise UserError(f"field {place}: expected a call with name and arguments, found {described(entry)}")
        arguments = call["arguments"]
        is_text = isinstance(arguments, str)
        text = arguments if is_text else _json_text(arguments, f"field {place}: arguments of {call['name']}")
        calls.append(ToolCall(call["name"], text, is_text))
    return tuple(calls)


def _parse_json(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # `loads` accepts half a surrogate pair, which is not text
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {error}; found {described(text)}") from None
    return value


def _json_text(value: Any, place: str) -> str:
    """The JSON text of a value. A value of a table may be a date, a decimal or bytes: JSON cannot hold these."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise UserError(f"{place}: {error}; store texts or numbers instead") from None
