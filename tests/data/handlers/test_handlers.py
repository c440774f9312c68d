"""Handlers: which fields mean what, and errors that name field, expected and found."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest

from tandem.data.handlers.conversations import (
    AlpacaStyleInstructionHandler,
    OpenAIInstructionHandler,
    PromptCompletionHandler,
    SharegptStyleInstructionHandler,
)
from tandem.data.handlers.registry import detect_handler, make_handler
from tandem.data.handlers.text import AlpacaPretrainHandler, GeneralPretrainHandler, SharegptPretrainHandler
from tandem.data.templates.messages import Message, ToolCall
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
    assert handler.messages({"q": "Q", "a": "A"}) == [Message("user", "Q"), Message("assistant", "A")]
    assert handler.messages({**record, "past": '[["1", "2"]]'})[1:3] == [
        Message("user", "1"),
        Message("assistant", "2"),
    ]
    assert handler.mapped_columns == ("s", "past")
    assert list(handler.mapped({"q": "Q", "a": "A", "past": []})) == ["past"]


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


CALL = {"name": "add", "arguments": {"a": 1, "b": "é"}}
TOOL = {"type": "function", "function": {"name": "add"}}


def test_openai_tools() -> None:
    record = {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3", "reasoning_content": "so"},
        ],
    }
    handler = OpenAIInstructionHandler()
    assert handler.messages(record) == [
        Message("user", "1+2?"),
        Message("assistant", "", None, (ToolCall("add", '{"a": 1, "b": "é"}'),)),
        Message("tool", "3"),
        Message("assistant", "3", "so"),
    ]
    assert handler.tools(record) == ('{"type": "function", "function": {"name": "add"}}',)
    assert handler.tools({**record, "tools": None}) == handler.tools({"messages": []}) == ()
    with pytest.raises(UserError, match="field 'tools': expected a list of tools"):
        handler.tools({"tools": {"a": 1}})
    with pytest.raises(UserError, match="field 'tools': Object of type date is not JSON"):
        handler.tools({"tools": [{"a": date(2026, 1, 2)}]})


USER = {"role": "user", "content": "U"}


def answer_of(**entry: Any) -> Message:
    """The message of an OpenAI entry of the assistant."""
    return OpenAIInstructionHandler().messages({"messages": [USER, {"role": "assistant", **entry}]})[1]


@pytest.mark.parametrize("name", ["weight", "loss", "loss_weight", "train", "trainable", "training"])
@pytest.mark.parametrize(("value", "trained"), [(0, False), (0.0, False), (False, False), (1, True), (True, True)])
def test_an_answer_says_whether_it_is_trained(name: str, value: float, trained: bool) -> None:
    assert answer_of(content="A", **{name: value}) == Message("assistant", "A", trained=trained)
    turns = [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A", name: value}]
    assert SharegptStyleInstructionHandler().messages({"conversations": turns})[1].trained is trained
    assert answer_of(content="A", **{name: None}).trained is None


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"weight": 0.5}, r"message 2: weight is 0\.5; expected 0 or false"),
        ({"train": "no"}, "message 2: train is 'no'"),
        ({"weight": 0, "loss": True}, "weight and loss do not agree"),
        ({"reasoning": "a", "thinking": "b"}, "reasoning and thinking hold different thoughts"),
        ({"thinking": ["a"]}, "thinking: expected a string, found list"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "content: part 1 is of type 'image_url'"),
        ({"content": [{"type": "text", "text": 1}]}, "expected a string, or a list of texts"),
        ({"tool_calls": [{"name": "f", "parameters": {}}]}, "the call of f has no arguments, but .*'parameters'"),
        ({"tool_calls": [{"name": "f", "arguments": "add 1"}]}, "arguments of f: not valid JSON"),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "arguments of f: expected an object, or the JSON"),
        ({"tool_calls": [{"name": "f", "arguments": 3}]}, "arguments of f: expected an object"),
        ({"tool_calls": [{"name": "f", "arguments": {"a": float("nan")}}]}, "arguments of f: .*; store texts"),
        ({"tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}, "both tool_calls and function_call"),
    ],
)
def test_what_an_answer_says_wrongly(entry: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        answer_of(**{"content": "A", **entry})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_has_several_names(name: str) -> None:
    assert answer_of(content="A", **{name: "hm"}) == Message("assistant", "A", "hm")
    assert answer_of(content="A", reasoning_content="", **({} if name == "reasoning_content" else {name: "hm"})) in (
        Message("assistant", "A", "hm"),
        Message("assistant", "A", ""),
    )
    turns = [{"from": "user", "value": "U"}, {"from": "assistant", "value": "A", name: "hm"}]
    assert SharegptStyleInstructionHandler().messages({"conversations": turns})[1] == Message("assistant", "A", "hm")
    with pytest.raises(UserError, match="only an assistant has thoughts"):
        OpenAIInstructionHandler().messages({"messages": [{**USER, name: "hm"}]})


@pytest.mark.parametrize("arguments", ["", " ", None])
def test_no_arguments_are_an_empty_object(arguments: str | None) -> None:
    for call in ({"name": "f", "arguments": arguments}, {"function": {"name": "f", "arguments": arguments}}):
        assert answer_of(tool_calls=[call]).tool_calls == (ToolCall("f", "{}", isinstance(arguments, str)),)
    assert answer_of(function_call={"name": "f"}).tool_calls == (ToolCall("f", "{}"),)
    assert answer_of(tool_calls='[{"name": "f", "arguments": "{\\"a\\":1}"}]').tool_calls == (
        ToolCall("f", '{"a":1}', True),
    )


def test_bare_functions_are_wrapped_as_servers_send_them() -> None:
    add = {"name": "add", "parameters": {"type": "object"}}
    wrapped = json.dumps({"type": "function", "function": add})
    handler = OpenAIInstructionHandler()
    for tool in (add, {"type": "function", **add}, {"function": add}, {"type": "function", "function": add}):
        assert handler.tools({"tools": [tool]}) == handler.tools({"tools": json.dumps([tool])}) == (wrapped,)
    assert handler.tools({"tools": [{"type": "web_search"}]}) == ('{"type": "web_search"}',)
    assert handler.tools({"tools": ""}) == ()


def test_what_peoples_messages_have() -> None:
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}},
        {"role": "function", "name": "f", "content": {"é": [1, None]}},
        {"role": "assistant", "content": "A"},
    ]
    expected = [
        Message("system", "S"),
        Message("user", "abc"),
        Message("assistant", "", None, (ToolCall("f", "{}", True),)),
        Message("tool", '{"é": [1, null]}'),
        Message("assistant", "A"),
    ]
    handler = OpenAIInstructionHandler()
    assert handler.messages({"messages": messages}) == expected
    assert handler.messages({"messages": json.dumps(messages)}) == expected
    assert list(handler.unread({"messages": messages, "id": 0, "note": ""})) == ["id", "messages[].name"]
    results: list[tuple[Any, str]] = [([1, 2], "[1, 2]"), (3, "3"), ([{"type": "text", "text": "x"}], "x")]
    for content, text in results:
        assert handler.messages({"messages": [{"role": "tool", "content": content}]}) == [Message("tool", text)]


def test_the_names_that_sharegpt_also_has() -> None:
    turns = [
        *({"from": "developer", "value": "S"}, {"from": "user", "value": "U"}),
        *({"from": "function_call", "value": '{"name": "f"}', "loss": 0}, {"from": "tool", "value": {"a": 1}}),
        {"from": "assistant", "value": "A", "emotion": "glad"},
    ]
    handler = SharegptStyleInstructionHandler()
    assert handler.messages({"conversations": json.dumps(turns)}) == [
        *(Message("system", "S"), Message("user", "U")),
        Message("assistant", "", None, (ToolCall("f", "{}"),), trained=False),
        *(Message("tool", '{"a": 1}'), Message("assistant", "A")),
    ]
    assert list(handler.unread({"conversations": turns, "tools": [TOOL]})) == ["tools", "conversations[].emotion"]
    assert [handler.reader_of(column, ()) for column in ("tools", "system", "id")] == ["tools", "system", None]


def test_prompt_and_completion() -> None:
    handler = PromptCompletionHandler()
    assert handler.messages({"prompt": "U", "completion": "A"}) == [Message("user", "U"), Message("assistant", "A")]
    earlier = {"role": "assistant", "content": "B"}
    record = {"prompt": [USER, earlier, USER], "completion": [{"role": "assistant", "content": "A"}], "tools": [TOOL]}
    assert [m.trained for m in handler.messages(record) if m.role == "assistant"] == [False, None]
    assert handler.tools(record)
    name, map_keys = detect_handler({"prompt": "U", "completion": "A"}, ("text",), None)
    assert (name, map_keys) == ("PromptCompletionHandler", None)


def test_what_a_record_gives_to_its_template() -> None:
    for handler in (OpenAIInstructionHandler(), AlpacaStyleInstructionHandler(), SharegptStyleInstructionHandler()):
        for value in ({"enable_thinking": False}, '{"enable_thinking": false}'):
            assert handler.template_variables({"chat_template_kwargs": value}) == {"enable_thinking": False}
        assert handler.template_variables({"chat_template_kwargs": None}) == handler.template_variables({}) == {}
        with pytest.raises(UserError, match="'chat_template_kwargs': expected an object"):
            handler.template_variables({"chat_template_kwargs": [1]})


def test_sharegpt() -> None:
    turns = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "1+2?"},
        {"from": "function_call", "value": "<think>\nhm\n</think>\n\n" + json.dumps([CALL])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3"},
    ]
    record = {"conversations": turns, "tools": json.dumps([TOOL]), "prompt": "from the field"}
    messages = [
        Message("system", "S"),
        Message("user", "1+2?"),
        Message("assistant", "", "hm", (ToolCall("add", '{"a": 1, "b": "é"}'),)),
        Message("tool", "3"),
        Message("assistant", "3"),
    ]
    handler = SharegptStyleInstructionHandler({"tools": "tools", "system": "prompt"})
    assert handler.messages(record) == messages
    assert handler.messages({**record, "conversations": turns[1:]})[0] == Message("system", "from the field")
    assert handler.tools(record) == (json.dumps(TOOL),)
    assert SharegptStyleInstructionHandler().tools(record) == ()  # as upstream: only when mapped
    with pytest.raises(UserError, match="'conversations', turn 1: not valid JSON"):
        handler.messages({**record, "conversations": [{"from": "function_call", "value": "add"}]})


def test_sharegpt_tags() -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    handler = SharegptStyleInstructionHandler({"messages": "chat", "tags": tags})
    chat = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    assert handler.messages({"chat": chat}) == [Message("user", "U"), Message("assistant", "A")]
    with pytest.raises(UserError, match=r"turn 1: role is 'human', expected one of"):
        handler.messages({"chat": [{"role": "human", "content": "U"}]})
    with pytest.raises(UserError, match=r"no tag 'usr_tag'.*did you mean 'user_tag'"):
        SharegptStyleInstructionHandler({"tags": {"usr_tag": "x"}})
    for bad, reason in (
        ("x", "expected an object with from and value"),
        ({"from": "gpt", "value": 1}, "value: expected"),
    ):
        with pytest.raises(UserError, match=reason):
            SharegptStyleInstructionHandler().messages({"conversations": [bad]})


def test_pretrain_wrappers() -> None:
    (text,) = AlpacaPretrainHandler().texts({"instruction": "I", "input": "x", "output": "O"})
    assert text.endswith("request.\n\n### Instruction:\nI\n\n### Input:\nx\n\n### Response: ASSISTANT: O")
    (bare,) = AlpacaPretrainHandler().texts({"instruction": "I", "output": "O"})
    assert bare.endswith("### Instruction:\nI\n\n### Response: ASSISTANT: O")
    turns = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert SharegptPretrainHandler().texts(turns) == ["ab"]
    with pytest.raises(UserError, match="expected a list of turns, found str"):
        SharegptPretrainHandler().texts({"conversations": "x"})


def test_detection() -> None:
    def detect(record: dict[str, Any], map_keys: dict[str, Any] | None = None) -> str:
        name, used = detect_handler(record, ("text",), map_keys)
        assert used == map_keys
        return name

    assert detect(ALPACA) == "AlpacaStyleInstructionHandler"
    assert detect({"messages": []}) == "OpenAIInstructionHandler"
    sharegpt = {"conversations": [{"from": "human", "value": "x"}]}
    assert detect(sharegpt) == "SharegptStyleInstructionHandler"
    assert detect({"c": sharegpt["conversations"]}, {"messages": "c"}).startswith("Sharegpt")
    assert detect({"c": [{"role": "user"}]}, {"messages": "c"}).startswith("OpenAI")
    assert detect({"text": "x"}) == "GeneralPretrainHandler"
    assert detect({"q": 1, "a": 2}, {"prompt": "q", "response": "a"}).startswith("Alpaca")
    assert detect({"conversations": json.dumps(sharegpt["conversations"])}) == "SharegptStyleInstructionHandler"
    openai = {"conversations": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}
    name, map_keys = detect_handler(openai, ("text",), {"system": "s"})
    assert (name, map_keys) == ("OpenAIInstructionHandler", {"system": "s", "messages": "conversations"})
    with pytest.raises(UserError, match=r"fields \['body'\] fit no handler.*chosen and rejected"):
        detect_handler({"body": "x"}, ("text",), None)


BAD_ALPACA: list[tuple[dict[str, Any], str]] = [
    ({"instruction": "I"}, r"field 'output' \(--map-keys 'response'\) is missing; the record has \['instruction'\]"),
    ({"instruction": "I", "ouput": "O"}, "did you mean 'ouput'"),
    ({**ALPACA, "output": 4}, "field 'output': expected a string, found int 4"),
    ({**ALPACA, "output": None}, "field 'output': expected a string, found null"),
    ({**ALPACA, "input": ["a"]}, r"field 'input': expected a string, found list \['a'\]"),
]


@pytest.mark.parametrize(("record", "message"), BAD_ALPACA)
def test_alpaca_schema_errors(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AlpacaStyleInstructionHandler().messages(record)


BAD_MESSAGES: list[tuple[Any, str]] = [
    ("hi", "field 'messages': expected a list of messages, found str 'hi'"),
    ([], r"expected a list of messages, found list \[\]"),
    (["hi"], "'messages', message 1: expected an object with role and content"),
    ([{"role": "bot", "content": "x"}], "'messages', message 1: role is 'bot', expected 'system', 'user', 'a"),
    (
        [{"role": "user", "content": [1]}],
        "'messages', message 1: content: expected a string, or a list of texts, found list",
    ),
    ([{"role": "assistant", "content": "", "tool_calls": [1]}], "expected a call with name and arguments, found int 1"),
    ([{"role": "assistant", "content": "", "tool_calls": 1}], "tool_calls: expected a list, found int 1"),
    ([{"role": "assistant", "content": "", "reasoning_content": 1}], "reasoning_content: expected a string, found int"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES)
def test_message_schema_errors(messages: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        OpenAIInstructionHandler().messages({"messages": messages})


def test_mapped_columns_must_exist_and_names_be_known() -> None:
    with pytest.raises(UserError, match="field 'answer'"):
        AlpacaStyleInstructionHandler({"response": "answer"}).messages(ALPACA)
    with pytest.raises(UserError, match=r"no field 'promt'.*did you mean 'prompt'"):
        AlpacaStyleInstructionHandler({"promt": "q"})
    with pytest.raises(UserError, match=r"field 'h', turn 1: expected \[user, assistant\] strings"):
        AlpacaStyleInstructionHandler({"history": "h"}).messages({**ALPACA, "h": [["a"]]})
    with pytest.raises(UserError, match=r"tags.: user_tag: expected a string, found list \['u'\]"):
        SharegptStyleInstructionHandler({"tags": {"user_tag": ["u"]}})
    with pytest.raises(UserError, match="did you mean 'GeneralPretrainHandler'"):
        make_handler("GenralPretrainHandler")
    with pytest.raises(UserError, match="--map-keys cannot rename the fields of GeneralPretrainHandler"):
        make_handler("GeneralPretrainHandler", map_keys={"prompt": "x"})
    assert make_handler("GeneralPretrainHandler", ["a", "b"]) == GeneralPretrainHandler(("a", "b"))
