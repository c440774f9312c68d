"""Handlers of preferences: a prompt with a chosen and a rejected answer, or with one that is desirable or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

from tandem.data.handlers.conversations import (
    AlpacaStyleInstructionHandler,
    InstructionHandler,
    OpenAIInstructionHandler,
    PromptCompletionHandler,
    SharegptStyleInstructionHandler,
)
from tandem.data.handlers.fields import described, field, is_empty
from tandem.data.kinds import PREFERENCES, UNPAIRED, Kind
from tandem.data.templates.messages import Message
from tandem.errors import UserError

KTO_TAG = "kto_tag"  # what LLaMA-Factory calls the label
SIDES = ("chosen", "rejected")
_LABELS = {"true": True, "false": False, "1": True, "0": False}  # as tables have them, in small letters

# "messages"; "texts": a prompt and answers without roles; "split texts": the same, where the prompt is what the answers
# have in common
Form = Literal["messages", "texts", "split texts"]


class Answers(NamedTuple):
    """A prompt and its answers.

    Attributes:
        prompt: the messages that all answers follow. The last one is of a user or a tool.
        answers: the chosen and the rejected one; of unpaired preferences the only one. Each is a message of the
            assistant, or several: calls with their results, or a conversation that goes on.
        desirable: of unpaired preferences, whether the answer is.
        form: how the record holds them.
    """

    prompt: list[Message]
    answers: tuple[list[Message], ...]
    desirable: bool | None = None
    form: Form = "messages"


class AnswersHandler(InstructionHandler):
    """A prompt and its answers."""

    def answers(self, record: Mapping[str, Any]) -> Answers:
        """The prompt and the answers of a record.

        Raises:
            UserError: a field is missing or has another type, or the answers do not follow the prompt.
        """
        raise NotImplementedError


class PairwiseHandler(AnswersHandler):
    """Two answers: a chosen one and a rejected one."""

    kind: ClassVar[Kind] = PREFERENCES

    @classmethod
    def fits(cls, record: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
        """Answers that are whole conversations are TRL's, also next to `messages`, as in ultrafeedback_binarized."""
        return super().fits(record, columns) and (
            "messages" not in cls.needed or not all(map(_begins_with_prompt, (record[columns[name]] for name in SIDES)))
        )

    def _pair(self, prompt: list[Message], sides: Mapping[str, list[Message]], form: Form = "messages") -> Answers:
        """The answers by the name of their field."""
        for name, answer in sides.items():
            _check(prompt, answer, f"field {self._columns[name]!r}")
        return Answers(prompt, tuple(sides.values()), None, form)


class AlpacaStylePairwiseHandler(AlpacaStyleInstructionHandler, PairwiseHandler):
    """`instruction`, `input`, `chosen`, `rejected`; `system`, `history` and `tools` where `map_keys` names them.

    An answer is a string. As upstream, it may also be a list: its first entry is the chosen answer, its second the
    rejected one.
    """

    defaults: ClassVar[dict[str, str]] = {
        **AlpacaStyleInstructionHandler.defaults,
        "chosen": "chosen",
        "rejected": "rejected",
    }
    needed: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")

    @classmethod
    def fits(cls, record: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
        """Lists of messages are TRL's."""
        return super().fits(record, columns) and not any(_holds_messages(record[columns[name]]) for name in cls.needed)

    def answers(self, record: Mapping[str, Any]) -> Answers:
        sides = {"chosen": self._answer(record, "chosen", 0), "rejected": self._answer(record, "rejected", 1)}
        return self._pair(self._prompt(record), sides)

    def _answer(self, record: Mapping[str, Any], name: str, position: int) -> list[Message]:
        column = self._columns[name]
        value = field(record, column, f"--map-keys {name!r}")
        answer = value[position] if isinstance(value, list) and len(value) > position else value
        if not isinstance(answer, str):
            raise UserError(
                f"field {column!r}: expected a string, or a list with a string at {position}, found {described(value)}"
            )
        return [Message("assistant", answer)]


class SharegptStylePairwiseHandler(SharegptStyleInstructionHandler, PairwiseHandler):
    """`conversations` up to the question; `chosen` and `rejected` hold one turn `{from, value}` each.

    `tags` rename as in `SharegptStyleInstructionHandler`.
    """

    defaults: ClassVar[dict[str, str]] = {
        **SharegptStyleInstructionHandler.defaults,
        "chosen": "chosen",
        "rejected": "rejected",
    }
    needed: ClassVar[tuple[str, ...]] = ("messages", "chosen", "rejected")

    def answers(self, record: Mapping[str, Any]) -> Answers:
        return self._pair(self.messages(record), {name: self._answer(record, name) for name in ("chosen", "rejected")})

    def _answer(self, record: Mapping[str, Any], name: str) -> list[Message]:
        column = self._columns[name]
        value = field(record, column, f"--map-keys {name!r}")
        entry = value[0] if isinstance(value, list) and len(value) == 1 else value
        message = self._message(f"field {column!r}", entry)
        if message.role != "assistant":
            raise UserError(f"field {column!r}: expected a turn of the assistant, found a turn of {message.role!r}")
        return [message]


class OpenAIPairwiseHandler(OpenAIInstructionHandler, PairwiseHandler):
    """`messages` up to the question; `chosen` and `rejected` hold a message, a list of them or a text each."""

    defaults: ClassVar[dict[str, str]] = {
        **OpenAIInstructionHandler.defaults,
        "chosen": "chosen",
        "rejected": "rejected",
    }
    needed: ClassVar[tuple[str, ...]] = ("messages", "chosen", "rejected")

    def answers(self, record: Mapping[str, Any]) -> Answers:
        sides = {name: self._side(record, name, "assistant") for name in ("chosen", "rejected")}
        return self._pair(self.messages(record), sides)


class PreferenceHandler(OpenAIInstructionHandler, PairwiseHandler):
    """TRL's preferences: `prompt`, `chosen`, `rejected`; each is a text, or a list of messages as OpenAI's; `tools`.

    Without a prompt, or where the answers begin with it, the prompt is what both answers have in common. `system` is
    read where `map_keys` names it.
    """

    defaults: ClassVar[dict[str, str]] = {
        "prompt": "prompt",
        "chosen": "chosen",
        "rejected": "rejected",
        "system": "",
        "tools": "tools",
        "chat_template_kwargs": "chat_template_kwargs",
    }
    needed: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    lists: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")

    def answers(self, record: Mapping[str, Any]) -> Answers:
        prompt = self._given_prompt(record)
        sides = {name: self._side(record, name, "assistant") for name in self.needed}
        texts = all(isinstance(record.get(self._columns[name]), str) for name in self.needed)
        form: Form = "messages"
        if texts and not prompt:
            prompt, sides = self._split(sides)
            form = "split texts"
        elif texts:
            form = "texts" if isinstance(record[self._columns["prompt"]], str) else "messages"
        elif not prompt or all(side[0].role != "assistant" for side in sides.values()):
            prompt, sides = self._common(prompt, sides)
        return self._pair(self._with_system(record, prompt), sides, form)

    def _given_prompt(self, record: Mapping[str, Any]) -> list[Message]:
        """The prompt's own field; nothing where there is none."""
        column = self._columns["prompt"]
        return [] if not column or is_empty(record.get(column)) else self._side(record, "prompt", "user")

    def _common(
        self, given: Sequence[Message], sides: Mapping[str, list[Message]]
    ) -> tuple[list[Message], dict[str, list[Message]]]:
        """The prompt with which both conversations begin, and what follows it in each."""
        shorter, *_ = sorted(sides.values(), key=len)
        least = min(len(shorter) - 1, *(_same(shorter, side) for side in sides.values()))
        prompt = shorter[:least]
        if not prompt:
            raise UserError(
                f"fields {self._names}: begin with different messages, so they have no prompt in common; both must "
                f"answer the same one"
            )
        is_in = any(message in prompt for message in given) if len(given) == 1 else given == prompt[: len(given)]
        if given and not is_in:
            raise UserError(
                f"field {self._columns['prompt']!r}: is not what {self._names} begin with; let these hold the answers "
                f"alone, or correct the prompt"
            )
        return prompt, {name: side[least:] for name, side in sides.items()}

    def _split(self, sides: Mapping[str, list[Message]]) -> tuple[list[Message], dict[str, list[Message]]]:
        """As `_common`, of texts."""
        texts = [side[0].content for side in sides.values()]
        place = _end_of_prompt(*texts)
        if not place:
            raise UserError(
                f"fields {self._names}: are texts that begin differently, and there is no prompt; name its field with "
                f"--map-keys 'prompt'"
            )
        return [Message("user", texts[0][:place])], {
            name: [Message("assistant", side[0].content[place:])] for name, side in sides.items()
        }

    @property
    def _names(self) -> str:
        return " and ".join(repr(self._columns[name]) for name in self.needed)


class UnpairedHandler(AnswersHandler):
    """One answer, and a label that says whether it is desirable: true or false."""

    kind: ClassVar[Kind] = UNPAIRED

    @classmethod
    def fits(cls, record: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
        """A label is true or false. Other columns of that name mean something else, unless `map_keys` names them."""
        labels = (record.get(column) for column in (columns["label"], KTO_TAG))
        is_named = columns["label"] != cls.defaults["label"] and columns["label"] in record
        needs = (columns[name] in record for name in cls.needed if name != "label")
        return all(needs) and (is_named or any(isinstance(label, bool) for label in labels))

    @cached_property
    def _read_columns(self) -> frozenset[str]:
        return frozenset({*self._columns.values(), KTO_TAG})

    def _answer(self, record: Mapping[str, Any], conversation: Sequence[Message], form: Form = "messages") -> Answers:
        """The answer that ends a conversation."""
        *prompt, answer = conversation
        return self._completion(record, prompt, [answer], form)

    def _completion(
        self, record: Mapping[str, Any], prompt: list[Message], completion: list[Message], form: Form = "messages"
    ) -> Answers:
        _check(prompt, completion, "the record")
        return Answers(prompt, (completion,), self._label(record), form)

    def _label(self, record: Mapping[str, Any]) -> bool:
        column = self._columns["label"]
        if "label" not in self.map_keys and column not in record and KTO_TAG in record:
            column = KTO_TAG
        value = field(record, column, "--map-keys 'label'")
        if isinstance(value, bool | int | float) and value in (0, 1):
            return bool(value)
        label = _LABELS.get(value.strip().lower()) if isinstance(value, str) else None
        if label is None:
            raise UserError(
                f"field {column!r}: expected true (the answer is desirable) or false, found {described(value)}"
            )
        return label


class UnpairedPreferenceHandler(PromptCompletionHandler, UnpairedHandler):
    """TRL's unpaired preferences: `prompt` and `completion` as in `PromptCompletionHandler`, and `label`."""

    defaults: ClassVar[dict[str, str]] = {**PromptCompletionHandler.defaults, "label": "label"}
    needed: ClassVar[tuple[str, ...]] = ("prompt", "completion", "label")
    lists: ClassVar[tuple[str, ...]] = ("prompt", "completion")

    def answers(self, record: Mapping[str, Any]) -> Answers:
        prompt, completion = self._side(record, "prompt", "user"), self._side(record, "completion", "assistant")
        texts = all(isinstance(record.get(self._columns[name]), str) for name in self.lists)
        form: Form = "texts" if texts else "messages"
        return self._completion(record, self._with_system(record, prompt), completion, form)


class AlpacaStyleUnpairedHandler(AlpacaStyleInstructionHandler, UnpairedHandler):
    """`instruction`, `input`, `output`, and `label` or `kto_tag`; the rest as in `AlpacaStyleInstructionHandler`."""

    defaults: ClassVar[dict[str, str]] = {**AlpacaStyleInstructionHandler.defaults, "label": "label"}
    needed: ClassVar[tuple[str, ...]] = ("prompt", "response", "label")

    def answers(self, record: Mapping[str, Any]) -> Answers:
        return self._answer(record, self.messages(record))


class SharegptStyleUnpairedHandler(SharegptStyleInstructionHandler, UnpairedHandler):
    """`conversations`, whose last answer the `label` or `kto_tag` is about."""

    defaults: ClassVar[dict[str, str]] = {**SharegptStyleInstructionHandler.defaults, "label": "label"}
    needed: ClassVar[tuple[str, ...]] = ("messages", "label")
    lists: ClassVar[tuple[str, ...]] = ("messages",)

    def answers(self, record: Mapping[str, Any]) -> Answers:
        return self._answer(record, self.messages(record))


class OpenAIUnpairedHandler(OpenAIInstructionHandler, UnpairedHandler):
    """`messages`, whose last answer the `label` or `kto_tag` is about."""

    defaults: ClassVar[dict[str, str]] = {**OpenAIInstructionHandler.defaults, "label": "label"}
    needed: ClassVar[tuple[str, ...]] = ("messages", "label")
    lists: ClassVar[tuple[str, ...]] = ("messages",)

    def answers(self, record: Mapping[str, Any]) -> Answers:
        return self._answer(record, self.messages(record))


def _check(prompt: Sequence[Message], answer: Sequence[Message], place: str) -> None:
    """Raise UserError unless an answer of the assistant follows a question."""
    last = prompt[-1].role if prompt else "nothing"
    if last not in ("user", "tool"):
        raise UserError(f"{place}: the prompt ends with {last!r}, expected a message of the user, or a tool's result")
    for which, message in (("begins", answer[0]), ("ends", answer[-1])):
        if message.role != "assistant":
            raise UserError(
                f"{place}: the answer {which} with a message of {message.role!r}, expected one of the assistant"
            )


def _same(first: Sequence[Any], second: Sequence[Any]) -> int:
    """With how many equal messages, or characters, two of them begin.

    >>> _same("good", "gold")
    2
    """
    differing = (number for number, (one, other) in enumerate(zip(first, second)) if one != other)
    return next(differing, min(len(first), len(second)))


def _end_of_prompt(first: str, second: str) -> int:
    """Where the prompt ends that two texts begin with: before a space, or after a line end.

    There tokens end, whatever follows. So a word that both answers begin with belongs to the answers.

    >>> _end_of_prompt("Q: why?\\n\\nA: It is so.", "Q: why?\\n\\nA: I see.")
    11
    """
    length = _same(first, second)
    before_space = first.rfind(" ", 0, length)
    after_line = first.rfind("\n", 0, length) + 1
    return max(before_space, after_line, 0)


def _begins_with_prompt(value: Any) -> bool:
    """Whether a field is a list of messages, of which the first is not the assistant's."""
    first = value[0] if isinstance(value, list) and len(value) > 1 else None
    return isinstance(first, dict) and first.get("role", "assistant") != "assistant"


def _holds_messages(value: Any) -> bool:
    entry = value[0] if isinstance(value, list) and value else value
    return isinstance(entry, dict)
