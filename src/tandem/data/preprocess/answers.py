"""Tokenising a block of preferences: the work of each worker of preprocessing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tandem.data.batch import IGNORE
from tandem.data.handlers.conversations import InstructionHandler
from tandem.data.handlers.preferences import Answers, AnswersHandler
from tandem.data.kinds import Kind
from tandem.data.preprocess.chunks import TOO_LONG, TokenizedChunk
from tandem.data.preprocess.dialogues import MessagesTokenizer, hash_of, require_room, room_for, texts_of
from tandem.data.preprocess.noticed import of_answers
from tandem.data.templates.conversations import Conversations
from tandem.data.templates.messages import EMPTY, Message, Template, Turn, join_neighbours
from tandem.data.tokens.encoder import Engine
from tandem.data.tokens.special import SpecialTokens
from tandem.errors import UserError


class Preference(NamedTuple):
    """A prompt with each of its answers, as its template writes them.

    Attributes:
        numbers: a number for each of the kind's `numbers`.
        noticed: what is noticed about it.
    """

    answers: list[list[Turn]]
    numbers: tuple[int, ...]
    noticed: Counter[str]


class AnswersTokenizer(MessagesTokenizer):
    """Preferences: a sequence for each answer to a prompt. The prompt is masked, the answer has labels.

    If an answer is too long for `seq_length`, all answers to its prompt are left out, as upstream does, unless
    `over_long` is "stop".

    Args:
        handlers: the handler of each source, all of one kind.
    """

    def __init__(
        self,
        engine: Engine,
        special: SpecialTokens,
        spells: bool,
        handlers: Sequence[AnswersHandler],
        template: Template,
        seq_length: int | None,
        over_long: str = "drop",
    ) -> None:
        super().__init__(engine, special, spells)
        self._over_long = over_long
        self._handlers = handlers
        self._kind: Kind = handlers[0].kind
        self.output_keys = self._kind.keys
        self._template = template
        self._room = room_for(seq_length)

    def read(self, record: dict[str, Any], source: int) -> Preference:
        handler = self._handlers[source]
        given = handler.answers(record)
        self._require_template(given)
        template, tools = self._template_for(handler, record), handler.tools(record)
        conversations = [self._spelled([*given.prompt, *answer], tools) for answer in given.answers]
        start = len(given.prompt)
        turns = [_turns(template, messages[:start], messages[start:], tools) for messages, tools in conversations]
        numbers = () if given.desirable is None else (int(given.desirable),)
        special = None if self.spells else self.special
        return Preference(turns, numbers, of_answers(given, turns, template.name, special))

    def _require_template(self, given: Answers) -> None:
        if given.form == "split texts" and self._template.name != EMPTY:
            raise UserError(
                f"chosen and rejected are texts, and the prompt is what they have in common, so nothing says which "
                f"part is whose message; give --prompt-type {EMPTY}, which writes texts as they are, or name the "
                f"prompt's field with --map-keys"
            )

    def _handler_of(self, source: int) -> InstructionHandler:
        return self._handlers[source]

    def texts(self, document: Preference) -> list[str]:
        return [text for turns in document.answers for text in texts_of(turns)]

    def _tokenize(self, documents: list[Preference], chunk: TokenizedChunk) -> None:
        texts = [self.texts(document) for document in documents]
        for document in documents:
            chunk.noticed.update(document.noticed)
        chunk.hashes = np.array([hash_of(pieces) for pieces in texts], np.uint64)
        encoded = self._encode([text for pieces in texts for text in pieces], chunk)
        answers = len(self._kind.columns)  # to each prompt
        every = Conversations([turns for document in documents for turns in document.answers], *encoded)
        longest = every.lengths.reshape(-1, answers).max(axis=1)
        if self._over_long == "stop":
            require_room(longest, self._room)
        short = longest <= self._room
        trained = every.trained().reshape(-1, answers).min(axis=1) > 0
        chunk.dropped[TOO_LONG] = int(np.count_nonzero(~short))
        chunk.dropped["nothing left to train"] = int(np.count_nonzero(short & ~trained))
        kept = short & trained
        every.keep_only(np.repeat(kept, answers))
        for position, columns in enumerate(self._kind.columns):
            ids, labels, lengths = every.every(answers, position)
            chunk.columns[columns.ids] = ids, lengths
            chunk.columns[columns.labels] = labels, lengths
        for position, key in enumerate(self._kind.numbers):
            numbers = np.array([document.numbers[position] for document in documents], np.int32)[kept]
            chunk.columns[key] = numbers, np.ones(len(numbers), np.int64)
        chunk.counts["kept"] = int(np.count_nonzero(kept))
        chunk.counts["tokens"] = every.ids.size
        chunk.counts["trained_tokens"] = int(np.count_nonzero(every.labels != IGNORE))


def _turns(template: Template, prompt: list[Message], answer: list[Message], tools: Sequence[str]) -> list[Turn]:
    """The turns of a prompt and an answer, of which the answer's messages of the assistant are trained."""
    before, after = join_neighbours(prompt), join_neighbours(answer)
    if len(after) == 1:
        return template.last_answer([*before, *after], tools)
    return template.turns([*(message._replace(trained=False) for message in before), *after], tools)
