"""Packing: upstream's rows, nothing lost, fast and full."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.packing import greedy_knapsack


def upstream_rows(lengths: list[int], capacity: int) -> list[list[int]]:
    """Upstream's rule, done the slow way: lengths of each row."""
    remaining, rows = sorted(lengths), []
    while remaining:
        row, room = [], capacity
        while fitting := [length for length in remaining if length <= room]:
            row.append(fitting[-1])
            remaining.remove(fitting[-1])
            room -= fitting[-1]
        rows.append(row)
    return rows


@given(st.lists(st.integers(1, 50), max_size=40))
def test_rows_are_upstreams_and_nothing_is_lost(lengths: list[int]) -> None:
    rows = greedy_knapsack(lengths, 50)
    assert [[lengths[i] for i in row] for row in rows] == upstream_rows(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))


def test_equal_lengths_leave_last_in_first_out() -> None:
    assert greedy_knapsack([5, 5, 5], 10) == [[2, 1], [0]]


def test_a_hundred_thousand_samples_pack_quickly_and_full() -> None:
    lengths = np.clip(np.random.RandomState(0).lognormal(5.5, 1.0, 100_000).astype(int), 1, 4095).tolist()
    start = time.perf_counter()
    rows = greedy_knapsack(lengths, 4095)
    assert time.perf_counter() - start < 5
    assert sum(lengths) / (4096 * len(rows)) > 0.97
    assert sum(map(len, rows)) == 100_000
