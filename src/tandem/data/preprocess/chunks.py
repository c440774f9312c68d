"""Tokenising a block of rows: the work of each worker of preprocessing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tandem.data.batch import IGNORE
from tandem.data.handlers.conversations import InstructionHandler
from tandem.data.handlers.preferences import PairwiseHandler
from tandem.data.handlers.text import GeneralPretrainHandler
from tandem.data.kinds import CONVERSATIONS, PREFERENCES
from tandem.data.sources.readers import Block, parse_row, plain_texts
from tandem.data.templates.conversations import Conversations, with_ends
from tandem.data.templates.messages import Template, Turn, trained_on_last
from tandem.data.tokens.encoder import Engine
from tandem.errors import UserError

TOO_LONG = "longer than seq_length"  # a reason to drop


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used. The reason begins with its place."""

    reason: str
    content: Any


@dataclass
class TokenizedChunk:
    """The tokens of a block of rows.

    Attributes:
        columns: by output key, the tokens of all sequences end to end, int32 [t], and their lengths, int64 [sequences].
        counts: documents, kept, trimmed, trimmed_prompts, tokens, trained_tokens, text_bytes.
        dropped: documents left out, by reason.
        rejects: rows that could not be used, in order.
        source: number of the source of the block.
    """

    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)
    source: int = 0


class OverLongError(Exception):
    """A document has too many tokens. `document` is its number in the chunk."""

    def __init__(self, document: int, tokens: int, room: int) -> None:
        super().__init__(
            f"{tokens:,} tokens, but seq_length allows {room:,}; raise it, or choose --over-long trim or drop"
        )
        self.document = document


class ChunkTokenizer:
    """Base class: reads the rows of a block, and encodes all their texts together.

    Attributes:
        output_keys: names of the columns; each becomes a `.bin/.idx` pair.
    """

    output_keys: tuple[str, ...]

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, block: Block) -> TokenizedChunk:
        chunk = TokenizedChunk({}, source=block.source)
        rows = block.rows()
        documents, places = [], []
        for index, row in enumerate(rows):
            try:
                documents.append(self.read_row(row, block.source))
                places.append(index)
            except UserError as error:
                chunk.rejects.append(Reject(f"{block.place(index)}: {error}", row))
        chunk.counts["documents"] = len(rows)
        try:
            self._tokenize(documents, chunk)
        except OverLongError as error:
            raise UserError(f"{block.place(places[error.document])}: {error}") from None
        return chunk

    def read_row(self, row: Any, source: int) -> Any:
        """The document of a row. Raises UserError without the place of the row."""
        try:
            return self.read(parse_row(row), source)
        except RecursionError:
            raise UserError("nested too deeply") from None

    def read(self, record: dict[str, Any], source: int) -> Any:
        """The document of a record. Raises UserError without the place of the row."""
        raise NotImplementedError

    def texts(self, document: Any) -> list[str]:
        """The texts of a document of `read`, which are tokenised."""
        raise NotImplementedError

    def _tokenize(self, documents: list[Any], chunk: TokenizedChunk) -> None:
        """Fill in the columns and counts of `chunk`."""
        raise NotImplementedError

    def _encode(self, texts: list[str], chunk: TokenizedChunk) -> tuple[np.ndarray, np.ndarray]:
        chunk.counts["text_bytes"] += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        return self.engine.encode(texts)


class PretrainTokenizer(ChunkTokenizer):
    """Plain text: a sequence per document and json key, with the tokenizer's special tokens, and `eod` if given.

    With `pad_to_multiple_of` above 1, `pad` is added before `eod`, so that the length is a multiple of it.
    """

    def __init__(
        self,
        engine: Engine,
        handler: GeneralPretrainHandler,
        eod: int | None,
        pad_to_multiple_of: int = 1,
        pad: int = 0,
    ) -> None:
        super().__init__(engine)
        self.output_keys = handler.json_keys
        self._handler = handler
        self._eod = eod
        self._multiple = pad_to_multiple_of
        self._pad = pad

    def __call__(self, block: Block) -> TokenizedChunk:
        columns = plain_texts(block, self.output_keys) if self._handler.is_verbatim else None
        if columns is None:
            return super().__call__(block)
        chunk = TokenizedChunk({}, source=block.source)
        chunk.counts["documents"] = block.count
        self._add_columns(columns, chunk)
        return chunk

    def read(self, record: dict[str, Any], source: int) -> list[str]:
        return self._handler.texts(record)

    def texts(self, document: list[str]) -> list[str]:
        return document

    def _tokenize(self, documents: list[list[str]], chunk: TokenizedChunk) -> None:
        keys = range(len(self.output_keys))
        self._add_columns([[document[key].encode() for document in documents] for key in keys], chunk)

    def _add_columns(self, columns: list[list[bytes]], chunk: TokenizedChunk) -> None:
        """Fill in the tokens of the texts of each key."""
        for key, column in zip(self.output_keys, columns):
            texts = [text for text in column if text]
            chunk.counts["text_bytes"] += sum(map(len, texts))
            tokens, lengths = self.engine.encode(texts, None if self._multiple > 1 else self._eod)
            if self._multiple > 1:
                # As upstream: a text whose length is a multiple gets one more multiple. The eod is a part of it.
                missing = self._multiple - lengths % self._multiple - (self._eod is not None)
                tokens, lengths = with_ends(tokens, lengths, missing, self._pad)
                if self._eod is not None:
                    tokens, lengths = with_ends(tokens, lengths, np.ones_like(lengths), self._eod)
            chunk.columns[key] = tokens, lengths
            chunk.counts["tokens"] += tokens.size
            chunk.counts["trained_tokens"] += tokens.size
            chunk.dropped[f"empty {key}"] += len(column) - len(texts)
        chunk.counts["kept"] = sum(map(any, zip(*columns)))


class InstructionTokenizer(ChunkTokenizer):
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
        handlers: Sequence[InstructionHandler],
        template: Template,
        seq_length: int | None,
        header: Sequence[int],
        eod: int | None,
        train_turns: str = "all",
        over_long: str = "trim",
    ) -> None:
        super().__init__(engine)
        self._over_long = over_long
        self._handlers = handlers
        self._template = template
        self._train_turns = train_turns
        self._room = room_for(seq_length)
        self._header, self._eod = header, eod

    def read(self, record: dict[str, Any], source: int) -> list[Turn]:
        handler = self._handlers[source]
        turns = self._template.turns(handler.messages(record), handler.tools(record))
        return trained_on_last(turns) if self._train_turns == "last" else turns

    def texts(self, document: list[Turn]) -> list[str]:
        return texts_of(document)

    def _tokenize(self, documents: list[list[Turn]], chunk: TokenizedChunk) -> None:
        conversations = Conversations(documents, *self._encode([t for d in documents for t in texts_of(d)], chunk))
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
        if self._eod is not None:
            roomy = lengths < self._room
            labels, _ = with_ends(labels, lengths, roomy, self._eod)
            ids, lengths = with_ends(ids, lengths, roomy, self._eod)
        chunk.columns = {
            "input_ids": (ids, lengths),
            "attention_mask": (np.ones_like(ids), lengths),
            "labels": (labels, lengths),
        }
        chunk.counts["kept"] = len(lengths)
        chunk.counts["tokens"] = ids.size
        chunk.counts["trained_tokens"] = int(np.count_nonzero(labels != IGNORE))


class PairTokenizer(ChunkTokenizer):
    """Preferences: two sequences each, the masked prompt with the chosen answer, and with the rejected one.

    If either is too long for `seq_length`, both are left out, as upstream does, unless `over_long` is "stop".
    """

    output_keys = PREFERENCES.keys

    def __init__(
        self,
        engine: Engine,
        handler: PairwiseHandler,
        template: Template,
        seq_length: int | None,
        over_long: str = "drop",
    ) -> None:
        super().__init__(engine)
        self._over_long = over_long
        self._handler = handler
        self._template = template
        self._room = room_for(seq_length)

    def read(self, record: dict[str, Any], source: int) -> tuple[list[Turn], list[Turn]]:
        tools = self._handler.tools(record)
        chosen, rejected = self._handler.pair(record)
        return self._template.last_answer(chosen, tools), self._template.last_answer(rejected, tools)

    def texts(self, document: tuple[list[Turn], list[Turn]]) -> list[str]:
        return [text for turns in document for text in texts_of(turns)]

    def _tokenize(self, documents: list[tuple[list[Turn], list[Turn]]], chunk: TokenizedChunk) -> None:
        texts = [text for document in documents for text in self.texts(document)]
        both = Conversations([turns for document in documents for turns in document], *self._encode(texts, chunk))
        longer = both.lengths.reshape(-1, 2).max(axis=1)
        if self._over_long == "stop":
            require_room(longer, self._room)
        short = longer <= self._room
        both.keep_only(np.repeat(short, 2))
        chunk.dropped[TOO_LONG] = int(np.count_nonzero(~short))
        for position, columns in enumerate(PREFERENCES.columns):
            ids, labels, lengths = both.every_other(position)
            chunk.columns[columns.ids] = ids, lengths
            chunk.columns[columns.labels] = labels, lengths
        chunk.counts["kept"] = int(np.count_nonzero(short))
        chunk.counts["tokens"] = both.ids.size
        chunk.counts["trained_tokens"] = int(np.count_nonzero(both.labels != IGNORE))


def room_for(seq_length: int | None) -> int:
    """The most tokens that a conversation may have: upstream reserves one position of `seq_length`."""
    return int(np.iinfo(np.int64).max) if seq_length is None else seq_length - 1


def require_room(lengths: np.ndarray, room: int) -> None:
    """Raise OverLongError for the first document of more than `room` tokens."""
    for document in np.flatnonzero(lengths > room).tolist():
        raise OverLongError(document, int(lengths[document]), room)


def texts_of(turns: Sequence[Turn]) -> list[str]:
    return [piece for turn in turns for piece in (*turn.source, *turn.target)]
