"""Tokenising a block of conversations: the work of each worker of preprocessing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tandem.data.batch import IGNORE
from tandem.data.handlers.conversations import InstructionHandler
from tandem.data.kinds import CONVERSATIONS
from tandem.data.preprocess.chunks import TOO_LONG, ChunkTokenizer, OverLongError, TokenizedChunk, mapped_key
from tandem.data.preprocess.noticed import of_conversation
from tandem.data.templates.conversations import Conversations, with_ends
from tandem.data.templates.messages import Message, Template, Turn, join_neighbours, only_last_trained
from tandem.data.tokens.encoder import Engine
from tandem.data.tokens.special import SpecialTokens


class Conversation(NamedTuple):
    """A conversation as its template writes it, and what is noticed about it."""

    turns: list[Turn]
    noticed: Counter[str]


class MessagesTokenizer(ChunkTokenizer):
    """Base of the tokenizers of messages, which a template makes text of."""

    _template: Template

    def _handler_of(self, source: int) -> InstructionHandler:
        raise NotImplementedError

    def _look(self, records: Sequence[dict[str, Any]], source: int, chunk: TokenizedChunk) -> None:
        """Also count the columns that `map_keys` names, or that often have other names."""
        super()._look(records, source, chunk)
        handler = self._handler_of(source)
        for record in records:
            chunk.held.update(handler.held(record))
            chunk.mapped.update(mapped_key(source, column) for column in handler.mapped(record))

    def _template_for(self, handler: InstructionHandler, record: dict[str, Any]) -> Template:
        """The template of a record, which may give it variables of its own."""
        variables = handler.template_variables(record)
        return self._template.with_variables(variables) if variables else self._template

    def _spelled(self, messages: list[Message], tools: tuple[str, ...]) -> tuple[list[Message], tuple[str, ...]]:
        """The messages and tools, with marks where special tokens are to be spelled out."""
        if not self.spells:
            return messages, tools
        marked = self.special.marked
        return [
            message._replace(
                content=marked(message.content),
                reasoning=message.reasoning and marked(message.reasoning),
                tool_calls=tuple(call._replace(arguments=marked(call.arguments)) for call in message.tool_calls),
            )
            for message in messages
        ], tuple(map(marked, tools))


class InstructionTokenizer(MessagesTokenizer):
    """Conversations: a sequence each, of fewer than `seq_length` tokens. Prompts are masked, answers are trained.

    Args:
        handlers: the handler of each source.
        header: ids of the template's `answer_header`, which a prompt keeps when it is cut.
        eod: token to add to a conversation that leaves room for it. An answer that is cut leaves none, so it never
            gets a false end.
        train_turns: "all", or "last" to train only the last answer.
        over_long: what to do with conversations that are too long: "trim", "drop" (leave them out) or "stop".
    """

    output_keys = CONVERSATIONS.keys

    def __init__(
        self,
        engine: Engine,
        special: SpecialTokens,
        spells: bool,
        handlers: Sequence[InstructionHandler],
        template: Template,
        seq_length: int | None,
        header: Sequence[int],
        eod: int | None,
        train_turns: str = "all",
        over_long: str = "trim",
    ) -> None:
        super().__init__(engine, special, spells)
        self._over_long = over_long
        self._handlers = handlers
        self._template = template
        self._train_turns = train_turns
        self._room = room_for(seq_length)
        self._header, self.eod = header, eod

    def read(self, record: dict[str, Any], source: int) -> Conversation:
        handler = self._handlers[source]
        given, tools = self._spelled(handler.messages(record), handler.tools(record))
        messages = join_neighbours(given)
        template = self._template_for(handler, record)
        turns = template.turns(only_last_trained(messages) if self._train_turns == "last" else messages, tools)
        return Conversation(turns, of_conversation(given, messages, turns, None if self.spells else self.special))

    def texts(self, document: Conversation) -> list[str]:
        return texts_of(document.turns)

    def _handler_of(self, source: int) -> InstructionHandler:
        return self._handlers[source]

    def _tokenize(self, documents: list[Conversation], chunk: TokenizedChunk) -> None:
        texts = [self.texts(document) for document in documents]
        for document in documents:
            chunk.noticed.update(document.noticed)
        chunk.hashes = np.array([hash_of(pieces) for pieces in texts], np.uint64)
        encoded = self._encode([text for pieces in texts for text in pieces], chunk)
        conversations = Conversations([document.turns for document in documents], *encoded)
        if self._over_long == "stop":
            require_room(conversations.lengths, self._room)
        if self._over_long == "drop":
            short = conversations.lengths <= self._room
            conversations.keep_only(short)
            chunk.dropped[TOO_LONG] = int(np.count_nonzero(~short))
        else:
            chunk.counts["trimmed"], chunk.counts["trimmed_prompts"] = conversations.trim(self._room, self._header)
        chunk.dropped["nothing left to train"] = conversations.drop_untrained()
        ids, labels, lengths = conversations.ids, conversations.labels, conversations.lengths
        if self.eod is not None:
            roomy = lengths < self._room
            labels, _ = with_ends(labels, lengths, roomy, self.eod)
            ids, lengths = with_ends(ids, lengths, roomy, self.eod)
        chunk.columns = {
            "input_ids": (ids, lengths),
            "attention_mask": (np.ones_like(ids), lengths),
            "labels": (labels, lengths),
        }
        chunk.counts["kept"] = len(lengths)
        chunk.counts["tokens"] = ids.size
        chunk.counts["trained_tokens"] = int(np.count_nonzero(labels != IGNORE))


def room_for(seq_length: int | None) -> int:
    """The most tokens that a conversation may have: upstream reserves one position of `seq_length`."""
    return int(np.iinfo(np.int64).max) if seq_length is None else seq_length - 1


def require_room(lengths: np.ndarray, room: int) -> None:
    """Raise OverLongError for the first document of more than `room` tokens."""
    for document in np.flatnonzero(lengths > room).tolist():
        raise OverLongError(document, int(lengths[document]), room)


def hash_of(texts: Sequence[str]) -> int:
    """A hash of 64 bits of a conversation, which is the same in every process."""
    content = "\0".join(texts).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def texts_of(turns: Sequence[Turn]) -> list[str]:
    return [piece for turn in turns for piece in (*turn.source, *turn.target)]
