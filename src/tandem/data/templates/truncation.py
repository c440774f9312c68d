"""Cutting a conversation to a number of tokens, turn by turn, as upstream does.

Other than upstream, a prompt keeps its end: the header of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class TurnLengths(NamedTuple):
    """Numbers of tokens of a turn. The last `header` tokens of the source are the header of the answer."""

    source: int
    target: int
    header: int


def header_length(source: np.ndarray, beginning: Sequence[int]) -> int:
    """Number of tokens of the header with which a prompt [t] ends; 0 if there is none.

    The header starts at the last place where its `beginning` occurs.

    >>> header_length(np.array([1, 2, 9, 8, 3]), beginning=[9, 8])
    3
    """
    if not beginning:
        return 0
    for place in np.flatnonzero(source == beginning[0])[::-1].tolist():
        if source[place : place + len(beginning)].tolist() == list(beginning):
            return len(source) - place
    return 0


def kept_tokens(turns: Sequence[TurnLengths], cutoff_len: int) -> tuple[np.ndarray, bool]:
    """Which tokens of a conversation are kept, bool [t], and whether a prompt was cut whose answer is kept.

    At most `cutoff_len` tokens are kept. The budgets are upstream's, but an answer always keeps its header. A later
    turn without room for the header and one more token is left out. The first turn always keeps something.
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
    """How many tokens of a turn's source and target are kept, together at most `cutoff_len`.

    A target under half the budget is kept whole, and the source is cut. Else a source under half the budget is kept
    whole, and the target is cut. Else both are cut in proportion.

    >>> infer_seqlen(source_len=90, target_len=20, cutoff_len=64)
    (44, 20)

    Source: `_infer_seqlen` of MindSpeed-LLM, from LLaMA-Factory.
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
    """How many tokens of each turn's (source, target) are kept, together at most `cutoff_len`.

    Earlier turns come first. Turns for which nothing is left are not in the list.
    """
    kept: list[tuple[int, int]] = []
    total = 0
    for source_len, target_len, _ in turns:
        if total >= cutoff_len:
            break
        kept.append(infer_seqlen(source_len, target_len, cutoff_len - total))
        total += sum(kept[-1])
    return kept
