"""Rows of preferences in the forms of upstream, TRL and LLaMA-Factory: told apart, read, and refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tandem.data.handlers.preferences import AlpacaStylePairwiseHandler, Answers, AnswersHandler, PreferenceHandler
from tandem.data.handlers.registry import detect_handler, make_handler
from tandem.data.templates.messages import Message, ToolCall
from tandem.errors import UserError

SYSTEM, USER = Message("system", "S"), Message("user", "Q")
GOOD, BAD = Message("assistant", "good"), Message("assistant", "bad")
Q = {"role": "user", "content": "Q"}
A, B = ({"role": "assistant", "content": text} for text in ("good", "bad"))
HUMAN = {"from": "human", "value": "Q"}
GPT, WORSE = ({"from": "gpt", "value": text} for text in ("good", "bad"))


def read(record: dict[str, Any], map_keys: dict[str, Any] | None = None) -> tuple[str, Answers]:
    """The name of the handler that a record is recognised as, and what it reads."""
    name, used = detect_handler(record, ("text",), map_keys)
    handler = make_handler(name, map_keys=used)
    assert isinstance(handler, AnswersHandler)
    return name, handler.answers(record)


PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("AlpacaStylePairwiseHandler", {"instruction": "Q", "input": "", "chosen": "good", "rejected": "bad"}),
    (
        "AlpacaStylePairwiseHandler",  # upstream takes the first of one and the second of the other
        {"instruction": "Q", "chosen": ["good", "bad"], "rejected": ["good", "bad"]},
    ),
    ("SharegptStylePairwiseHandler", {"conversations": [HUMAN], "chosen": GPT, "rejected": WORSE}),
    ("SharegptStylePairwiseHandler", {"conversations": json.dumps([HUMAN]), "chosen": [GPT], "rejected": [WORSE]}),
    ("OpenAIPairwiseHandler", {"messages": [Q], "chosen": A, "rejected": B}),
    ("OpenAIPairwiseHandler", {"conversations": [Q], "chosen": [A], "rejected": "bad"}),
    ("PreferenceHandler", {"prompt": [Q], "chosen": [A], "rejected": [B]}),
    ("PreferenceHandler", {"prompt": [Q], "chosen": "good", "rejected": "bad"}),
    ("PreferenceHandler", {"prompt": "Q", "chosen": [A], "rejected": [B]}),
    ("PreferenceHandler", {"chosen": [Q, A], "rejected": [Q, B]}),  # the prompt is implicit
    ("PreferenceHandler", {"prompt": "Q", "chosen": [Q, A], "rejected": [Q, B]}),  # as ultrafeedback_binarized
    ("PreferenceHandler", {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}),
    # as the file of ultrafeedback_binarized has it: the chosen conversation once more
    ("PreferenceHandler", {"prompt": "Q", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}),
    ("PreferenceHandler", {"conversations": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}),
]


@pytest.mark.parametrize(("name", "record"), PAIRS)
def test_pairs(name: str, record: dict[str, Any]) -> None:
    assert read(record) == (name, Answers([USER], ([GOOD], [BAD])))


UNPAIRED: list[tuple[str, dict[str, Any]]] = [
    ("UnpairedPreferenceHandler", {"prompt": [Q], "completion": [A], "label": True}),
    ("AlpacaStyleUnpairedHandler", {"instruction": "Q", "input": "", "output": "good", "kto_tag": True}),
    ("AlpacaStyleUnpairedHandler", {"instruction": "Q", "output": "good", "label": True}),
    ("SharegptStyleUnpairedHandler", {"conversations": [HUMAN, GPT], "kto_tag": True}),
    ("OpenAIUnpairedHandler", {"messages": [Q, A], "label": True}),  # as LLaMA-Factory's kto_en_demo
]


@pytest.mark.parametrize(("name", "record"), UNPAIRED)
def test_unpaired(name: str, record: dict[str, Any]) -> None:
    assert read(record) == (name, Answers([USER], ([GOOD],), True))
    handler = make_handler(name)
    assert isinstance(handler, AnswersHandler)
    (label,) = {"label", "kto_tag"} & set(record)
    for value in (False, 0, 0.0, "False", "0"):  # numbers and texts, as tables have them
        assert handler.answers({**record, label: value}).desirable is False
    for value in (None, 2, "good", [True]):
        with pytest.raises(UserError, match=rf"field '{label}': expected true \(the answer is desirable\) or false"):
            handler.answers({**record, label: value})
    with pytest.raises(UserError, match=r"field 'label' \(--map-keys 'label'\) is missing"):
        handler.answers({key: value for key, value in record.items() if key != label})
    assert list(handler.unread(record)) == []


def test_a_label_that_is_not_true_or_false_is_another_column() -> None:
    record = {"instruction": "Q", "output": "A", "label": "sports", "good": "yes"}
    assert detect_handler(record, ("text",), None)[0] == "AlpacaStyleInstructionHandler"
    with pytest.raises(UserError, match="field 'good': expected true"):
        read(record, {"label": "good"})


def test_texts_say_that_they_are_texts() -> None:
    explicit = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert read(explicit)[1].form == read({**explicit, "completion": "x"})[1].form == "texts"
    unpaired = {"prompt": "The sky is", "completion": " blue.", "label": False}
    assert read(unpaired) == (
        "UnpairedPreferenceHandler",
        Answers([Message("user", "The sky is")], ([Message("assistant", " blue.")],), False, "texts"),
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),  # TRL's example
        ("\n\nHuman: Hi\n\nAssistant: It is.", "\n\nHuman: Hi\n\nAssistant: I am.", "\n\nHuman: Hi\n\nAssistant:"),
        ("Q\nThat", "Q\nThose", "Q\n"),  # a word is not cut
    ],
)
def test_the_prompt_of_two_texts_ends_where_a_token_ends(chosen: str, rejected: str, prompt: str) -> None:
    name, found = read({"chosen": chosen, "rejected": rejected})
    answers = tuple([Message("assistant", text.removeprefix(prompt))] for text in (chosen, rejected))
    assert (name, found) == ("PreferenceHandler", Answers([Message("user", prompt)], answers, None, "split texts"))


def test_conversations_that_part_earlier_keep_what_follows() -> None:
    more = {"role": "user", "content": "more"}
    _, found = read({"chosen": [Q, A, more, A], "rejected": [Q, B]})
    assert found == Answers([USER], ([GOOD, Message("user", "more"), GOOD], [BAD]))
    _, equal = read({"chosen": [Q, A], "rejected": [Q, A]})
    assert equal == Answers([USER], ([GOOD], [GOOD]))


def test_system_history_and_tools() -> None:
    tool = {"name": "add"}
    alpaca = {"q": "Q", "s": "S", "past": [["1", "2"]], "t": [tool], "c": "good", "r": "bad"}
    names = {"prompt": "q", "query": "", "system": "s", "history": "past", "tools": "t", "chosen": "c", "rejected": "r"}
    name, found = read(alpaca, names)
    earlier = [Message("user", "1"), Message("assistant", "2")]
    assert (name, found) == ("AlpacaStylePairwiseHandler", Answers([SYSTEM, *earlier, USER], ([GOOD], [BAD])))
    wrapped = (json.dumps({"type": "function", "function": tool}),)
    assert make_handler(name, map_keys=names).tools(alpaca) == wrapped  # type: ignore[union-attr]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    result = {"role": "tool", "content": "3"}
    trl = {"prompt": [Q], "chosen": [call, result, A], "rejected": [B], "tools": [tool], "s": "S", "note": 1}
    name, found = read(trl, {"system": "s"})
    called = Message("assistant", "", None, (ToolCall("add", "{}"),))
    assert found == Answers([SYSTEM, USER], ([called, Message("tool", "3"), GOOD], [BAD]))
    handler = make_handler(name, map_keys={"system": "s"})
    assert handler.tools(trl) == wrapped  # type: ignore[union-attr]
    assert list(handler.unread({**trl, "prompt": [{**Q, "name": "x"}]})) == ["note", "prompt[].name"]
    sharegpt = {"conversations": [HUMAN], "chosen": GPT, "rejected": WORSE, "s": "S", "t": [tool]}
    name, found = read(sharegpt, {"system": "s", "tools": "t"})
    assert found.prompt == [SYSTEM, USER]


def test_tags_of_sharegpt_may_have_other_names() -> None:
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "you"}
    turns = [{"who": "me", "says": "Q"}, *({"who": "you", "says": text} for text in ("good", "bad"))]
    record = {"c": turns[:1], "chosen": turns[1], "rejected": turns[2]}
    name, found = read(record, {"messages": "c", "tags": tags})
    assert (name, found) == ("SharegptStylePairwiseHandler", Answers([USER], ([GOOD], [BAD])))


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": [Q], "chosen": [A], "rejected": [B], **changes}


WRONG: list[tuple[dict[str, Any], str]] = [
    (pair(chosen=None), "field 'chosen': expected a list of messages, or a text, found null"),
    (pair(chosen=[]), r"field 'chosen': expected a list of messages, or a text, found list \[\]"),
    (pair(chosen=["a"]), "field 'chosen', message 1: expected an object with role and content"),
    (pair(chosen=[B, Q]), "field 'chosen': the answer ends with a message of 'user', expected one of the assistant"),
    (pair(prompt=[Q, A]), "field 'chosen': the prompt ends with 'assistant', expected a message of the user"),
    (pair(prompt=[{"role": "system", "content": "S"}]), "the prompt ends with 'system'"),
    (pair(rejected=[Q]), "field 'rejected': the answer begins with a message of 'user', expected one of the assistant"),
    (pair(prompt=[], chosen=[A]), "fields 'chosen' and 'rejected': begin with different messages"),
    (pair(prompt="other", chosen=[Q, A], rejected=[Q, B]), "field 'prompt': is not what 'chosen' and 'rejected' begin"),
    (pair(prompt=[Q, Q], chosen=[Q, A], rejected=[Q, B]), "field 'prompt': is not what"),
    (
        {"chosen": [Q, A, Q, A], "rejected": [Q, A, {"role": "user", "content": "other"}, A]},
        "the prompt ends with 'assistant'",
    ),
    ({"chosen": "yes", "rejected": "no"}, "are texts that begin differently, and there is no prompt"),
    ({"prompt": [Q], "completion": [Q, A], "label": True}, "the answer begins with a message of 'user'"),
    ({"conversations": [HUMAN], "chosen": HUMAN, "rejected": GPT}, "'chosen': expected a turn of the assistant"),
    ({"conversations": [HUMAN], "chosen": "good", "rejected": GPT}, "'chosen': expected an object with from and value"),
    ({"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": GPT}, "the prompt ends with 'assistant'"),
    ({"messages": [Q], "label": True}, "the prompt ends with 'nothing'"),
    ({"instruction": "Q", "chosen": "good", "rejected": ["bad"]}, r"a string at 1, found list \['bad'\]"),
    ({"instruction": "Q", "chosen": None, "rejected": "bad"}, "field 'chosen': expected a string"),
]


@pytest.mark.parametrize(("record", "reason"), WRONG)
def test_wrong_rows(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read(record)


def test_a_column_that_is_missing() -> None:
    for handler in (AlpacaStylePairwiseHandler(), PreferenceHandler()):
        for name in ("chosen", "rejected"):
            record = {"instruction": "I", "prompt": "P", "chosen": "good", "rejected": "bad"}
            del record[name]
            with pytest.raises(UserError, match=rf"field '{name}' \(--map-keys '{name}'\) is missing"):
                handler.answers(record)
