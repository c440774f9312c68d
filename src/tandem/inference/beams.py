"""Beam search, with the scores, the end and the length penalty of transformers' (`num_beams`, no early stopping)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.backends.interface import Engine, Piece, Session
from tandem.inference.sampling import Sampling, candidates, log_probabilities, penalised

LENGTH_PENALTY = 1.0


@dataclass(frozen=True)
class _Beam:
    """A text that goes on. `score` is the sum of its tokens' log-probabilities."""

    sequence: int
    tokens: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class _Next:
    """A beam with one more token."""

    beam: int
    token: int
    score: float


def beam_search(
    engine: Engine, prompt: Sequence[int], sampling: Sampling, stop_ids: Collection[int], beams: int
) -> list[int]:
    """The tokens of the best answer, without the one that ends it. Ranks that do not lead get none.

    With a temperature above 0 the next tokens of all beams are drawn together, without repetition.

    Raises:
        UserError: there is not enough memory.
    """
    most = min(sampling.max_new_tokens, engine.config.max_position_embeddings - len(prompt))
    room = len(prompt) + most
    with engine.session(beams * room) as session:
        if not session.leads:
            session.follow()
            return []
        return _Search(session, prompt, sampling, stop_ids, beams, most).run(room)


class _Search:
    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        sampling: Sampling,
        stop_ids: Collection[int],
        beams: int,
        most_tokens: int,
    ) -> None:
        self._session, self._prompt, self._sampling = session, prompt, sampling
        self._stop_ids, self._beams, self._most_tokens = stop_ids, beams, most_tokens
        self._random = np.random.default_rng(sampling.seed)
        self._finished: list[tuple[float, tuple[int, ...]]] = []  # the best first

    def run(self, room: int) -> list[int]:
        running = [_Beam(self._session.begin(room), (), 0.0)]
        pieces = [Piece(running[0].sequence, self._prompt, [len(self._prompt) - 1])]
        for length in range(1, self._most_tokens + 1):
            rows = [row.copy() for row in self._session.step(pieces)]
            chosen = self._choose(running, rows)
            ends = [next_.token in self._stop_ids or length == self._most_tokens for next_ in chosen]
            self._finish(running, [next_ for next_, end in zip(chosen[: self._beams], ends) if end], length)
            going = [next_ for next_, end in zip(chosen, ends) if not end][: self._beams]
            if not going or self._cannot_improve(going[0].score, length):
                break
            running = self._advance(running, going)
            pieces = [Piece(beam.sequence, beam.tokens[-1:], [0]) for beam in running]
        return list(self._finished[0][1])

    def _choose(self, running: Sequence[_Beam], rows: Sequence[np.ndarray]) -> list[_Next]:
        """The best next tokens over all beams, or some that are drawn, the best first."""
        found: list[_Next] = []
        for number, (beam, logits) in enumerate(zip(running, rows)):
            scores = log_probabilities(logits)
            if self._sampling.repetition_penalty != 1:
                seen = sorted({*self._prompt, *beam.tokens})
                scores = penalised(scores, seen, self._sampling.repetition_penalty)
            found += self._of_beam(number, beam, scores)
        if self._sampling.temperature:
            values = np.array([next_.score for next_ in found])
            # The largest of each score plus Gumbel noise are draws without repetition (arXiv 1903.06059).
            noise = self._random.gumbel(size=len(found))
            kept = np.argsort(-(values + noise), kind="stable")[: self._count]
            found = [found[place] for place in kept]
        return sorted(found, key=lambda next_: -next_.score)[: self._count]

    @property
    def _count(self) -> int:
        """So many that as many beams as before go on even where the others end."""
        return max(2, 1 + len(self._stop_ids)) * self._beams

    def _of_beam(self, number: int, beam: _Beam, scores: np.ndarray) -> list[_Next]:
        if self._sampling.temperature:
            tokens, _ = candidates(scores, self._sampling)
            values = scores[tokens] / np.float32(self._sampling.temperature)
        else:
            count = min(self._count, len(scores))
            tokens = np.sort(np.argpartition(scores, -count)[-count:])
            values = scores[tokens]
        return [_Next(number, int(token), beam.score + float(value)) for token, value in zip(tokens, values)]

    def _finish(self, running: Sequence[_Beam], ended: Sequence[_Next], length: int) -> None:
        for next_ in ended:
            tokens = running[next_.beam].tokens
            if next_.token not in self._stop_ids:
                tokens = (*tokens, next_.token)
            self._finished.append((next_.score / length**LENGTH_PENALTY, tokens))
        self._finished = sorted(self._finished, key=lambda pair: -pair[0])[: self._beams]

    def _cannot_improve(self, best_score: float, length: int) -> bool:
        return len(self._finished) == self._beams and best_score / length**LENGTH_PENALTY <= self._finished[-1][0]

    def _advance(self, running: Sequence[_Beam], going: Sequence[_Next]) -> list[_Beam]:
        """Give each beam that goes on a sequence of its own: that of its text so far, or a copy."""
        parents = {next_.beam for next_ in going}
        for number, beam in enumerate(running):
            if number not in parents:
                self._session.end(beam.sequence)
        beams = []
        for next_ in going:
            before = running[next_.beam]
            is_first = next_.beam in parents
            parents.discard(next_.beam)
            # Copies are made before the next step, so all of them are of the text so far.
            sequence = before.sequence if is_first else self._session.copy(before.sequence)
            beams.append(_Beam(sequence, (*before.tokens, next_.token), next_.score))
        return beams
