"""From rows to tokens, a chunk at a time: what each worker process of preprocessing does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from tandem.data.batch import IGNORE
from tandem.data.handlers import GeneralPretrainHandler, Handler, InstructionHandler
from tandem.data.naming import SFT_KEYS
from tandem.data.readers import Row
from tandem.data.templates import PromptTemplate, Turn
from tandem.data.tokenizer import Tokenizer
from tandem.data.truncation import turn_budgets
from tandem.errors import UserError


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used: the reason begins with its place."""

    reason: str
    content: Any


@dataclass
class TokenizedChunk:
    """What a chunk of rows became.

    Attributes:
        columns: per output key the tokens int32 [t] of all sequences end to end, and their lengths int64 [sequences].
        counts: documents, kept, trimmed, tokens, trained_tokens, text_bytes.
        dropped: documents left out, by reason.
        rejects: rows that could not be used, in order.
    """

    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)


class ChunkTokenizer:
    """Base of the two kinds of preprocessing: reads the rows, encodes all their texts together.

    Attributes:
        output_keys: names of the columns, one `.bin/.idx` pair each.
    """

    output_keys: tuple[str, ...]

    def __init__(self, tokenizer: Tokenizer, handler: Handler) -> None:
        self.tokenizer = tokenizer
        self.handler = handler

    def __call__(self, rows: Sequence[Row]) -> TokenizedChunk:
        chunk = TokenizedChunk({})
        documents = []
        for row in rows:
            try:
                record = row.parse()
            except UserError as error:
                chunk.rejects.append(Reject(str(error), row.content))
                continue
            try:
                documents.append(self._read(record))
            except UserError as error:
                chunk.rejects.append(Reject(f"{row.place}: {error}", row.content))
        chunk.counts["documents"] = len(rows)
        self._tokenize(documents, chunk)
        return chunk

    def _read(self, record: dict[str, Any]) -> Any:
        """The texts of a record; raises UserError without a place."""
        raise NotImplementedError

    def _tokenize(self, documents: list[Any], chunk: TokenizedChunk) -> None:
        """Fill in the columns and counts."""
        raise NotImplementedError

    def _encode(self, texts: Sequence[str], chunk: TokenizedChunk, add_special_tokens: bool) -> dict[str, list[int]]:
        """Ids of each distinct text."""
        distinct = list(dict.fromkeys(texts))
        chunk.counts["text_bytes"] += sum(len(text.encode()) for text in texts)
        return dict(zip(distinct, self.tokenizer.encode_batch(distinct, add_special_tokens)))


class PretrainTokenizer(ChunkTokenizer):
    """A sequence per document and json key: its ids, with the tokenizer's own special tokens, then `eod` if given."""

    def __init__(self, tokenizer: Tokenizer, handler: GeneralPretrainHandler, eod: int | None) -> None:
        super().__init__(tokenizer, handler)
        self.output_keys = handler.json_keys
        self._texts = handler.texts
        self._end = [] if eod is None else [eod]

    def _read(self, record: dict[str, Any]) -> list[str]:
        return self._texts(record)

    def _tokenize(self, documents: list[list[str]], chunk: TokenizedChunk) -> None:
        ids_of = self._encode([text for texts in documents for text in texts], chunk, add_special_tokens=True)
        for position, key in enumerate(self.output_keys):
            texts = [texts[position] for texts in documents]
            chunk.columns[key] = _column([ids_of[text] + self._end for text in texts if text])
            chunk.counts["tokens"] += chunk.columns[key][0].size
            chunk.dropped[f"empty {key}"] += sum(not text for text in texts)
        chunk.counts["kept"] = sum(any(texts) for texts in documents)


class InstructionTokenizer(ChunkTokenizer):
    """A sequence per conversation: prompts masked, answers trained, cut to fewer than `seq_length` tokens.

    The end-of-document token, if given, follows a conversation that leaves room for it; an answer that had to be cut
    leaves none, so it never gains a false end.
    """

    output_keys = SFT_KEYS

    def __init__(
        self,
        tokenizer: Tokenizer,
        handler: InstructionHandler,
        template: PromptTemplate,
        seq_length: int | None,
        eod: int | None,
    ) -> None:
        super().__init__(tokenizer, handler)
        self._messages = handler.messages
        self._template = template
        self._room = None if seq_length is None else seq_length - 1  # upstream reserves one position
        self._end = [] if eod is None else [eod]

    def _read(self, record: dict[str, Any]) -> list[Turn]:
        return self._template.turns(self._messages(record))

    def _tokenize(self, documents: list[list[Turn]], chunk: TokenizedChunk) -> None:
        pieces = [piece for turns in documents for turn in turns for piece in (*turn.source, *turn.target)]
        ids_of = self._encode(pieces, chunk, add_special_tokens=False)
        input_ids, labels = [], []
        for turns in documents:
            pairs = [
                tuple([i for piece in part for i in ids_of[piece]] for part in (t.source, t.target)) for t in turns
            ]
            ids, trained = self._sequence(list(self._trimmed(pairs, chunk)))
            if all(label == IGNORE for label in trained):
                chunk.dropped["nothing left to train"] += 1
                continue
            input_ids.append(ids)
            labels.append(trained)
        chunk.columns["input_ids"] = _column(input_ids)
        chunk.columns["labels"] = _column(labels)
        tokens, lengths = chunk.columns["input_ids"]
        chunk.columns["attention_mask"] = (np.ones_like(tokens), lengths)
        chunk.counts["kept"] = len(input_ids)
        chunk.counts["tokens"] = tokens.size
        chunk.counts["trained_tokens"] = int(np.count_nonzero(chunk.columns["labels"][0] != IGNORE))

    def _trimmed(self, pairs: list[Any], chunk: TokenizedChunk) -> Iterator[tuple[list[int], list[int]]]:
        """The (source, target) ids that the budget leaves of a conversation."""
        lengths = [(len(source), len(target)) for source, target in pairs]
        if self._room is None or sum(map(sum, lengths)) <= self._room:
            yield from pairs
            return
        chunk.counts["trimmed"] += 1
        for (source, target), (source_len, target_len) in zip(pairs, turn_budgets(lengths, self._room)):
            yield source[:source_len], target[:target_len]

    def _sequence(self, pairs: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation."""
        ids: list[int] = []
        labels: list[int] = []
        for source, target in pairs:
            ids += source + target
            labels += [IGNORE] * len(source) + target
        if self._room is None or len(ids) < self._room:
            ids += self._end
            labels += self._end
        return ids, labels


def _column(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    tokens = np.fromiter(chain.from_iterable(sequences), np.int32, int(lengths.sum()))
    return tokens, lengths
