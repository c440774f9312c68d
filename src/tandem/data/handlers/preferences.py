"""Handlers of preferences: a prompt with a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tandem.data.handlers.conversations import (
    AlpacaStyleInstructionHandler,
    InstructionHandler,
    SharegptStyleInstructionHandler,
)
from tandem.data.handlers.fields import described, field
from tandem.data.kinds import PREFERENCES, Kind
from tandem.data.templates.messages import Message
from tandem.errors import UserError


class PairwiseHandler(InstructionHandler):
    """Two conversations that differ in their last message."""

    kind: ClassVar[Kind] = PREFERENCES

    def pair(self, record: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
        """The conversation with the chosen answer, and the one with the rejected answer.

        Raises:
            UserError: a field is missing or has another type.
        """
        raise NotImplementedError


class AlpacaStylePairwiseHandler(AlpacaStyleInstructionHandler, PairwiseHandler):
    """`instruction`, `input`, `chosen`, `rejected`; `system` and `history` where `map_keys` names them.

    An answer is a string. As upstream, it may also be a list: its first entry is the chosen answer, its second the
    rejected one.
    """

    defaults: ClassVar[dict[str, str]] = {
        **AlpacaStyleInstructionHandler.defaults,
        "chosen": "chosen",
        "rejected": "rejected",
    }
    needed: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")

    def pair(self, record: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
        prompt = self._prompt(record)
        chosen, rejected = self._answer(record, "chosen", 0), self._answer(record, "rejected", 1)
        return [*prompt, Message("assistant", chosen)], [*prompt, Message("assistant", rejected)]

    def _answer(self, record: Mapping[str, Any], name: str, position: int) -> str:
        column = self._columns[name]
        value = field(record, column, f"map_keys {name!r}")
        answer = value[position] if isinstance(value, list) and len(value) > position else value
        if not isinstance(answer, str):
            raise UserError(
                f"field {column!r}: expected a string, or a list with a string at {position}, found {described(value)}"
            )
        return answer


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

    def pair(self, record: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
        prompt = self.messages(record)
        chosen, rejected = self._answer(record, "chosen"), self._answer(record, "rejected")
        return [*prompt, chosen], [*prompt, rejected]

    def _answer(self, record: Mapping[str, Any], name: str) -> Message:
        column = self._columns[name]
        message = self._message(f"field {column!r}", field(record, column, f"map_keys {name!r}"))
        if message.role != "assistant":
            raise UserError(f"field {column!r}: expected a turn of the assistant, found a turn of {message.role!r}")
        return message
