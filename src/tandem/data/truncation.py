"""Cutting a conversation to a token budget, turn by turn, as upstream does."""

from __future__ import annotations

from collections.abc import Sequence


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


def turn_budgets(turns: Sequence[tuple[int, int]], cutoff_len: int) -> list[tuple[int, int]]:
    """Kept (source, target) lengths of each turn of a conversation, whose sum is at most `cutoff_len`.

    Earlier turns are served first; turns that begin beyond the budget are left out of the list.
    """
    kept: list[tuple[int, int]] = []
    total = 0
    for source_len, target_len in turns:
        if total >= cutoff_len:
            break
        kept.append(infer_seqlen(source_len, target_len, cutoff_len - total))
        total += sum(kept[-1])
    return kept
