"""Handlers of plain text: one text per output key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tandem.data.handlers.fields import described, field, is_empty, string
from tandem.data.kinds import TEXT, Kind
from tandem.errors import UserError

# The wrapper that upstream's AlpacaPretrainHandler gives each record, letter for letter.
_ALPACA_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
    "USER: Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response: ASSISTANT: {output}"
)


@dataclass(frozen=True)
class GeneralPretrainHandler:
    """Plain text: the fields named by `json_keys`."""

    kind: ClassVar[Kind] = TEXT
    is_verbatim: ClassVar[bool] = True  # the texts are the fields, unchanged
    json_keys: tuple[str, ...] = ("text",)

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        """One text per key."""
        texts: list[Any] = [record.get(key) for key in self.json_keys]
        if all(type(text) is str for text in texts):  # the usual case, made fast
            return texts
        return [string(record, key, "json_keys") for key in self.json_keys]

    def unread(self, record: Mapping[str, Any]) -> Iterator[str]:
        """The columns of a record that hold something and are not read."""
        return (name for name, value in record.items() if name not in self._read_columns and not is_empty(value))

    @property
    def _read_columns(self) -> tuple[str, ...]:
        return self.json_keys


class AlpacaPretrainHandler(GeneralPretrainHandler):
    """`instruction`, `input`, `output` in upstream's English wrapper. Without an input, its heading is left out."""

    is_verbatim: ClassVar[bool] = False
    _read_columns = ("instruction", "input", "output")

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        question = string(record, "input", "alpaca") if record.get("input") else ""
        return [
            _ALPACA_TEXT.format(
                instruction=string(record, "instruction", "alpaca"),
                input=f"\n\n### Input:\n{question}" if question else "",
                output=string(record, "output", "alpaca"),
            )
        ]


class SharegptPretrainHandler(GeneralPretrainHandler):
    """`conversations`: the `value` of every turn, one after the other."""

    is_verbatim: ClassVar[bool] = False
    _read_columns = ("conversations",)

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        turns = field(record, "conversations", "sharegpt")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise UserError(f"field 'conversations': expected a list of turns, found {described(turns)}")
        return ["".join(string(turn, "value", "sharegpt") for turn in turns)]
