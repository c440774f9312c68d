"""What an entry of a conversation holds: its text, its thought, its calls, and whether it is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.data.handlers.fields import described
from tandem.data.templates.messages import Message, ToolCall, split_thought
from tandem.errors import UserError

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names of a thought that has a field of its own
WEIGHTS = ("weight", "loss", "loss_weight", "train", "trainable", "training")  # say whether an answer is trained
_THOUGHTS, _WEIGHTS = frozenset(THOUGHTS), frozenset(WEIGHTS)
_PARTS_OF_TEXT = ("text", "input_text", "output_text")
_KEYS_OF_CALL = {"name", "arguments", "id", "type", "index"}


def message_of(
    role: str,
    content: Any,
    content_place: str,
    entry: Mapping[str, Any],
    place: str,
    calls: tuple[ToolCall, ...] = (),
) -> Message:
    """The message of an entry, with its thought and whether it is trained.

    Raises:
        UserError: the content is no text, or another than the assistant thinks or makes calls.
    """
    text = (result_of if role == "tool" else text_of)(content, content_place)
    thought = thought_of(entry, place)
    if role != "assistant" and (thought or calls):
        raise UserError(f"{place}: only an assistant has thoughts and calls, and this is a message of {role!r}")
    return Message(role, text, thought, calls, is_trained(entry, place))


def text_of(value: Any, place: str) -> str:
    """A text: a string, or a list of parts that are texts. Parts are joined with nothing between them.

    >>> text_of([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "content")
    'ab'

    Raises:
        UserError: a part is no text, such as an image; or the value is something else.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: expected a string, found {described(value)}")
    texts = []
    for number, part in enumerate(value, start=1):
        if isinstance(part, dict) and part.get("type", "text") not in _PARTS_OF_TEXT:
            raise UserError(f"{place}: part {number} is of type {part['type']!r}; only texts can be trained on")
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise UserError(f"{place}: expected a string, or a list of texts, found {described(value)}")
        texts.append(text)
    return "".join(texts)


def result_of(value: Any, place: str) -> str:
    """The text of a tool's result: as `text_of`, or the JSON text of an object, a list or a number."""
    is_parts = isinstance(value, list) and any(isinstance(part, dict) and "type" in part for part in value)
    return text_of(value, place) if value is None or isinstance(value, str) or is_parts else json_text(value, place)


def thought_of(entry: Mapping[str, Any], place: str) -> str | None:
    """The thought that an entry has in a field of its own; None where it has none.

    Raises:
        UserError: it is no text, or two fields hold different thoughts.
    """
    if _THOUGHTS.isdisjoint(entry):  # the usual case, made fast
        return None
    found: dict[str, str] = {}
    for name in THOUGHTS:
        value = entry.get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{place}: {name}: expected a string, found {described(value)}")
        if value is not None:
            found[name] = value
    thoughts = {text for text in found.values() if text}
    if len(thoughts) > 1:
        raise UserError(f"{place}: {' and '.join(found)} hold different thoughts; leave one of them")
    return next(iter(thoughts), "" if found else None)


def is_trained(entry: Mapping[str, Any], place: str) -> bool | None:
    """Whether an entry says that it is trained, in any field of `WEIGHTS`; None where it does not say.

    >>> is_trained({"role": "assistant", "weight": 0}, "message 2")
    False

    Raises:
        UserError: a field is neither 0 or false nor 1 or true, or two fields differ.
    """
    if _WEIGHTS.isdisjoint(entry):  # the usual case, made fast
        return None
    said: dict[str, bool] = {}
    for name in WEIGHTS:
        value = entry.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{place}: {name} is {value!r}; expected 0 or false (not trained), or 1 or true")
        said[name] = bool(value)
    if len(set(said.values())) > 1:
        raise UserError(f"{place}: {' and '.join(said)} do not agree on whether it is trained; leave one of them")
    return next(iter(said.values()), None)


def calls_of(entry: Mapping[str, Any], place: str) -> tuple[ToolCall, ...]:
    """The calls of an assistant's entry: `tool_calls`, a list or its JSON text, or the older `function_call`."""
    value, single = entry.get("tool_calls") or [], entry.get("function_call")
    if isinstance(value, str):
        value = parse_json(value, f"{place}: tool_calls")
    if not isinstance(value, list):
        raise UserError(f"{place}: tool_calls: expected a list, found {described(value)}")
    if single and value:
        raise UserError(f"{place}: has both tool_calls and function_call; leave one of them")
    return _calls([single] if single else value, place)


def calls_in_text(text: str, place: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The thought and the calls of ShareGPT's `function_call`: one call or a list as JSON, perhaps after a thought."""
    reasoning, rest = split_thought(text)
    value = parse_json(rest, place)
    return reasoning, _calls(value if isinstance(value, list) else [value], place)


def _calls(values: Sequence[Any], place: str) -> tuple[ToolCall, ...]:
    """Calls `{name, arguments}`, or `{function: {name, arguments}}` as OpenAI writes them."""
    calls = []
    for entry in values:
        call = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise UserError(f"{place}: expected a call with name and arguments, found {described(entry)}")
        if "arguments" not in call and (others := sorted(set(call) - _KEYS_OF_CALL)):
            raise UserError(f"{place}: the call of {call['name']} has no arguments, but {others}; rename the field")
        calls.append(_call(call["name"], call.get("arguments"), f"{place}: arguments of {call['name']}"))
    return tuple(calls)


def _call(name: str, arguments: Any, place: str) -> ToolCall:
    """A call. Its arguments are an object, or the text of one; none, or an empty text, are an empty object."""
    is_text = isinstance(arguments, str)
    if arguments is None or (is_text and not arguments.strip()):
        return ToolCall(name, "{}", is_text)
    value = parse_json(arguments, place) if is_text else arguments
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object, or the JSON text of one, found {described(arguments)}")
    text = json_text(value, place)  # which refuses what JSON cannot hold
    return ToolCall(name, arguments if is_text else text, is_text)


def tools_of(value: Any, place: str) -> tuple[str, ...]:
    """The JSON text of each tool. The value is a list, or its JSON text.

    A function that stands bare, without `{"type": "function", "function": ..}` around it, is wrapped, as servers do.
    """
    if isinstance(value, str):
        value = parse_json(value, place) if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(f"{place}: expected a list of tools, each an object, found {described(value)}")
    return tuple(json_text(_wrapped(tool), place) for tool in value)


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    if isinstance(tool.get("function"), dict):
        return tool if "type" in tool else {"type": "function", **tool}
    if isinstance(tool.get("name"), str) and tool.get("type", "function") == "function":
        return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
    return tool


def parse_json(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # `loads` accepts half a surrogate pair, which is not text
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON: {error}; found {described(text)}") from None
    return value


def json_text(value: Any, place: str) -> str:
    """The JSON text of a value. A value of a table may be a date, a decimal or bytes: JSON cannot hold these."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {error}; store texts or numbers instead") from None
