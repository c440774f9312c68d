"""Blocks of rows give, one below the other, what the whole gives."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tandem.models.tensors import COLUMN, GATE_UP, REPLICATED, ROW, TensorSpec
from tandem.parallel.layout import part_of
from tandem.parallel.slices import cut, cut_rows


@given(
    rows=st.integers(1, 12).map(lambda half: 2 * half),
    world=st.integers(1, 5),
    split=st.sampled_from([COLUMN, ROW, GATE_UP, REPLICATED]),
    step=st.integers(1, 9),
)
def test_blocks_of_rows_stack_to_the_part(rows: int, world: int, split: object, step: int) -> None:
    tensor = np.arange(rows * 7).reshape(rows, 7)
    for rank in range(world):
        part = part_of(TensorSpec("x", tensor.shape, split), world, rank)  # type: ignore[arg-type]
        blocks = [cut_rows(tensor[first : first + step], first, part) for first in range(0, rows, step)]
        np.testing.assert_array_equal(np.concatenate(blocks), cut(tensor, part))
