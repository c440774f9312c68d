"""Handlers: which fields mean what, and errors that name field, expected and found (C5)."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.data.handlers import (
    AlpacaStyleInstructionHandler,
    GeneralPretrainHandler,
    OpenAIInstructionHandler,
    detect_handler,
    make_handler,
)
from tandem.data.templates import Message
from tandem.errors import UserError

ALPACA = {"instruction": "I", "input": "", "output": "O"}


def test_alpaca() -> None:
    handler = AlpacaStyleInstructionHandler()
    assert handler.messages(ALPACA) == [Message("user", "I"), Message("assistant", "O")]
    assert handler.messages({**ALPACA, "input": "x"})[0].content == "I\nx"
    assert handler.messages({**ALPACA, "input": None})[0].content == "I"
    assert handler.messages({"instruction": "", "output": ""}) == [Message("user", ""), Message("assistant", "")]
    ignored = {**ALPACA, "system": "S", "history": [["a", "b"]]}
    assert len(handler.messages(ignored)) == 2  # as upstream: only when mapped


def test_alpaca_map_keys() -> None:
    handler = AlpacaStyleInstructionHandler(
        {"prompt": "q", "query": "", "response": "a", "system": "s", "history": "past"}
    )
    record = {"q": "Q", "a": "A", "input": "not read", "s": "S", "past": [["1", "2"], ["3", "4"]]}
    assert [(m.role, m.content) for m in handler.messages(record)] == [
        ("system", "S"),
        ("user", "1"),
        ("assistant", "2"),
        ("user", "3"),
        ("assistant", "4"),
        ("user", "Q"),
        ("assistant", "A"),
    ]
    assert handler.messages({**record, "past": None, "s": None})[0] == Message("user", "Q")


def test_openai() -> None:
    record = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "U"},
            {"role": "assistant", "content": "A", "reasoning_content": "hm"},
        ]
    }
    expected = [Message("system", "S"), Message("user", "U"), Message("assistant", "A", "hm")]
    assert OpenAIInstructionHandler().messages(record) == expected
    assert OpenAIInstructionHandler({"messages": "chat"}).messages({"chat": record["messages"]}) == expected


def test_c5_detection() -> None:
    assert detect_handler(ALPACA, ("text",), None) == "AlpacaStyleInstructionHandler"
    assert detect_handler({"messages": []}, ("text",), None) == "OpenAIInstructionHandler"
    assert detect_handler({"text": "x"}, ("text",), None) == "GeneralPretrainHandler"
    assert detect_handler({"q": 1, "a": 2}, ("text",), {"prompt": "q", "response": "a"}).startswith("Alpaca")
    with pytest.raises(UserError, match=r"fields \['body'\] fit no handler"):
        detect_handler({"body": "x"}, ("text",), None)


BAD_ALPACA: list[tuple[dict[str, Any], str]] = [
    ({"instruction": "I"}, r"field 'output' \(map_keys 'response'\) is missing; found \['instruction'\]"),
    ({"instruction": "I", "ouput": "O"}, "did you mean 'ouput'"),
    ({**ALPACA, "output": 4}, "field 'output': expected a string, found int 4"),
    ({**ALPACA, "output": None}, "field 'output': expected a string, found null"),
    ({**ALPACA, "input": ["a"]}, r"field 'input': expected a string, found list \['a'\]"),
]


@pytest.mark.parametrize(("record", "message"), BAD_ALPACA)
def test_c5_alpaca_schema_errors(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AlpacaStyleInstructionHandler().messages(record)


BAD_MESSAGES: list[tuple[Any, str]] = [
    ("hi", "field 'messages': expected a list of messages, found str 'hi'"),
    ([], r"expected a list of messages, found list \[\]"),
    (["hi"], "'messages', message 1: expected an object with role and content"),
    ([{"role": "bot", "content": "x"}], "'messages', message 1: role is 'bot', expected 'system', 'user' or"),
    ([{"role": "user", "content": [1]}], "'messages', message 1: content: expected a string, found list"),
    ([{"role": "assistant", "content": "", "tool_calls": [1]}], "has tool_calls, which are not supported"),
    ([{"role": "assistant", "content": "", "reasoning_content": 1}], "reasoning_content: expected a string, found int"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_c5_message_schema_errors(messages: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        OpenAIInstructionHandler().messages({"messages": messages})


def test_mapped_columns_must_exist_and_names_be_known() -> None:
    with pytest.raises(UserError, match="field 'context'"):
        AlpacaStyleInstructionHandler({"query": "context"}).messages(ALPACA)
    with pytest.raises(UserError, match=r"no field 'promt'.*did you mean 'prompt'"):
        AlpacaStyleInstructionHandler({"promt": "q"})
    with pytest.raises(UserError, match=r"field 'h', turn 1: expected \[user, assistant\] strings"):
        AlpacaStyleInstructionHandler({"history": "h"}).messages({**ALPACA, "h": [["a"]]})
    with pytest.raises(UserError, match="did you mean 'GeneralPretrainHandler'"):
        make_handler("GenralPretrainHandler")
    with pytest.raises(UserError, match="renames none"):
        make_handler("GeneralPretrainHandler", map_keys={"prompt": "x"})
    assert make_handler("GeneralPretrainHandler", ["a", "b"]) == GeneralPretrainHandler(("a", "b"))
