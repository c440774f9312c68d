"""Tokenising a block of rows: the work of each worker of preprocessing. Here for plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from tandem.data.handlers.registry import Handler
from tandem.data.handlers.text import GeneralPretrainHandler
from tandem.data.sources.readers import Block, parse_row, plain_texts
from tandem.data.templates.conversations import with_ends
from tandem.data.tokens.encoder import Engine
from tandem.data.tokens.special import SpecialTokens
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
        unread: rows by the name of a column that holds something and is not read. Of plain text one row of a block
            counts.
        held: rows by the name of a column that is read, holds something, and often has another name.
        mapped: rows by the source and the name of a column that `map_keys` names.
        noticed: what `noticed.py` counts.
        rejects: rows that could not be used, in order.
        source: number of the source of the block.
        hashes: uint64 [documents], the hash of each conversation.
    """

    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    mapped: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)
    source: int = 0
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


COUNTERS = ("counts", "dropped", "unread", "held", "mapped", "noticed")  # the counters of a chunk


def mapped_key(source: int, column: str) -> str:
    """The key of a column in `TokenizedChunk.mapped`."""
    return f"{source} {column}"


class OverLongError(Exception):
    """A document has too many tokens. `document` is its number in the chunk."""

    def __init__(self, document: int, tokens: int, room: int) -> None:
        super().__init__(
            f"{tokens:,} tokens, but --seq-length allows {room:,}; raise it, or choose --over-long trim or drop"
        )
        self.document = document


class ChunkTokenizer:
    """Base class: reads the rows of a block, and encodes all their texts together.

    Attributes:
        output_keys: names of the columns; each becomes a `.bin/.idx` pair.
        special: the special tokens that texts may spell.
        spells: whether these are spelled out.
        eod: the token that ends each document; None where there is none.
        adds_special_tokens: whether each text gets the tokenizer's special tokens, such as one at its beginning.
    """

    output_keys: tuple[str, ...]
    eod: int | None = None
    adds_special_tokens: ClassVar[bool] = False

    def __init__(self, engine: Engine, special: SpecialTokens, spells: bool) -> None:
        self.engine = engine
        self.special = special
        self.spells = spells

    def __call__(self, block: Block) -> TokenizedChunk:
        chunk = TokenizedChunk({}, source=block.source)
        rows = block.rows()
        records, documents, places = [], [], []
        for index, row in enumerate(rows):
            try:
                record, document = self.read_row(row, block.source, block.file)
                records.append(record)
                documents.append(document)
                places.append(index)
            except UserError as error:
                chunk.rejects.append(Reject(f"{block.place(index)}: {error}", row))
        chunk.counts["documents"] = len(rows)
        self._look(records, block.source, chunk)
        try:
            self._tokenize(documents, chunk)
        except OverLongError as error:
            raise UserError(f"{block.place(places[error.document])}: {error}") from None
        return chunk

    def read_row(self, row: Any, source: int, file: str) -> tuple[dict[str, Any], Any]:
        """The record of a row of a file, and its document. Raises UserError without the place of the row."""
        try:
            record = parse_row(row, file)
            return record, self.read(record, source)
        except RecursionError:
            raise UserError("nested too deeply") from None

    def _look(self, records: Sequence[dict[str, Any]], source: int, chunk: TokenizedChunk) -> None:
        """Count the columns of records that are not read."""
        handler = self._handler_of(source)
        for record in records:
            chunk.unread.update(dict.fromkeys(handler.unread(record), 1))

    def _handler_of(self, source: int) -> Handler:
        raise NotImplementedError

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

    adds_special_tokens: ClassVar[bool] = True

    def __init__(
        self,
        engine: Engine,
        special: SpecialTokens,
        spells: bool,
        handler: GeneralPretrainHandler,
        eod: int | None,
        pad_to_multiple_of: int = 1,
        pad: int = 0,
    ) -> None:
        super().__init__(engine, special, spells)
        self.output_keys = handler.json_keys
        self._handler = handler
        self.eod = eod
        self._multiple = pad_to_multiple_of
        self._pad = pad
        # Special tokens that the tokenizer adds to each text, such as one at its beginning.
        self._special_of_empty = int(np.count_nonzero(special.are_special[engine.encode([""])[0]]))

    def __call__(self, block: Block) -> TokenizedChunk:
        columns = plain_texts(block, self.output_keys) if self._handler.is_verbatim else None
        if columns is None:
            return super().__call__(block)
        chunk = TokenizedChunk({}, source=block.source)
        chunk.counts["documents"] = block.count
        self._look([parse_row(block.first_row())], block.source, chunk)
        self._add_columns(columns, chunk)
        return chunk

    def read(self, record: dict[str, Any], source: int) -> list[str]:
        return self._handler.texts(record)

    def _look(self, records: Sequence[dict[str, Any]], source: int, chunk: TokenizedChunk) -> None:
        """The first record of a block is enough, since all of a corpus are alike, and rows should take no time."""
        super()._look(records[:1], source, chunk)

    def _handler_of(self, source: int) -> Handler:
        return self._handler

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
            if self.spells:
                texts = [self.special.marked(text.decode()).encode() for text in texts]
            end = None if self._multiple > 1 else self.eod
            tokens, lengths = self.engine.encode(texts, end)
            added = len(texts) * (self._special_of_empty + bool(end is not None and self.special.are_special[end]))
            chunk.noticed["special tokens"] += int(np.count_nonzero(self.special.are_special[tokens])) - added
            if self._multiple > 1:
                # As upstream: a text whose length is a multiple gets one more multiple. The eod is a part of it.
                missing = self._multiple - lengths % self._multiple - (self.eod is not None)
                tokens, lengths = with_ends(tokens, lengths, missing, self._pad)
                if self.eod is not None:
                    tokens, lengths = with_ends(tokens, lengths, np.ones_like(lengths), self.eod)
            chunk.columns[key] = tokens, lengths
            chunk.counts["tokens"] += tokens.size
            chunk.counts["trained_tokens"] += tokens.size
            chunk.dropped[f"empty {key}"] += len(column) - len(texts)
        chunk.counts["kept"] = sum(map(any, zip(*columns)))
