"""The prompt type `chat_template`: the same text as the model's own Jinja template writes, byte for byte."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from tandem.data.templates.messages import (
    CHAT_TEMPLATE,
    Message,
    ToolCall,
    Turn,
    grouped,
    only_last_trained,
    untrained,
)
from tandem.data.tokens.chat_template import GENERATION_MARKS, MARK_GENERATION
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError

_BEGIN_OF_THOUGHT, _END_OF_THOUGHT = "<think>", "</think>"
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")
_TAKEN = frozenset({"messages", "tools", "add_generation_prompt", MARK_GENERATION})  # variables that come from the data
_CALL_TEXT = '{"tandem": "x"}'
CHOOSE_ONE = "give one of them that name, or choose a named --prompt-type"
MOST_VARIANTS = 64  # templates with other variables that are kept; data have a few, a server may get any number
_MARK = re.compile("\ue000(\\d{1,9})\ue001")  # characters of private use, which no template writes


class ModelTemplate:
    """A prompt type that renders with the tokenizer's chat template.

    To know which characters are trained, it renders the conversation twice. The second time there is a mark in place of
    each text of a message. The text between the marks is the template's. There each answer begins after the generation
    prompt and ends with the end token. If the template has `{% generation %}` tags, these say where answers are. Then
    the marks are replaced, in order, by the texts of the first rendering. Both renderings must agree exactly.

    An answer is trained from its thought on, or from its content where it has no thought. An empty thought that the
    template inserts is not trained.

    Attributes:
        stop_word: the end token that the template writes after an answer, of those that the model's files name.
    """

    name = CHAT_TEMPLATE

    def __init__(
        self,
        tokenizer: Tokenizer,
        enable_thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.chat_template is None and tokenizer.named_templates:
            raise UserError(f"{tokenizer.lack_of_template}; {CHOOSE_ONE}")
        if tokenizer.chat_template is None or tokenizer.eos_id is None:
            raise UserError(
                f"{tokenizer.folder}: --prompt-type {self.name} needs the model's chat template (chat_template.jinja "
                f"or in tokenizer_config.json) and its end token (eos_token in tokenizer_config.json, or eos_token_id "
                f"in config.json or generation_config.json); choose a named --prompt-type"
            )
        self.enable_thinking = enable_thinking
        self.sha256 = hashlib.sha256((tokenizer.chat_template + (tokenizer.tool_template or "")).encode()).hexdigest()
        self.stop_word = _stop_word(tokenizer)
        self._has_tags = _GENERATION_TAG.search(tokenizer.chat_template) is not None
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        if enable_thinking is not None:
            self._variables["enable_thinking"] = enable_thinking
        self._with_variables: dict[str, ModelTemplate] = {}

    def with_variables(self, variables: Mapping[str, Any]) -> ModelTemplate:
        """See `Template`. All variables reach the model's template, in place of those that it already gets."""
        if taken := sorted(_TAKEN.intersection(variables)):
            raise UserError(f"the record gives the template {taken}, which come from the data; leave them out")
        key = json.dumps(variables, sort_keys=True, default=str)
        if key not in self._with_variables:
            if len(self._with_variables) >= MOST_VARIANTS:
                self._with_variables.clear()
            mode = variables.get("enable_thinking", self.enable_thinking)
            self._with_variables[key] = ModelTemplate(self._tokenizer, mode, {**self._variables, **variables})
        return self._with_variables[key]

    def turns(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]:
        """As `PromptTemplate.turns`. Text after the last end token is a turn without a target.

        Arguments of calls reach the template as the data have them, an object or a text, if it can write them so.

        Raises:
            UserError: the roles do not alternate, or the template changes a text so much that it is not recognised.
        """
        grouped(messages[1:] if messages and messages[0].role == "system" else messages, "assistant")
        inline = {number for number, message in enumerate(messages) if _holds_thought(message)}
        failure: UserError | None = None
        # A template may split a thought from the content, or leave it in, or remove it from earlier answers only.
        for split in dict.fromkeys(map(frozenset, (inline, (), inline - {len(messages) - 1}))):
            try:
                entries = [
                    _MarkedMessage(message, number in split, self._arguments) for number, message in enumerate(messages)
                ]
                return self._aligned_turns(entries, tools)
            except UserError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    @cached_property
    def answer_header(self) -> str:
        """What follows the text of a user; "" where the template does not show it."""
        question = [{"role": "user", "content": "\ue0000\ue001"}]
        try:
            text = self._tokenizer.apply_chat_template(question, add_generation_prompt=True, **self._variables)
        except UserError:  # the template needs more than a question; prompts that are cut then lose their end
            return ""
        return text.partition("\ue0000\ue001")[2].partition(_BEGIN_OF_THOUGHT)[0]

    def _aligned_turns(self, entries: Sequence[_MarkedMessage], tools: Sequence[str]) -> list[Turn]:
        full = self._render([entry.unmarked() for entry in entries], tools)
        marks = [entry.marked(2 * number) for number, entry in enumerate(entries)]
        marked, tagged = _generated(self._render(marks, tools, variables={MARK_GENERATION: True}))
        pieces = _aligned(marked, full, [text for entry in entries for text in (entry.reasoning, entry.content)])
        turns = []
        done = 0
        for (begin, end), message in self._answers(marked, tagged, entries):
            turn = Turn((_replaced(marked[done:begin], pieces),), (_replaced(marked[begin:end], pieces),))
            turns.append(untrained(turn) if message.trained is False else turn)
            done = end
        rest = _replaced(marked[done:], pieces)
        return [*turns, Turn((rest,), ())] if rest else turns

    def last_answer(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]:
        """The same text with only the last answer trained."""
        return self.turns(only_last_trained(messages), tools)

    def generation_prompt(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> tuple[str, ...]:
        """The text before the answer to a user's last message."""
        rendered = [_MarkedMessage(message, False, self._arguments).unmarked() for message in messages]
        return (self._render(rendered, tools, add_generation_prompt=True),)

    def _answers(
        self, marked: str, tagged: Sequence[tuple[int, int]], entries: Sequence[_MarkedMessage]
    ) -> list[tuple[tuple[int, int], Message]]:
        """Begin and end of each answer in the marked rendering, with the message that it is of."""
        if self._has_tags:
            return [(place, _author(marked[: place[1]], entries)) for place in tagged]
        answers: list[tuple[tuple[int, int], Message]] = []
        for number, entry in enumerate(entries):
            if entry.message.role == "assistant":
                done = answers[-1][0][1] if answers else 0
                start, end = self._answer(marked, done, thinks=bool(entry.reasoning))
                if any(int(mark) // 2 > number for mark in _MARK.findall(marked[start:end])):
                    raise UserError(
                        f"an answer ends with {self.stop_word!r} only after the next message, so its end is not clear; "
                        f"choose a named --prompt-type, or name the token that ends a message as an eos_token_id"
                    )
                answers.append(((start, end), entry.message))
        return answers

    def _answer(self, marked: str, begin: int, thinks: bool) -> tuple[int, int]:
        """Begin and end of the next answer in the marked rendering, from `begin` on."""
        role, opening, opening_without_thought = self._openings
        start = marked.find(role, begin) if role else -1
        if start >= 0:
            openings = (opening, role) if thinks else (opening_without_thought, opening, role)
            start += next(len(text) for text in openings if marked.startswith(text, start))
            end = marked.find(self.stop_word, start)
            if end >= 0:
                return start, end + len(self.stop_word)
        raise UserError(
            f"cannot find the answers in the text of the chat template. Each should begin with {role!r} and end with "
            f"{self.stop_word!r}; choose a named --prompt-type"
        )

    @cached_property
    def _openings(self) -> tuple[str, str, str]:
        """What the template writes before any answer, before a new answer, and before a new one without thinking."""
        question = [{"role": "user", "content": "x"}]
        without = self._tokenizer.apply_chat_template(question, **self._variables)
        openings = [
            self._tokenizer.apply_chat_template(
                question, add_generation_prompt=True, **{**self._variables, "enable_thinking": mode}
            )
            for mode in (True, False)
        ]
        opening, opening_without_thought = (text.removeprefix(without) for text in openings)
        return opening.partition(_BEGIN_OF_THOUGHT)[0], opening, opening_without_thought

    def _arguments(self, call: ToolCall) -> Any:
        """A call's arguments in the form that the data have, an object or a text, unless the template spoils it."""
        keeps_texts, keeps_objects = self._forms_of_arguments
        as_text = call.given_as_text if keeps_texts == keeps_objects else keeps_texts
        return call.arguments if as_text else json.loads(call.arguments)

    @cached_property
    def _forms_of_arguments(self) -> tuple[bool, bool]:
        """Whether the template writes arguments given as a text unchanged, and those given as an object as JSON.

        Some templates quote a text once more. Others write an object as Python does, or cannot write it at all.
        """
        text, of_object = self._with_call(_CALL_TEXT), self._with_call(json.loads(_CALL_TEXT))
        return text is not None and _CALL_TEXT in text, of_object is not None and "{'" not in of_object

    def _with_call(self, arguments: Any) -> str | None:
        """What the template writes for a call with these arguments; None where it cannot."""
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        try:
            return self._render(messages, ())
        except UserError:
            return None

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[str],
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        return self._tokenizer.apply_chat_template(
            messages,
            add_generation_prompt,
            tools=[json.loads(tool) for tool in tools] or None,
            **{**self._variables, **(variables or {})},
        )


def _stop_word(tokenizer: Tokenizer) -> str:
    """The first end token that the template writes after an answer; the tokenizer's where none is seen."""
    words = [tokenizer.decode([token]) for token in tokenizer.end_ids]
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "\ue0000\ue001"}, {"role": "assistant", "content": "\ue0001\ue001"}]
        )
    except UserError:  # the template needs more than a question and an answer
        return words[0]
    after = text.partition("\ue0001\ue001")[2]
    return min((word for word in words if word and word in after), key=after.index, default=words[0])


def _holds_thought(message: Message) -> bool:
    """Whether the content of an answer includes a thought, which is not in a separate field."""
    return message.role == "assistant" and message.reasoning is None and _END_OF_THOUGHT in message.content


class _MarkedMessage:
    """A message whose texts can be replaced by marks. On request the thought is split from the content."""

    def __init__(self, message: Message, splits_thought: bool, arguments: Callable[[ToolCall], Any]) -> None:
        self.message = message
        self._arguments = arguments
        reasoning = message.reasoning or ""
        # Templates strip line ends from a thought. A thought of line ends only is no thought.
        self.reasoning, self.content = reasoning if reasoning.strip("\n") else "", message.content
        if splits_thought:
            # Qwen3's rule. With a template of another rule, the two renderings do not agree.
            thought = message.content.partition(_END_OF_THOUGHT)[0].rpartition(_BEGIN_OF_THOUGHT)[2]
            content = message.content.rpartition(_END_OF_THOUGHT)[2]
            self.reasoning, self.content = (text if text.strip("\n") else "" for text in (thought, content))

    def unmarked(self) -> dict[str, Any]:
        """The message in the form of transformers."""
        return self._with(self.message.reasoning, self.message.content)

    def marked(self, number: int) -> dict[str, Any]:
        """The same with the marks `number` for the thought and `number + 1` for the content. Empty texts stay empty."""
        return self._with(
            f"\ue000{number}\ue001" if self.reasoning else self.message.reasoning,
            f"\ue000{number + 1}\ue001" if self.content else "",
        )

    def _with(self, reasoning: str | None, content: str) -> dict[str, Any]:
        fields: dict[str, Any] = {"role": self.message.role, "content": content}
        if reasoning is not None:
            fields["reasoning_content"] = reasoning
        if self.message.tool_calls:
            fields["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": self._arguments(call)}}
                for call in self.message.tool_calls
            ]
        return fields


def _author(marked: str, entries: Sequence[_MarkedMessage]) -> Message:
    """The assistant's message at the end of a part of the marked rendering.

    It is the last one with a text there, or the next one, which then has no text: only calls.
    """
    numbers = [int(number) // 2 for number in _MARK.findall(marked)]
    last = next((number for number in reversed(numbers) if number < len(entries)), 0)
    messages = [entry.message for entry in entries]
    following = (message for message in messages[last:] if message.role == "assistant")
    return next(following, messages[-1])


def _aligned(marked: str, full: str, texts: Sequence[str]) -> dict[str, str]:
    """By mark, the text in `full` at its place. Templates may strip white space from a text."""
    parts = _MARK.split(marked)  # text, number, text, number, ..., text
    text_of: dict[str, str] = {}
    place = len(parts[0])
    matches = full.startswith(parts[0])
    for number, following in zip(parts[1::2], parts[2::2]):
        text = texts[int(number)] if int(number) < len(texts) else ""  # a mark in a text of the conversation
        forms = (text, text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"), text.strip())
        form = next((form for form in forms if full.startswith(form + following, place)), None)
        if form is None or text_of.setdefault(number, form) != form:
            matches = False
            break
        place += len(form) + len(following)
    if not matches or place != len(full):
        raise UserError(
            "cannot find the messages in the text of the chat template, so it is not clear what to train; choose a "
            "named --prompt-type"
        )
    return text_of


def _generated(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of generation, and the begin and end of each part that was between two marks."""
    parts = re.split("|".join(GENERATION_MARKS), marked)  # outside, inside, outside, ..
    ends = list(accumulate(map(len, parts)))
    return "".join(parts), list(zip(ends[0::2], ends[1::2]))


def _replaced(marked: str, texts: dict[str, str]) -> str:
    return _MARK.sub(lambda match: texts[match.group(1)], marked)
