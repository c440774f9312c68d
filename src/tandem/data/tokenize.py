"""From rows to tokens, a block at a time: what each worker of preprocessing does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tandem.data.batch import IGNORE
from tandem.data.engine import Engine
from tandem.data.handlers import InstructionHandler, PretrainHandler
from tandem.data.naming import SFT_KEYS
from tandem.data.readers import Block, parse_row
from tandem.data.templates import Template, Turn, trained_on_last
from tandem.data.truncation import turn_budgets
from tandem.errors import UserError


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used: the reason begins with its place."""

    reason: str
    content: Any


@dataclass
class TokenizedChunk:
    """What a block of rows became.

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
    """Base of the kinds of preprocessing: reads the rows, encodes all their texts together.

    Attributes:
        output_keys: names of the columns, one `.bin/.idx` pair each.
        threads_suffice: the engine is so fast that sending tokens between processes would cost more than it gains.
    """

    output_keys: tuple[str, ...]

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def threads_suffice(self) -> bool:
        return self.engine.name == "gigatoken"

    def __call__(self, block: Block) -> TokenizedChunk:
        chunk = TokenizedChunk({})
        rows = block.rows()
        documents = []
        for index, row in enumerate(rows):
            try:
                documents.append(self.read(parse_row(row)))
            except UserError as error:
                chunk.rejects.append(Reject(f"{block.place(index)}: {error}", row))
        chunk.counts["documents"] = len(rows)
        self._tokenize(documents, chunk)
        return chunk

    def read(self, record: dict[str, Any]) -> Any:
        """The texts of a record; raises UserError without a place."""
        raise NotImplementedError

    def texts(self, document: Any) -> list[str]:
        """What is tokenised of a document that `read` gave."""
        raise NotImplementedError

    def _tokenize(self, documents: list[Any], chunk: TokenizedChunk) -> None:
        """Fill in the columns and counts."""
        raise NotImplementedError

    def _encode(self, texts: list[str], chunk: TokenizedChunk) -> tuple[np.ndarray, np.ndarray]:
        chunk.counts["text_bytes"] += sum(len(text.encode()) for text in texts)
        return self.engine.encode(texts)


class PretrainTokenizer(ChunkTokenizer):
    """A sequence per document and json key: its ids, with the tokenizer's own special tokens, then `eod` if given."""

    def __init__(self, engine: Engine, handler: PretrainHandler, eod: int | None) -> None:
        super().__init__(engine)
        self.output_keys = handler.json_keys
        self._handler = handler
        self._eod = eod

    def read(self, record: dict[str, Any]) -> list[str]:
        return self._handler.texts(record)

    def texts(self, document: list[str]) -> list[str]:
        return document

    def _tokenize(self, documents: list[list[str]], chunk: TokenizedChunk) -> None:
        for position, key in enumerate(self.output_keys):
            texts = [text for document in documents if (text := document[position])]
            tokens, lengths = self._encode(texts, chunk)
            if self._eod is not None:
                tokens, lengths = _with_ends(tokens, lengths, np.ones(len(lengths), bool), self._eod)
            chunk.columns[key] = tokens, lengths
            chunk.counts["tokens"] += tokens.size
            chunk.dropped[f"empty {key}"] += len(documents) - len(texts)
        chunk.counts["kept"] = sum(map(any, documents))


class InstructionTokenizer(ChunkTokenizer):
    """A sequence per conversation: prompts masked, answers trained, cut to fewer than `seq_length` tokens.

    `train_turns` is "all", or "last" to train only the last answer.
    The end-of-document token, if given, follows a conversation that leaves room for it; an answer that had to be cut
    leaves none, so it never gains a false end.
    """

    output_keys = SFT_KEYS

    def __init__(
        self,
        engine: Engine,
        handler: InstructionHandler,
        template: Template,
        seq_length: int | None,
        eod: int | None,
        train_turns: str = "all",
    ) -> None:
        super().__init__(engine)
        self._handler = handler
        self._template = template
        self._train_turns = train_turns
        self._room = np.iinfo(np.int64).max if seq_length is None else seq_length - 1  # upstream reserves one position
        self._eod = eod

    def read(self, record: dict[str, Any]) -> list[Turn]:
        turns = self._template.turns(self._handler.messages(record), self._handler.tools(record))
        return trained_on_last(turns) if self._train_turns == "last" else turns

    def texts(self, document: list[Turn]) -> list[str]:
        return [piece for turn in document for piece in (*turn.source, *turn.target)]

    def _tokenize(self, documents: list[list[Turn]], chunk: TokenizedChunk) -> None:
        conversations = _Conversations(documents, *self._encode([t for d in documents for t in self.texts(d)], chunk))
        chunk.counts["trimmed"] = conversations.trim(self._room)
        chunk.dropped["nothing left to train"] = conversations.drop_untrained()
        ids, labels, lengths = conversations.ids, conversations.labels, conversations.lengths
        if self._eod is not None:
            roomy = lengths < self._room
            labels, _ = _with_ends(labels, lengths, roomy, self._eod)
            ids, lengths = _with_ends(ids, lengths, roomy, self._eod)
        chunk.columns = {
            "input_ids": (ids, lengths),
            "attention_mask": (np.ones_like(ids), lengths),
            "labels": (labels, lengths),
        }
        chunk.counts["kept"] = len(lengths)
        chunk.counts["tokens"] = ids.size
        chunk.counts["trained_tokens"] = int(np.count_nonzero(labels != IGNORE))


class _Conversations:
    """The tokens of conversations, end to end.

    Attributes:
        ids, labels: int32 [t]; labels of sources are IGNORE.
        lengths: int64 [conversations], tokens of each.
    """

    def __init__(self, documents: Sequence[Sequence[Turn]], ids: np.ndarray, piece_lengths: np.ndarray) -> None:
        turns = [turn for turns in documents for turn in turns]
        self._turns_of = np.array([len(turns) for turns in documents], np.int64)
        sides = [len(side) for turn in turns for side in (turn.source, turn.target)]
        # Tokens of each turn's source and target, int64 [turns, 2].
        self._sides = _sums(piece_lengths, np.array(sides, np.int64)).reshape(-1, 2)
        self.ids = ids
        is_target = np.tile(np.array([False, True]), len(turns))
        self.labels = np.where(np.repeat(is_target, self._sides.ravel()), ids, np.int32(IGNORE))
        self.lengths = _sums(self._sides.sum(axis=1), self._turns_of)

    def trim(self, room: int) -> int:
        """Cut conversations longer than `room` turn by turn; how many were cut."""
        long = np.flatnonzero(self.lengths > room)
        if not len(long):
            return 0
        keep = np.ones(len(self.ids), bool)
        first_turns, starts = (np.cumsum(counts) - counts for counts in (self._turns_of, self.lengths))
        for conversation in long.tolist():
            first, begin = int(first_turns[conversation]), int(starts[conversation])
            sides = self._sides[first : first + int(self._turns_of[conversation])].tolist()
            budgets = turn_budgets([(source, target) for source, target in sides], room)
            budgets += [(0, 0)] * (len(sides) - len(budgets))
            for side, kept in zip(np.ravel(sides).tolist(), np.ravel(budgets).tolist()):
                keep[begin + kept : begin + side] = False
                begin += side
        self.lengths = _sums(keep, self.lengths)
        self.ids, self.labels = self.ids[keep], self.labels[keep]
        return len(long)

    def drop_untrained(self) -> int:
        """Leave out conversations without a trained token; how many there were."""
        trained = _sums(self.labels != IGNORE, self.lengths) > 0
        keep = np.repeat(trained, self.lengths)
        self.ids, self.labels, self.lengths = self.ids[keep], self.labels[keep], self.lengths[trained]
        return int(np.count_nonzero(~trained))


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [groups]: sums of groups of `values` that lie end to end, `counts` entries each."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(counts)
    return totals[ends] - totals[ends - counts]


def _with_ends(tokens: np.ndarray, lengths: np.ndarray, chosen: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """`end` put after each sequence that is `chosen`, bool [sequences]."""
    return np.insert(tokens, np.cumsum(lengths)[chosen], end), lengths + chosen
