"""`expert_loads.jsonl`: how many tokens each expert of each layer got, over the logged steps of a run.

A line has the sums of one or more logged steps. When there are `MOST_LINES`, neighbours become one line, and at most
half as many are left. So the file stays small however long a run is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tandem.files.jsonl import append_line, read_json_lines, remove_damaged
from tandem.files.publish import write_lines_atomically

EXPERT_LOADS = "expert_loads.jsonl"
IDENTITY = ("iteration", int)  # what every line has
MOST_LINES = 256


@dataclass(frozen=True)
class Loads:
    """The loads of logged steps, summed.

    Attributes:
        first, iteration: the first and the last of these steps.
        steps: how many they are.
        counts: layer -> tokens of each expert, int64 [E].
    """

    first: int
    iteration: int
    steps: int
    counts: dict[int, np.ndarray]

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Loads:
        counts = {layer: np.asarray(of_experts, np.int64) for layer, of_experts in line["tokens"]}
        return cls(line["first"], line["iteration"], line["steps"], counts)

    def to_json(self) -> dict[str, Any]:
        tokens = [[layer, of_experts.tolist()] for layer, of_experts in self.counts.items()]
        return {"iteration": self.iteration, "first": self.first, "steps": self.steps, "tokens": tokens}


class ExpertLoadsFile:
    """Adds the load of each logged step.

    Args:
        path: None writes nothing.
        iteration: the last finished iteration. Lines that hold a later step are removed first.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, iteration: int) -> None:
        self._path = path
        self._lines: list[Loads] = []
        if path is not None and path.exists():
            remove_damaged(path, *IDENTITY)
            self._lines = [loads for loads in read_expert_loads(path) if loads.iteration <= iteration]
            self._rewrite()

    def add(self, iteration: int, counts: Mapping[int, np.ndarray]) -> None:
        if self._path is None:
            return
        self._lines.append(Loads(iteration, iteration, 1, dict(counts)))
        if len(self._lines) >= MOST_LINES:
            self._lines = merged(self._lines, MOST_LINES // 2)
            self._rewrite()
        else:
            with FileIO(self._path, "a") as file:
                append_line(file, self._lines[-1].to_json())

    def _rewrite(self) -> None:
        assert self._path is not None
        lines = (orjson.dumps(loads.to_json(), option=orjson.OPT_APPEND_NEWLINE) for loads in self._lines)
        write_lines_atomically(self._path, lines)


def merged(loads: Sequence[Loads], most: int) -> list[Loads]:
    """The same loads in at most `most` lines, of about as many steps each: neighbours are summed."""
    enough = -(-sum(line.steps for line in loads) // most)
    groups: list[list[Loads]] = []
    for line in loads:
        if not groups or sum(other.steps for other in groups[-1]) >= enough:
            groups.append([])
        groups[-1].append(line)
    return [
        Loads(
            group[0].first,
            group[-1].iteration,
            sum(line.steps for line in group),
            {layer: sum(line.counts[layer] for line in group[1:]) + of for layer, of in group[0].counts.items()},
        )
        for group in groups
    ]


def read_expert_loads(path: Path) -> list[Loads]:
    """The lines of the file, oldest first; none where there is no file."""
    if not path.exists() or not path.stat().st_size:
        return []
    return [Loads.from_json(line) for line in read_json_lines(path, *IDENTITY)]
