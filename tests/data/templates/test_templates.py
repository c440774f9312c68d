"""The `qwen3` prompt type: upstream's table, and agreement with the model's own chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.templates.catalog import get_template
from tandem.data.templates.messages import Message, ToolCall, Turn, join_neighbours, only_last_trained
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError

USER = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nhm\n</think>\n\nA"


def user(content: str = "U") -> Message:
    return Message("user", content)


def assistant(content: str = "A", reasoning: str = "") -> Message:
    return Message("assistant", content, reasoning)


TABLE: list[tuple[bool | None, Message, tuple[str, ...], tuple[str, ...]]] = [
    (None, assistant(), (USER, EMPTY), ("A<|im_end|>\n",)),
    (None, assistant(THOUGHT), (USER,), (THOUGHT + "<|im_end|>\n",)),
    (None, assistant("A", "hm"), (USER,), (THOUGHT + "<|im_end|>\n",)),
    (True, assistant(), (USER,), (EMPTY, "A<|im_end|>\n")),
    (True, assistant(THOUGHT), (USER,), (THOUGHT + "<|im_end|>\n",)),
    (True, assistant(""), (USER,), (EMPTY, "<|im_end|>\n")),
    (False, assistant(), (USER, EMPTY), ("A<|im_end|>\n",)),
    (False, assistant(THOUGHT), (USER, EMPTY), ("A<|im_end|>\n",)),
    (False, assistant("A", "hm"), (USER, EMPTY), ("A<|im_end|>\n",)),
]


@pytest.mark.parametrize(("mode", "answer", "source", "target"), TABLE)
def test_thinking_modes(mode: bool | None, answer: Message, source: tuple[str, ...], target: tuple[str, ...]) -> None:
    assert get_template("qwen3", mode).turns([user(), answer]) == [Turn(source, target)]


def test_system_comes_once_and_every_answer_is_trained() -> None:
    messages = [Message("system", "S"), user("1"), assistant(THOUGHT), user("2"), assistant("B")]
    first, second = get_template("qwen3").turns(messages)
    assert first.source == ("<|im_start|>system\nS<|im_end|>\n", USER.replace("U", "1"))
    assert first.target == (THOUGHT + "<|im_end|>\n",)
    assert second == Turn((USER.replace("U", "2"), EMPTY), ("B<|im_end|>\n",))
    assert get_template("qwen3").turns([Message("system", ""), user(), assistant()])[0].source == (USER, EMPTY)


def test_braces_in_content_are_text() -> None:
    (turn,) = get_template("qwen3").turns([user("{content} {0}"), assistant("{}")])
    assert "{content} {0}" in turn.source[0]
    assert turn.target == ("{}<|im_end|>\n",)


@pytest.mark.parametrize("mode", [True, False, None])
@pytest.mark.parametrize("system", [[], [Message("system", "Be brief.")]])
@pytest.mark.parametrize("answer", ["4.", THOUGHT, "多 行\n\n- x"])
def test_one_turn_equals_the_models_template(
    mode: bool | None, system: list[Message], answer: str, shared_data: Path
) -> None:
    tokenizer = Tokenizer(shared_data / "qwen3-0.6b")
    template = get_template("qwen3", mode)
    messages: list[Message] = [*system, user("2+2?"), assistant(answer)]
    expected_answer = answer.removeprefix("<think>\nhm\n</think>\n\n") if mode is False else answer
    chat: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages[:-1]]
    full = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": expected_answer}])

    (turn,) = template.turns(messages)
    assert "".join((*turn.source, *turn.target)) == full
    ids = [i for piece in (*turn.source, *turn.target) for i in tokenizer.encode(piece)]
    assert ids == tokenizer.encode(full)
    if mode is not None:
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=mode)
        assert "".join(template.generation_prompt(messages[:-1])) == prompt


def test_generation_prompt_with_history_equals_the_models_template(shared_data: Path) -> None:
    tokenizer = Tokenizer(shared_data / "qwen3-0.6b")
    messages = [user("1"), assistant(THOUGHT), user("2"), assistant("B"), user("3")]
    chat = [{"role": m.role, "content": m.content} for m in messages]
    for mode in (True, False):
        rendered = "".join(get_template("qwen3", mode).generation_prompt(messages))
        assert rendered == tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=mode)


CALLS = (ToolCall("add", '{"a": 1}'), ToolCall("mul", '{"b": "é"}'))
TOOLS = ({"type": "function", "function": {"name": "add", "description": "Sum: {a}"}}, {"name": "mul"})


@pytest.mark.parametrize("system", [[], [Message("system", "Be brief.")]])
@pytest.mark.parametrize("content", ["", "Let me see."])
def test_tools_equal_the_models_template(system: list[Message], content: str, shared_data: Path) -> None:
    """Each answer of a conversation with calls, results and thoughts, next to the model's own rendering."""
    tokenizer = Tokenizer(shared_data / "qwen3-0.6b")
    messages = [*system, user(), Message("assistant", content, "hm", CALLS), Message("tool", "1"), Message("tool", "2")]
    messages.append(assistant("3", "so"))
    chat: list[dict[str, Any]] = []
    for m in messages:
        chat.append({"role": m.role, "content": m.content})
        if m.reasoning:
            chat[-1]["reasoning_content"] = m.reasoning
        if m.tool_calls:
            chat[-1]["tool_calls"] = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in m.tool_calls]
    tools = [json.dumps(tool, ensure_ascii=False) for tool in TOOLS]
    turns = get_template("qwen3", True).turns(messages, tools)
    assert "".join("".join((*turn.source, *turn.target)) for turn in turns) == tokenizer.apply_chat_template(
        chat, tools=list(TOOLS)
    )
    assert "<tool_call>" in turns[0].target[0]
    assert "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>" in turns[1].source[0]


def test_only_the_last_answer() -> None:
    messages = [user("1"), assistant("A"), user("2"), assistant("B")]
    turns = get_template("qwen3").turns(messages)
    last = get_template("qwen3").turns(only_last_trained(messages))
    assert [turn.target for turn in last] == [(), ("B<|im_end|>\n",)]
    assert "".join("".join((*t.source, *t.target)) for t in last) == "".join(
        "".join((*t.source, *t.target)) for t in turns
    )


def test_an_answer_that_its_data_leave_out_is_not_trained() -> None:
    messages = [user("1"), assistant("BAD")._replace(trained=False), user("2"), assistant("B")]
    template = get_template("qwen3", True)
    first, second = template.turns(messages)
    assert first == Turn((USER.replace("U", "1"), EMPTY, "BAD<|im_end|>\n"), ())
    assert second.target == (EMPTY, "B<|im_end|>\n")
    (last, unread) = template.turns(only_last_trained([*messages[:3], assistant("B")._replace(trained=False)]))
    assert last.target == unread.target == ()


# An answer as data spell it, and the thought and the rest as the template writes them.
SPELLINGS = [
    ("<think>short</think>I'm fine", "short", "I'm fine"),
    ("<think> short </think> I'm fine", " short ", " I'm fine"),
    ("<think>\n\nhm\n</think>A", "hm", "A"),
    ("\n<think>\nhm\n</think>\nA", "hm", "A"),
    ("<think>hm</think>\n\n\nA", "hm", "A"),
    ("hm\n</think>\n\nA", "hm", "A"),  # the prompt held the beginning
    ("<think></think>A", "", "A"),
    ("<think>hm</think>", "hm", ""),
]


@pytest.mark.parametrize(("answer", "thought", "content"), SPELLINGS)
def test_a_thought_in_any_spelling_becomes_the_templates_own(answer: str, thought: str, content: str) -> None:
    canonical = f"<think>\n{thought}\n</think>\n\n{content}<|im_end|>\n"
    for mode in (None, True):
        assert get_template("qwen3", mode).turns([user(), assistant(answer)]) == [Turn((USER,), (canonical,))]
    without = get_template("qwen3", False).turns([user(), assistant(answer)])
    assert without == [Turn((USER, EMPTY), (f"{content}<|im_end|>\n",))]
    call = Message("assistant", answer, None, (ToolCall("f", "{}"),))
    written = "".join(get_template("qwen3").turns([user(), call])[0].target)
    assert written.startswith(canonical.removesuffix("<|im_end|>\n") + ("\n" if content else "") + "<tool_call>")


@pytest.mark.parametrize(("answer", "thought", "content"), SPELLINGS)
def test_thoughts_are_read_as_the_models_template_reads_them(
    answer: str, thought: str, content: str, shared_data: Path
) -> None:
    model = get_template("chat_template", tokenizer=Tokenizer(shared_data / "qwen3-0.6b"))
    messages = [user(), Message("assistant", answer)]
    texts = [
        "".join(piece for turn in template.turns(messages) for piece in (*turn.source, *turn.target))
        for template in (get_template("qwen3"), model)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("reasoning", ["hm", "\nhm\n", "hm\n\n"])
def test_a_thought_in_a_field_of_its_own_has_the_templates_line_ends(reasoning: str) -> None:
    (turn,) = get_template("qwen3").turns([user(), assistant("\nA", reasoning)])
    assert turn == Turn((USER,), (THOUGHT + "<|im_end|>\n",))
    (without,) = get_template("qwen3").turns([user(), assistant("A", "\n")])
    assert without == Turn((USER, EMPTY), ("A<|im_end|>\n",))


def test_a_thought_that_is_not_at_the_beginning_stays_where_it_is() -> None:
    for answer in ("B <think>hm</think>A", "<think>\na\n</think>\n\nb <think>c</think>"):
        assert get_template("qwen3").turns([user(), assistant(answer)]) == [Turn((USER,), (f"{answer}<|im_end|>\n",))]


def test_neighbours_of_one_role_are_joined() -> None:
    call = ToolCall("f", "{}")
    messages = [
        *(Message("system", "S"), Message("system", "T")),
        *(user("1"), user(""), user("2"), assistant("A", "hm"), Message("assistant", "B", None, (call,))),
        *(Message("tool", "r"), Message("tool", "s"), assistant("C")),
    ]
    assert join_neighbours(messages) == [
        *(Message("system", "S\nT"), user("1\n2"), Message("assistant", "A\nB", "hm", (call,))),
        *messages[-3:],
    ]
    two_calls = [Message("assistant", "", None, (ToolCall(name, "{}"),)) for name in "fg"]
    assert [c.name for c in join_neighbours([user(), *two_calls])[1].tool_calls] == ["f", "g"]
    for first, second in (
        (assistant("A"), assistant("B")._replace(trained=False)),
        (assistant("A"), assistant("B", "hm")),
        (assistant("A"), assistant("<think>hm</think>B")),
        (two_calls[0], assistant("B")),
    ):
        with pytest.raises(UserError, match="two answers in a row"):
            join_neighbours([user(), first, second])


def test_variables_of_a_record() -> None:
    template = get_template("qwen3").with_variables({"enable_thinking": True})
    assert template.turns([user(), assistant()]) == [Turn((USER,), (EMPTY, "A<|im_end|>\n"))]
    for wrong in ({"enable_thinking": 1}, {"documents": []}):
        with pytest.raises(UserError, match="takes only enable_thinking"):
            get_template("qwen3").with_variables(wrong)


def test_upstream_differs_from_the_models_template_on_earlier_turns(shared_data: Path) -> None:
    """Upstream gives an earlier answer an empty thought, the model's template gives it none. Kept so."""
    tokenizer = Tokenizer(shared_data / "qwen3-0.6b")
    messages = [user("1"), assistant("A"), user("2"), assistant("B")]
    rendered = "".join("".join((*turn.source, *turn.target)) for turn in get_template("qwen3").turns(messages))
    expected = tokenizer.apply_chat_template([{"role": m.role, "content": m.content} for m in messages])
    assert rendered != expected
    assert rendered.replace(EMPTY, "", 1) == expected


def test_identity_covers_the_texts_but_not_the_mode() -> None:
    import dataclasses

    template = get_template("qwen3", True)
    assert template.sha256 == get_template("qwen3").sha256
    assert template.sha256 != dataclasses.replace(template, assistant="{content}<|im_end|>").sha256


def test_errors() -> None:
    with pytest.raises(UserError, match=r"prompt type 'qwen33'.*did you mean 'qwen3'"):
        get_template("qwen33")
    template = get_template("qwen3")
    with pytest.raises(UserError, match="turn 1 has role 'assistant', expected 'user'"):
        template.turns([assistant()])
    with pytest.raises(UserError, match="turn 2 has role 'user', expected 'assistant'"):
        template.turns([user(), user()])
    with pytest.raises(UserError, match="ends with 'user', expected it to end with 'assistant'"):
        template.turns([user()])
    with pytest.raises(UserError, match="turn 2 has role 'system'"):
        template.turns([user(), Message("system", "late")])
    with pytest.raises(UserError, match="has no turns"):
        template.generation_prompt([Message("system", "S")])
