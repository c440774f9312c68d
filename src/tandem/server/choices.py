"""Answers as OpenAI's objects: whole, and in chunks. Joined chunks are the whole one."""

from __future__ import annotations

import codecs
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from tandem.data.templates.messages import ToolCall
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.inference.answers import Piece, joined
from tandem.inference.scheduler import Top
from tandem.inference.worker import Update

LEAST_LOGPROB = -9999.0  # what OpenAI writes for a token that cannot come: JSON has no infinity
FIELDS = {"text": "content", "thought": "reasoning_content"}


class Choice(Protocol):
    """One of the answers to a request, while it is written."""

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before any token."""
        ...

    def chunks(self, update: Update) -> list[dict[str, Any]]: ...

    def whole(self, updates: Sequence[Update]) -> dict[str, Any]: ...


class ChatChoice:
    """An answer of /v1/chat/completions.

    Args:
        logprobs: whether log-probabilities are told.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._index, self._tokenizer, self._logprobs = index, tokenizer, logprobs
        self._calls = 0  # so far
        self._entries: list[dict[str, Any]] = []  # log-probabilities that no chunk has told yet

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        self._entries += self._told(update)
        chunks = [self._chunk(self._delta(piece)) for piece in update.pieces]
        if update.finish_reason or (self._entries and not chunks and self._logprobs):
            chunks.append(self._chunk({}, self._reason(update)))
        return chunks

    def whole(self, updates: Sequence[Update]) -> dict[str, Any]:
        pieces = joined([piece for update in updates for piece in update.pieces])
        texts = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in FIELDS}
        calls = [_call(piece.call) for piece in pieces if piece.call is not None]
        self._calls = len(calls)
        message: dict[str, Any] = {"role": "assistant", "content": texts["text"] or (None if calls else "")}
        if texts["thought"]:
            message["reasoning_content"] = texts["thought"]
        if calls:
            message["tool_calls"] = calls
        entries = [entry for update in updates for entry in self._told(update)]
        return {
            "index": self._index,
            "message": message,
            "logprobs": {"content": entries, "refusal": None} if self._logprobs else None,
            "finish_reason": self._reason(updates[-1]),
        }

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        entries, self._entries = self._entries, []
        logprobs = {"content": entries, "refusal": None} if self._logprobs and entries else None
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if piece.call is None:
            return {FIELDS[piece.kind]: piece.text}
        self._calls += 1
        return {"tool_calls": [{"index": self._calls - 1, **_call(piece.call)}]}

    def _reason(self, update: Update) -> str | None:
        return "tool_calls" if update.finish_reason == "stop" and self._calls else update.finish_reason

    def _told(self, update: Update) -> list[dict[str, Any]]:
        if not self._logprobs:
            return []
        tops: Sequence[Top] = update.top or [[]] * len(update.tokens)
        return [
            {
                **self._entry(token, logprob),
                "top_logprobs": [self._entry(*pair) for pair in top],
            }
            for token, logprob, top in zip(update.tokens, update.logprobs, tops)
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.token_bytes(token)
        shown = content.decode("utf-8", "replace")
        return {"token": shown, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(content)}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class CompletionChoice:
    """An answer of /v1/completions.

    Args:
        echo: the prompt's text, which the answer begins with; None without `echo`.
        prompt: token ids.
        logprobs: how many tokens are told in each place; None for no log-probabilities.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, prompt: Sequence[int], echo: str | None, logprobs: int | None
    ) -> None:
        self._index, self._tokenizer, self._prompt, self._echo = index, tokenizer, prompt, echo
        self._logprobs = logprobs
        self._offset = 0  # of the next token, in characters
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")  # some tokens end inside of one
        self._begins = echo or ""

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        text = self._text(update)
        logprobs = self._table(update)
        if not text and update.finish_reason is None and not (logprobs and logprobs["tokens"]):
            return []
        return [self._choice(text, logprobs, update.finish_reason)]

    def whole(self, updates: Sequence[Update]) -> dict[str, Any]:
        text = "".join(self._text(update) for update in updates)
        tables = [table for update in updates if (table := self._table(update)) is not None]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        table = {name: [value for table in tables for value in table[name]] for name in names} if tables else None
        return self._choice(text, table, updates[-1].finish_reason)

    def _choice(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _text(self, update: Update) -> str:
        echo, self._echo = self._echo or "", None
        return echo + "".join(piece.text for piece in update.pieces)

    def _table(self, update: Update) -> dict[str, Any] | None:
        """The log-probabilities of the tokens of an update, after those of the prompt in the first one."""
        if self._logprobs is None:
            return None
        tokens, scores = list(update.tokens), [*update.prompt_logprobs, *update.logprobs]
        if update.prompt_logprobs:
            tokens = [*self._prompt, *tokens]
        tops: list[Top | None] = [*update.prompt_top, *update.top] or [[] for _ in tokens]
        words = [self._word(token) for token in tokens]
        offsets = []
        for number, token in enumerate(tokens):
            offsets.append(self._offset)
            in_answer = number >= len(update.prompt_logprobs)  # whose text has no special tokens
            added = number == 0 and not in_answer and not self._begins.startswith(words[0])  # as <s> by a tokenizer
            self._offset += self._length(token, without_special=in_answer or added)
        return {
            "tokens": words,
            "token_logprobs": [None if score is None else max(score, LEAST_LOGPROB) for score in scores],
            "top_logprobs": [
                None if score is None else self._most_likely(word, score, top or [])
                for word, score, top in zip(words, scores, tops)
            ],
            "text_offset": offsets,
        }

    def _length(self, token: int, without_special: bool) -> int:
        """How many characters are whole with a token."""
        if not self._tokenizer.decode([token], skip_special_tokens=without_special):
            return 0
        return len(self._characters.decode(self._tokenizer.token_bytes(token)))

    def _most_likely(self, word: str, score: float, top: Top) -> dict[str, float]:
        """The most likely tokens, and the one that is there."""
        table = {self._word(token): max(logprob, LEAST_LOGPROB) for token, logprob in top}
        return {**table, word: max(score, LEAST_LOGPROB)}

    def _word(self, token: int) -> str:
        content = self._tokenizer.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:  # a part of a character, as OpenAI shows it
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
