"""The calls of tools that a model writes, in the two forms of Qwen.

Qwen3 writes a JSON object with `name` and `arguments`. Qwen3-Coder and Qwen3.5 write `<function=NAME>` with
`<parameter=KEY>` inside. Which form it is, is seen from the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.data.templates.messages import ToolCall

BEGIN, END = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def parse_call(text: str, tools: Sequence[str] = ()) -> ToolCall | None:
    r"""The call in the text between `<tool_call>` and `</tool_call>`; None where there is none.

    >>> parse_call('\n{"name": "add", "arguments": {"a": 1}}\n')
    ToolCall(name='add', arguments='{"a": 1}', given_as_text=True)

    Args:
        tools: the JSON text of each tool. In the form with `<parameter=KEY>`, they say which values are texts.
    """
    text = text.strip()
    return _from_json(text) if text.startswith("{") else _from_tags(text, tools)


def _from_json(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
        name, arguments = call.get("name"), call.get("arguments", {})
        if isinstance(arguments, str):  # some models write the text of an object
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return _call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _from_tags(text: str, tools: Sequence[str]) -> ToolCall | None:
    match = _FUNCTION.fullmatch(text)
    if match is None:
        return None
    name = match.group(1).strip()
    types = _types_of(name, tools)
    return _call(name, {key: _value(value, types.get(key)) for key, value in _PARAMETER.findall(match.group(2))})


def _call(name: str, arguments: Mapping[str, Any]) -> ToolCall:
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False), given_as_text=True)


def _value(text: str, kind: Any) -> Any:
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _types_of(name: str, tools: Sequence[str]) -> dict[str, Any]:
    """The type of each parameter, as the schema of a tool states it."""
    for tool in tools:
        function = json.loads(tool).get("function") or {}
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: schema.get("type") for key, schema in properties.items() if isinstance(schema, dict)}
    return {}
