"""The built-in prompt types."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tandem.data.templates.messages import Message, Turn, grouped, untrained
from tandem.errors import UserError


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt type in one thinking mode.

    Attributes:
        system, user, assistant: the text of such a message, with `{content}` for its content.
        tool_results: the text of the results of calls, in place of a user's message; each result is a `tool_result`.
        tool_call: the text of an assistant's call, with `{name}` and `{arguments}`.
        tools: follows the system prompt when there are tools; `{tools}` has a line for each.
        stop_word: the token that ends a message; the end-of-document token of fine-tuning data.
        thought_words: what begins and what ends a thought, with the line ends around it. Data may have other line ends.
        enable_thinking: an answer without a thought gets an empty one. True trains it. None and False put it into the
            prompt, untrained. False also removes the thoughts of all answers.
    """

    name: str
    system: str
    user: str
    assistant: str
    tool_results: str
    tool_result: str
    tool_call: str
    tools: str
    stop_word: str
    thought_words: tuple[str, str]
    enable_thinking: bool | None = None

    @property
    def answer_header(self) -> str:
        """What follows the text of a user."""
        return self.user.partition("{content}")[2]

    @property
    def sha256(self) -> str:
        """Hash of the template's texts; the same in every thinking mode."""
        texts = {**dataclasses.asdict(self), "enable_thinking": None}
        return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()

    def turns(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]:
        """The turns of a conversation, with every answer trained, unless its message says that it is not.

        Args:
            messages: an optional system message, then user (or tool results) and assistant in turn.
            tools: the JSON text of each tool.

        Raises:
            UserError: the roles do not alternate.
        """
        prefix, prompts, answers = self._parts(messages, tools, "assistant")
        turns = []
        for prompt, answer in zip(prompts, answers):
            turns.append(self._turn((*prefix, prompt), answer))
            prefix = ()
        return turns

    def last_answer(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]:
        """One turn, with only the last answer trained and without earlier thoughts, as upstream's pairwise data."""
        return [self._turn(self._history(messages[:-1], tools), messages[-1])]

    def generation_prompt(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> tuple[str, ...]:
        """The pieces before the answer to a user's last message, without earlier thoughts."""
        pieces = self._history(messages, tools)
        return pieces if self.enable_thinking else (*pieces, self._empty_thought)

    @cached_property
    def _empty_thought(self) -> str:
        return "".join(self.thought_words)

    def _history(self, messages: Sequence[Message], tools: Sequence[str]) -> tuple[str, ...]:
        prefix, prompts, answers = self._parts(messages, tools, "user")
        pieces = [*prefix, prompts[0]]
        for answer, prompt in zip(answers, prompts[1:]):
            content = self._without_thought(self._canonical(answer.content)) + self._calls(answer)
            pieces += [_filled(self.assistant, content), prompt]
        return tuple(pieces)

    def with_variables(self, variables: Mapping[str, Any]) -> PromptTemplate:
        """See `Template`. The only variable is `enable_thinking`."""
        mode = variables.get("enable_thinking", self.enable_thinking)
        if variables.keys() - {"enable_thinking"} or not (mode is None or isinstance(mode, bool)):
            raise UserError(
                f"the record gives the template {dict(variables)}; prompt type {self.name} takes only enable_thinking, "
                f"true or false. Choose --prompt-type chat_template, or leave them out"
            )
        return dataclasses.replace(self, enable_thinking=mode)

    def _turn(self, source: tuple[str, ...], message: Message) -> Turn:
        turn = self._trained_turn(source, message)
        return untrained(turn) if message.trained is False else turn

    def _trained_turn(self, source: tuple[str, ...], message: Message) -> Turn:
        answer = self._answer(message)
        target = (_filled(self.assistant, answer),)
        if self._has_thought(answer):
            return Turn(source, target)
        if self.enable_thinking:
            return Turn(source, (self._empty_thought, *target))
        return Turn((*source, self._empty_thought), target)

    def _parts(
        self, messages: Sequence[Message], tools: Sequence[str], last: str
    ) -> tuple[tuple[str, ...], list[str], list[Message]]:
        """System text, the text before each answer, and the answers."""
        system, dialogue = "", messages
        if messages and messages[0].role == "system":
            system, dialogue = messages[0].content, messages[1:]
        if tools:
            offer = self.tools.format(tools="".join("\n" + tool for tool in tools))
            system = f"{system}\n\n{offer}" if system else offer
        prefix = (_filled(self.system, system),) if system else ()
        prompts: list[str] = []
        answers: list[Message] = []
        for role, group in grouped(dialogue, last):
            if role == "assistant":
                answers += group
            elif role == "user":
                prompts.append(_filled(self.user, group[0].content))
            else:
                results = "\n".join(_filled(self.tool_result, result.content) for result in group)
                prompts.append(_filled(self.tool_results, results))
        return prefix, prompts, answers

    def _answer(self, message: Message) -> str:
        begin, end = self.thought_words
        thought = (message.reasoning or "").strip("\n")
        content = self._canonical(message.content)
        if thought:
            content = f"{begin}{thought}{end}{message.content.lstrip(chr(10))}"
        content = self._without_thought(content) if self.enable_thinking is False else content
        return content + self._calls(message)

    def _canonical(self, answer: str) -> str:
        """An answer with the thought that it begins with as this template writes it.

        The thought may have other line ends around it, or no beginning, which the prompt held. An answer that has a
        thought in this template's words keeps its characters.
        """
        begin, end = self.thought_words
        begin_word, end_word = begin.strip(), end.strip()
        if end_word not in answer or (answer.startswith(begin) and end in answer):
            return answer
        thought, _, content = answer.partition(end_word)
        before, begins, inner = thought.partition(begin_word)
        if begins and before.strip():
            return answer  # a thought in the middle of an answer stays there
        thought = (inner if begins else before).strip("\n")
        return f"{begin}{thought}{end}{content.lstrip(chr(10))}"

    def _calls(self, message: Message) -> str:
        """The text of an answer's calls; a new line separates it from the content."""
        if not message.tool_calls:
            return ""
        calls = "\n".join(
            self.tool_call.format(name=call.name, arguments=call.arguments) for call in message.tool_calls
        )
        return f"\n{calls}" if self._without_thought(self._canonical(message.content)) else calls

    def _has_thought(self, answer: str) -> bool:
        begin, end = self.thought_words
        return begin in answer or end.strip() in answer

    def _without_thought(self, answer: str) -> str:
        begin, end = (re.escape(word.strip()) for word in self.thought_words)
        return re.sub(f"{begin}.*?{end}\n{{0,2}}", "", answer, flags=re.DOTALL).lstrip("\n")


def _filled(text: str, content: str) -> str:
    """`text` with `content` in place of `{content}`. `str.format` would take several times as long."""
    return text.replace("{content}", content)


NAMED_TEMPLATES = {
    template.name: template
    for template in [
        PromptTemplate(
            name="qwen3",
            system="<|im_start|>system\n{content}<|im_end|>\n",
            user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
            assistant="{content}<|im_end|>\n",
            tool_results="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
            tool_result="<tool_response>\n{content}\n</tool_response>",
            tool_call='<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>',
            tools=(
                "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
                "You are provided with function signatures within <tools></tools> XML tags:\n"
                "<tools>{tools}\n</tools>\n\n"
                "For each function call, return a json object with function name and arguments within "
                "<tool_call></tool_call> XML tags:\n<tool_call>\n"
                '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
            ),
            stop_word="<|im_end|>",
            thought_words=("<think>\n", "\n</think>\n\n"),
        ),
    ]
}
