"""What is read from an answer while it is written: the same whatever the sizes of the pieces."""

from __future__ import annotations

import json
import random

import pytest

from tandem.data.templates.messages import ToolCall
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.inference.answers import Answer, Parts, Piece, joined
from tandem.inference.text import StopStrings, TokenText
from tandem.inference.tool_calls import parse_call
from workspace import Workspace

TOOLS = (json.dumps({"function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}),)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "ü"}}\n</tool_call>'


def call(arguments: str, name: str = "f") -> Piece:
    return Piece("call", call=ToolCall(name, arguments, given_as_text=True))


def text(words: str) -> Piece:
    return Piece("text", words)


def thought(words: str) -> Piece:
    return Piece("thought", words)


@pytest.mark.parametrize(
    ("written", "pieces", "options"),
    [
        ("plain\n", [text("plain\n")], {}),
        (" \n plain", [text(" \n plain")], {}),
        ("a <think>b</think>", [text("a <think>b</think>")], {}),
        ("<think>\nhm\n\nso\n</think>\n\n4\n", [thought("hm\n\nso"), text("4\n")], {}),
        ("\n<think>\n\n</think>\n\n4", [text("4")], {}),
        ("<think>\nnever end", [thought("never end")], {}),
        ("<thin", [text("<thin")], {}),
        ("hm\n</think>\n\n4", [thought("hm"), text("4")], {"in_thought": True}),
        ("hm</think", [thought("hm</think")], {"in_thought": True}),
        (f"I look.\n{CALL}", [text(f"I look.\n{CALL}")], {}),
        (f"I look.\n\n{CALL}\n{CALL}\n", [text("I look."), *[call('{"a": "ü"}')] * 2], {"tools": TOOLS}),
        (f"<think>\nhm\n</think>\n\n{CALL}", [thought("hm"), call('{"a": "ü"}')], {"tools": TOOLS}),
        ("x\n<tool_call>{no}</tool_call>\ny", [text("x\n<tool_call>{no}</tool_call>\ny")], {"tools": TOOLS}),
        ("x\n<tool_call>\n{", [text("x\n<tool_call>\n{")], {"tools": TOOLS}),
        ("x\n\n", [text("x\n\n")], {"tools": TOOLS}),
    ],
)
def test_thoughts_and_calls_are_separated_however_they_come(written: str, pieces: list[Piece], options: dict) -> None:
    for size in (1, 2, 3, 5, 1000):
        parts, found = Parts(**options), list[Piece]()
        for begin in range(0, len(written), size):
            found += parts.feed(written[begin : begin + size])
        assert joined([*found, *parts.end()]) == pieces


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', '{"a": 1}'),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f"}', "{}"),
        (
            "<function=f>\n<parameter=a>\n3\n</parameter>\n<parameter=b>3</parameter>\n</function>",
            '{"a": "3", "b": 3}',
        ),
        ("<function=f>\n<parameter=a>\nx\ny\n</parameter>\n</function>", '{"a": "x\\ny"}'),
        ('{"name": 3, "arguments": {}}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": "f", ' + '"a": [' * 9999, None),
        ("f(1)", None),
    ],
)
def test_both_forms_of_a_call_are_read(written: str, expected: str | None) -> None:
    found = parse_call(f"\n{written}\n", TOOLS)
    assert (found and found.arguments) == expected


def test_pieces_of_tokens_are_the_text_of_all(workspace: Workspace) -> None:
    """Random tokens, so with bytes that make no character and with special tokens."""
    tokenizer = Tokenizer(workspace.hf)
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(len(tokenizer)) for _ in range(20)] + tokenizer.encode("世界🎉")[: draw.randrange(11)]
        reader = TokenText(tokenizer)
        pieces = [reader.feed(token) for token in ids]
        assert "".join([*pieces, reader.end()]) == tokenizer.decode(ids, skip_special_tokens=True)
    whole = TokenText(tokenizer)
    assert [piece for token in tokenizer.encode("世") if (piece := whole.feed(token))] == ["世"]


def test_bytes_of_tokens_are_the_bytes_of_the_text(workspace: Workspace) -> None:
    tokenizer = Tokenizer(workspace.hf)
    words = "Sort 世界🎉 \x00\x7f\xa0<|im_end|>"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(words))) == words.encode()


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_no_part_of_a_stop_string_passes(size: int) -> None:
    written, strings = "aab END of \n\n this", ["END", "D of", "\n\n", "zz"]
    stop, passed = StopStrings(strings), ""
    for begin in range(0, len(written), size):
        passed += stop.feed(written[begin : begin + size])
        assert "aab ".startswith(passed)
    assert (passed + stop.end(), stop.found) == ("aab ", "END")
    almost = StopStrings(strings)
    assert "".join([*(almost.feed(letter) for letter in "xEN"), almost.end()]) == "xEN"


def test_an_answer_ends_at_its_stop_string(workspace: Workspace) -> None:
    tokenizer = Tokenizer(workspace.hf)
    answer = Answer(tokenizer, ["31"])
    pieces = [piece for token in tokenizer.encode("Sort 1231.") for piece in answer.feed([token])]
    assert joined([*pieces, *answer.end()]) == [text("Sort 12")]
    assert answer.stopped
