"""Handlers of conversations: they read the messages of a record, and the tools that it offers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from typing import Any, ClassVar

from tandem.data.handlers import entries
from tandem.data.handlers.fields import described, field, is_empty, string
from tandem.data.kinds import CONVERSATIONS, Kind
from tandem.data.templates.messages import Message
from tandem.errors import UserError, nearest

# A field that a record need not have -> the columns that usually hold it. Handlers read one of them, or none.
_USUAL_COLUMNS = {
    "query": ("input", "query", "context"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools", "functions"),
}


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
                    f"--map-keys: {type(self).__name__} has no field {name!r}; it has {sorted(self.defaults)}"
                    f"{nearest(name, sorted(self.defaults))}"
                )
            if name in self.defaults and not isinstance(column, str):
                raise UserError(f"--map-keys {name!r}: expected the name of a field, found {described(column)}")

    @classmethod
    def fits(cls, record: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
        """Whether a record may be of this form. `columns` are `defaults` with what `map_keys` renames."""
        return all(columns[name] in record for name in cls.needed)

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        """The messages of a record, as it has them: neighbours of one role are not joined.

        Raises:
            UserError: a field is missing or has another type.
        """
        raise NotImplementedError

    def tools(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """The JSON text of each tool that the record offers. The field is a list, or the JSON text of a list."""
        column = self._columns.get("tools", "")
        return entries.tools_of(record.get(column) or [], f"field {column!r}") if column else ()

    def template_variables(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the record itself gives to the chat template, such as `enable_thinking`: an object, or its JSON text."""
        column = self._columns.get("chat_template_kwargs", "")
        value = record.get(column) if column else None
        if isinstance(value, str) and value.strip():
            value = entries.parse_json(value, f"field {column!r}")
        if not value:
            return {}
        if not isinstance(value, dict):
            raise UserError(f"field {column!r}: expected an object, found {described(value)}")
        return value

    def unread(self, record: Mapping[str, Any]) -> Iterator[str]:
        """The columns of a record that hold something and are not read."""
        read = self._read_columns
        for name, value in record.items():
            if name not in read and not is_empty(value):
                yield name

    def mapped(self, record: Mapping[str, Any]) -> Iterator[str]:
        """The columns of `mapped_columns` that a record has."""
        return (column for column in self.mapped_columns if column in record)

    @cached_property
    def mapped_columns(self) -> tuple[str, ...]:
        """The columns that `map_keys` names and that a record need not have. Some record should."""
        named = {name: column for name, column in self.map_keys.items() if name in self.defaults and column}
        return tuple(column for name, column in named.items() if name not in self.needed)

    def held(self, record: Mapping[str, Any]) -> Iterator[str]:
        """The columns that hold something and that data may have under another name, too."""
        return (column for column in self._usual_columns if not is_empty(record.get(column)))

    @cached_property
    def _usual_columns(self) -> tuple[str, ...]:
        return tuple(column for name in _USUAL_COLUMNS if (column := self._columns.get(name)))

    def reader_of(self, column: str, held: Collection[str]) -> str | None:
        """The key of `map_keys` that would read a column under its usual name; None where there is none.

        Args:
            held: columns of `held` of any row. What reads one of them is not to read another one in its place.
        """
        for name, usual in _USUAL_COLUMNS.items():
            read = self._columns.get(name)
            if column in usual and read not in (None, column) and read not in held:
                return name
        return None

    @staticmethod
    def _nested_keys() -> tuple[str, ...]:
        """Keys of `map_keys` whose value is an object of names."""
        return ()

    @cached_property
    def _columns(self) -> dict[str, str]:
        return {name: self.map_keys.get(name, column) for name, column in self.defaults.items()}

    @cached_property
    def _read_columns(self) -> frozenset[str]:
        return frozenset(self._columns.values())

    def _required(self, record: Mapping[str, Any], name: str) -> str:
        column = self._columns[name]
        value = record.get(column)
        return value if isinstance(value, str) else string(record, column, f"--map-keys {name!r}")

    def _optional(self, record: Mapping[str, Any], name: str) -> str:
        """A field that may be null or missing."""
        column = self._columns[name]
        value = record.get(column) if column else None
        if value is None or isinstance(value, str):
            return value or ""
        return string(record, column, f"--map-keys {name!r}")

    def _list(self, record: Mapping[str, Any], name: str, of: str) -> list[Any]:
        """A field that holds a list with something in it, or the JSON text of one, as tables have it."""
        column = self._columns[name]
        value = field(record, column, f"--map-keys {name!r}")
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = entries.parse_json(value, f"field {column!r}")
        if not isinstance(value, list) or not value:
            raise UserError(f"field {column!r}: expected a list of {of}, found {described(value)}")
        return value

    def _with_system(self, record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
        """Add the `system` field, unless the conversation begins with a system message."""
        system = self._optional(record, "system")
        return messages if not system or messages[0].role == "system" else [Message("system", system), *messages]


class AlpacaStyleInstructionHandler(InstructionHandler):
    """`instruction`, `input`, `output`; where `map_keys` names them `system`, `tools` and `history`, pairs of texts."""

    defaults: ClassVar[dict[str, str]] = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "",
        "history": "",
        "tools": "",
        "chat_template_kwargs": "chat_template_kwargs",
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
        if not column or is_empty(record.get(column)):
            return []
        messages = []
        for number, pair in enumerate(self._list(record, "history", "[user, assistant] pairs"), start=1):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise UserError(
                    f"field {column!r}, turn {number}: expected [user, assistant] strings, found {described(pair)}"
                )
            messages += [Message("user", pair[0]), Message("assistant", pair[1])]
        return messages


class EntriesHandler(InstructionHandler):
    """Base of the handlers whose records hold a list with an entry for each message.

    Attributes:
        lists: the keys of `defaults` whose fields hold messages; by default all that are needed.
    """

    needed: ClassVar[tuple[str, ...]] = ("messages",)
    lists: ClassVar[tuple[str, ...]] = ()
    _entry: ClassVar[str] = "message"  # what an error calls an entry

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        return self._with_system(record, self._messages(record, "messages"))

    def unread(self, record: Mapping[str, Any]) -> Iterator[str]:
        """Also what the entries of messages hold, as `messages[].name`."""
        yield from super().unread(record)
        for name in self.lists or self.needed:
            column = self._columns[name]
            values = record.get(column)
            for entry in values if isinstance(values, list) else [values]:
                if isinstance(entry, dict) and not entry.keys() <= self._keys_of_entry:
                    others = (key for key in entry if key not in self._keys_of_entry and not is_empty(entry[key]))
                    yield from (f"{column}[].{key}" for key in others)

    @cached_property
    def _keys_of_entry(self) -> frozenset[str]:
        """The fields of an entry that are read, or that only number it."""
        names = ("role", "content", "tool_calls", "function_call", "tool_call_id")
        return frozenset({*names, *entries.THOUGHTS, *entries.WEIGHTS})

    def _messages(self, record: Mapping[str, Any], name: str, of: str = "messages") -> list[Message]:
        column = self._columns[name]
        numbered = enumerate(self._list(record, name, of), start=1)
        return [self._message(f"field {column!r}, {self._entry} {number}", entry) for number, entry in numbered]

    def _message(self, place: str, entry: Any) -> Message:
        raise NotImplementedError


class SharegptStyleInstructionHandler(EntriesHandler):
    """`conversations`: a list of `{from, value}`; `from` is human, gpt, observation, function_call or system.

    `tags` in `map_keys` renames all of these. `user`, `assistant` and `tool` are known, too. `system` and `tools` are
    read where `map_keys` names them.
    """

    defaults: ClassVar[dict[str, str]] = {
        "messages": "conversations",
        "system": "",
        "tools": "",
        "chat_template_kwargs": "chat_template_kwargs",
    }
    tags: ClassVar[dict[str, str]] = {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    }
    _other_roles: ClassVar[dict[str, str]] = {
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
        "developer": "system",
    }
    _entry: ClassVar[str] = "turn"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.map_keys.get("tags", {})
        if not isinstance(given, dict):
            raise UserError(f"--map-keys 'tags': expected an object of names, found {described(given)}")
        for name, tag in given.items():
            if name not in self.tags:
                raise UserError(
                    f"--map-keys 'tags': no tag {name!r}; expected one of {sorted(self.tags)}"
                    f"{nearest(name, sorted(self.tags))}"
                )
            if not isinstance(tag, str):
                raise UserError(f"--map-keys 'tags': {name}: expected a string, found {described(tag)}")

    @cached_property
    def _tags(self) -> dict[str, str]:
        return {**self.tags, **self.map_keys.get("tags", {})}

    @cached_property
    def _roles(self) -> dict[str, str]:
        """What `from` may be -> the role of the message; "function" is a call."""
        tags = self._tags
        return {
            **({} if "tags" in self.map_keys else self._other_roles),  # whoever gives tags means these alone
            tags["user_tag"]: "user",
            tags["assistant_tag"]: "assistant",
            tags["observation_tag"]: "tool",
            tags["function_tag"]: "function",
            tags["system_tag"]: "system",
        }

    @cached_property
    def _keys_of_entry(self) -> frozenset[str]:
        return frozenset({self._tags["role_tag"], self._tags["content_tag"], *entries.THOUGHTS, *entries.WEIGHTS})

    def _message(self, place: str, entry: Any) -> Message:
        role_tag, content_tag = self._tags["role_tag"], self._tags["content_tag"]
        if not isinstance(entry, dict):
            raise UserError(f"{place}: expected an object with {role_tag} and {content_tag}, found {described(entry)}")
        tag, value = entry.get(role_tag), entry.get(content_tag)
        role = self._roles.get(tag) if isinstance(tag, str) else None
        if role is None:
            raise UserError(f"{place}: {role_tag} is {tag!r}, expected one of {sorted(self._roles)}")
        if role != "function":
            return entries.message_of(role, value, f"{place}: {content_tag}", entry, place)
        thought, calls = entries.calls_in_text(entries.text_of(value, f"{place}: {content_tag}"), place)
        message = entries.message_of("assistant", "", place, entry, place, calls)
        return message._replace(reasoning=thought or message.reasoning)

    @staticmethod
    def _nested_keys() -> tuple[str, ...]:
        return ("tags",)


class OpenAIInstructionHandler(EntriesHandler):
    """`messages`: a list of objects with `role` (system, user, assistant, tool) and `content`; `tools`.

    An assistant's message may have `reasoning_content` and `tool_calls`. `system` is read where `map_keys` names it.
    """

    defaults: ClassVar[dict[str, str]] = {
        "messages": "messages",
        "system": "",
        "tools": "tools",
        "chat_template_kwargs": "chat_template_kwargs",
    }
    roles: ClassVar[dict[str, str]] = {
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
        "function": "tool",
    }

    def _message(self, place: str, entry: Any) -> Message:
        if not isinstance(entry, dict):
            raise UserError(f"{place}: expected an object with role and content, found {described(entry)}")
        role = self.roles.get(entry["role"]) if isinstance(entry.get("role"), str) else None
        if role is None:
            expected = "'system', 'user', 'assistant' or 'tool'"
            raise UserError(f"{place}: role is {entry.get('role')!r}, expected {expected}")
        calls, content = entries.calls_of(entry, place), entry.get("content")
        if content is None and calls:
            content = ""  # as OpenAI writes it
        return entries.message_of(role, content, f"{place}: content", entry, place, calls)

    def _side(self, record: Mapping[str, Any], name: str, role: str) -> list[Message]:
        """A field with a text, which is a message of `role`, with a message, or with a list of messages."""
        value = record.get(self._columns[name])
        if isinstance(value, dict):
            return [self._message(f"field {self._columns[name]!r}", value)]
        return [Message(role, value)] if isinstance(value, str) else self._messages(record, name, "messages, or a text")


class PromptCompletionHandler(OpenAIInstructionHandler):
    """`prompt` and `completion`: two texts, or two lists of messages as OpenAI's; `tools`. The completion is trained.

    `system` is read where `map_keys` names it.
    """

    defaults: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "completion": "completion",
        "system": "",
        "tools": "tools",
        "chat_template_kwargs": "chat_template_kwargs",
    }
    needed: ClassVar[tuple[str, ...]] = ("prompt", "completion")

    def messages(self, record: Mapping[str, Any]) -> list[Message]:
        before = [
            message._replace(trained=False) if message.role == "assistant" else message
            for message in self._side(record, "prompt", "user")
        ]
        return self._with_system(record, [*before, *self._side(record, "completion", "assistant")])
