"""expert_loads.jsonl: small however long a run is, with no step twice."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from tandem.training.logs.expert_loads import EXPERT_LOADS, MOST_LINES, ExpertLoadsFile, merged, read_expert_loads


def counts_of(iteration: int) -> dict[int, np.ndarray]:
    return {0: np.array([iteration, 0, 1]), 3: np.array([0, 2 * iteration, 5])}


def filled(path: Path, steps: int) -> None:
    file = ExpertLoadsFile(path, 0)
    for iteration in range(1, steps + 1):
        file.add(iteration, counts_of(iteration))


def test_a_long_run_has_a_small_file_that_leaves_no_step_out(tmp_path: Path) -> None:
    path, steps = tmp_path / EXPERT_LOADS, 3 * MOST_LINES
    filled(path, steps)
    lines = read_expert_loads(path)
    assert len(lines) < MOST_LINES
    assert (lines[0].first, lines[-1].iteration) == (1, steps)
    assert all(before.iteration + 1 == after.first for before, after in itertools.pairwise(lines))
    for line in lines:
        taken = range(line.first, line.iteration + 1)
        assert line.steps == len(taken) <= 3 * steps / MOST_LINES * 2
        assert {layer: of.tolist() for layer, of in line.counts.items()} == {
            layer: sum(counts_of(iteration)[layer] for iteration in taken).tolist() for layer in (0, 3)
        }
    assert len(merged(lines, 10)) <= 10


def test_a_resumed_run_begins_after_its_checkpoint(tmp_path: Path) -> None:
    """Steps that were not saved are taken again. A half line, which a kill leaves, goes away."""
    path = tmp_path / EXPERT_LOADS
    filled(path, 5)
    path.write_bytes(path.read_bytes() + b'{"iteration": 6, "fir')
    file = ExpertLoadsFile(path, 3)
    file.add(4, counts_of(40))
    assert [(line.iteration, int(line.counts[0][0])) for line in read_expert_loads(path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_a_run_that_saves_nothing_writes_nothing(tmp_path: Path) -> None:
    ExpertLoadsFile(None, 0).add(1, counts_of(1))
    assert read_expert_loads(tmp_path / EXPERT_LOADS) == []
