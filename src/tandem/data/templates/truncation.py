"""Cutting a conversation to a token budget, turn by turn, as upstream does; but a prompt keeps its end, which begins
the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class TurnLengths(NamedTuple):
    """Tokens of a turn. The source's last ones are the `header` of the answer."""

    source: int
    target: int
    header: int


def header_length(source: np.ndarray, beginning: Sequence[int]) -> int:
    """Tokens of a prompt [t] from the last place on where the `beginning` of a header stands; 0 where it does not."""
    if not beginning:
        return 0
    for place in np.flatnonzero(source == beginning[0])[::-1].tolist():
        if source[place : place + len(beginning)].tolist() == list(beginning):
            return len(source) - place
    return 0


def kept_tokens(turns: Sequence[TurnLengths], cutoff_len: int) -> tuple[np.ndarray, bool]:
    """Which tokens of a conversation remain, bool [t], at most `cutoff_len`; and whether a prompt lost some whose
    answer remains.

    The budgets are upstream's, but a header goes before its answer. A later turn that has no room for a header and a
    token more is left out; of the first one something always remains.
    """
    keep = np.zeros(sum(turn.source + turn.target for turn in turns), bool)
    begin, cuts_prompt = 0, False
    room = cutoff_len
    for turn, (source_kept, target_kept) in zip(turns, turn_budgets(turns, cutoff_len)):
        header = turn.header
        if target_kept and source_kept < header:
            if header < room:
                source_kept, target_kept = header, min(target_kept, room - header)
            elif begin:
                break
        header = min(header, source_kept)
        answer = begin + turn.source
        keep[begin : begin + source_kept - header] = True
        keep[answer - header : answer + target_kept] = True
        cuts_prompt |= source_kept < turn.source and target_kept > 0
        room -= source_kept + target_kept
        begin = answer + turn.target
    return keep, cuts_prompt


def infer_seqlen(source_len: int, target_len: int, cutoff_len: int) -> tuple[int, int]:
    """Tokens of the source and of the target that are kept of one turn when both may have `cutoff_len`.

    A short target (under half the budget) is kept whole and the source cut; else a short source is kept whole and the
    target cut; else both are cut in proportion. Source: `_infer_seqlen` of MindSpeed-LLM, from LLaMA-Factory.
    """
    if target_len * 2 < cutoff_len:
        target_budget = cutoff_len
    elif source_len * 2 < cutoff_len:
        target_budget = cutoff_len - source_len
    else:
        target_budget = int(cutoff_len * (target_len / (source_len + target_len)))
    kept_target = min(target_budget, target_len)
    return min(max(cutoff_len - kept_target, 0), source_len), kept_target


def turn_budgets(turns: Sequence[TurnLengths], cutoff_len: int) -> list[tuple[int, int]]:
    """Kept (source, target) lengths of each turn of a conversation, whose sum is at most `cutoff_len`.

    Earlier turns are served first; turns that begin beyond the budget are left out of the list.
    """
    kept: list[tuple[int, int]] = []
    total = 0
    for source_len, target_len, _ in turns:
        if total >= cutoff_len:
            break
        kept.append(infer_seqlen(source_len, target_len, cutoff_len - total))
        total += sum(kept[-1])
    return kept
