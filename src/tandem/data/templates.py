"""Prompt types: how a conversation becomes pieces of text, and which of them are trained.

`qwen3` is MindSpeed-LLM's, character for character. It agrees with Qwen3's own chat template on a conversation of one
turn, in every thinking mode. It differs on earlier turns of a longer one: the model's template strips the thoughts of
earlier answers and writes no empty ones, while training here keeps all thoughts and, since every answer is trained,
gives each answer without a thought an empty one. `generation_prompt` strips earlier thoughts as the model's does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tandem.errors import UserError, nearest

if TYPE_CHECKING:
    from tandem.data.tokenizer import Tokenizer

# Spelling of --enable-thinking -> a template's thinking mode
THINKING_MODES = {"true": True, "false": False, "none": None}


class ToolCall(NamedTuple):
    """A call that an assistant makes.

    Attributes:
        arguments: JSON text.
        given_as_text: that text stood in the data, as OpenAI writes it, and not an object. Chat templates of models
            write a text as it stands and an object in their own way.
    """

    name: str
    arguments: str
    given_as_text: bool = False


class Message(NamedTuple):
    """One message.

    Attributes:
        role: system, user, assistant, or tool for the result of a call.
        reasoning: an assistant's thought, when the data keeps it apart from the content; None when it does not.
        tool_calls: that an assistant makes after the content.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class Turn(NamedTuple):
    """A prompt and the answer to it, as pieces of text that are tokenised one by one.

    Attributes:
        source: not trained.
        target: trained.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]


class Template(Protocol):
    """A prompt type in one thinking mode.

    Attributes:
        stop_word: the token that ends a message; the end-of-document token of fine-tuning data.
        answer_header: what follows the text of a user, up to where an answer may begin.
        sha256: identity of its texts, whatever the thinking mode.
    """

    @property
    def name(self) -> str: ...

    @property
    def enable_thinking(self) -> bool | None: ...

    @property
    def stop_word(self) -> str: ...

    @property
    def answer_header(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    def turns(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]: ...

    def last_answer(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]: ...

    def generation_prompt(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt type in one thinking mode.

    Attributes:
        system, user, assistant: the text of a message; `{content}` is what it says.
        tool_results: that of the results of calls, which stand where a user's message would; each is a `tool_result`.
        tool_call: an assistant's call, `{name}` with `{arguments}`.
        tools: follows the system prompt when tools are offered; `{tools}` is a line for each.
        stop_word: the token that ends a message; the end-of-document token of fine-tuning data.
        thought_words: what begins and ends a thought.
        enable_thinking: for an answer without a thought, an empty one is written: True trains it; None and False put it
            into the prompt, untrained. False also removes the thoughts of all answers.
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
        """Identity of the texts, whatever the thinking mode."""
        texts = {**dataclasses.asdict(self), "enable_thinking": None}
        return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()

    def turns(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]:
        """The trained form of a conversation: [system], then user (or results of tools) and assistant in turn.

        Args:
            tools: the JSON text of each tool that is offered.

        Raises:
            UserError: the roles do not follow each other so.
        """
        prefix, prompts, answers = self._parts(messages, tools, "assistant")
        turns = []
        for prompt, answer in zip(prompts, answers):
            turns.append(self._turn((*prefix, prompt), answer))
            prefix = ()
        return turns

    def last_answer(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[Turn]:
        """The same with only the last answer trained and earlier thoughts left out, as upstream's pairwise data have
        it."""
        return [self._turn(self._history(messages[:-1], tools), messages[-1])]

    def generation_prompt(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> tuple[str, ...]:
        """The pieces before the answer to a conversation that ends with the user; earlier thoughts are left out."""
        pieces = self._history(messages, tools)
        return pieces if self.enable_thinking else (*pieces, self._empty_thought)

    @cached_property
    def _empty_thought(self) -> str:
        return "".join(self.thought_words)

    def _history(self, messages: Sequence[Message], tools: Sequence[str]) -> tuple[str, ...]:
        prefix, prompts, answers = self._parts(messages, tools, "user")
        pieces = [*prefix, prompts[0]]
        for answer, prompt in zip(answers, prompts[1:]):
            content = self._without_thought(answer.content) + self._calls(answer)
            pieces += [_filled(self.assistant, content), prompt]
        return tuple(pieces)

    def _turn(self, source: tuple[str, ...], message: Message) -> Turn:
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
        content = f"{begin}{message.reasoning}{end}{message.content}" if message.reasoning else message.content
        content = self._without_thought(content) if self.enable_thinking is False else content
        return content + self._calls(message)

    def _calls(self, message: Message) -> str:
        """The calls of an answer, parted from its content by a new line."""
        if not message.tool_calls:
            return ""
        calls = "\n".join(
            self.tool_call.format(name=call.name, arguments=call.arguments) for call in message.tool_calls
        )
        return f"\n{calls}" if self._without_thought(message.content) else calls

    def _has_thought(self, answer: str) -> bool:
        begin, end = self.thought_words
        return begin in answer or end in answer

    def _without_thought(self, answer: str) -> str:
        begin, end = map(re.escape, self.thought_words)
        return re.sub(f"{begin}.*?{end}", "", answer, flags=re.DOTALL).lstrip("\n")


def _filled(text: str, content: str) -> str:
    """`text` with its one `{content}` filled in. Not `str.format`, which takes several times as long."""
    return text.replace("{content}", content)


_TEMPLATES = {
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
CHAT_TEMPLATE = "chat_template"  # the prompt type that is the model's own template
PROMPT_TYPES = sorted([*_TEMPLATES, CHAT_TEMPLATE])


def check_prompt_type(prompt_type: str) -> None:
    """An unknown name is an error."""
    if prompt_type not in PROMPT_TYPES:
        raise UserError(
            f"prompt type {prompt_type!r}: expected one of {PROMPT_TYPES}{nearest(prompt_type, PROMPT_TYPES)}"
        )


def get_template(prompt_type: str, enable_thinking: bool | None = None, tokenizer: Tokenizer | None = None) -> Template:
    """The template of a `--prompt-type`; an unknown name is an error. `chat_template` is that of `tokenizer`."""
    from tandem.data.model_template import ModelTemplate  # which builds on this module

    check_prompt_type(prompt_type)
    if prompt_type != CHAT_TEMPLATE:
        return dataclasses.replace(_TEMPLATES[prompt_type], enable_thinking=enable_thinking)
    if tokenizer is None:
        raise UserError(f"prompt type {CHAT_TEMPLATE} is the tokenizer's, and no tokenizer is known; name its folder")
    return ModelTemplate(tokenizer, enable_thinking)


def template_from_entry(entry: Mapping[str, Any] | None, tokenizer: Tokenizer | None) -> Template | None:
    """The template that a data record or a checkpoint names; None where it names none."""
    return get_template(entry["prompt_type"], entry["enable_thinking"], tokenizer) if entry else None


def grouped(dialogue: Sequence[Message], last: str) -> list[tuple[str, list[Message]]]:
    """Turns of a conversation as (role, messages): user or results of tools, then assistant, again and again.

    Results that follow each other are one turn.

    Raises:
        UserError: the roles do not follow each other so, or the last turn is not `last`.
    """
    turns: list[tuple[str, list[Message]]] = []
    expected, other = "user", "assistant"
    for message in dialogue:
        role = message.role
        if role == "tool" and turns and turns[-1][0] == "tool":
            turns[-1][1].append(message)
            continue
        if role != expected and not (role == "tool" and expected == "user" and turns):
            raise UserError(
                f"turn {len(turns) + 1} has role {role!r}, expected {expected!r}; user and assistant alternate"
            )
        turns.append((role, [message]))
        expected, other = other, expected
    if not turns or (turns[-1][0] == "assistant") != (last == "assistant"):
        found = f"ends with {turns[-1][0]!r}" if turns else "has no turns"
        raise UserError(f"the conversation {found}, expected it to end with {last!r}")
    return turns


def split_thought(answer: str) -> tuple[str, str]:
    """Thought and content of an answer that begins with `<think>`; no thought if it does not."""
    match = re.match(r"\s*<think>\n*(.*?)\n*</think>\n*", answer, re.DOTALL)
    return (match.group(1), answer[match.end() :]) if match else ("", answer)


def trained_on_last(turns: Sequence[Turn]) -> list[Turn]:
    """The same text, of which only the last answer is trained."""
    last = max(number for number, turn in enumerate(turns) if turn.target)
    return [turn if number == last else Turn((*turn.source, *turn.target), ()) for number, turn in enumerate(turns)]
