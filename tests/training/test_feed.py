"""Batches that are read ahead: the same ones in the same order, and errors in their turn."""

from __future__ import annotations

import dataclasses
import importlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import assert_same_weights, run
from tandem.data.batch import MicroBatch, Sample
from tandem.data.datasets.dataset import Dataset
from tandem.errors import UserError
from tandem.training.feed import Feed, Share
from workspace import Workspace

SHARE = Share(micro_batch_size=2, data_size=2, data_rank=1)


class Slow(Dataset):
    """Samples whose tokens are their number. It remembers an epoch of four, as packed conversations do.

    Attributes:
        threads: in which each sample was read.
    """

    def __init__(self, bad: int | None = None) -> None:
        self._bad, self._epoch = bad, 0
        self.threads: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> Sample:
        self.threads.append((i, threading.current_thread().name))
        self._remember(i)
        if i == self._bad:
            raise UserError(f"train.jsonl:{i}: the answer is empty")
        tokens = np.full(3, 4 * self._epoch + i % 4, np.int32)
        return Sample(tokens, tokens, np.arange(3, dtype=np.int32), (3,))

    def _remember(self, i: int) -> None:
        self._epoch = i // 4
        time.sleep(0.01)

    def origin(self, i: int) -> str:
        self._remember(i)
        return f"epoch {self._epoch}"

    def describe(self) -> dict[str, int]:
        return {}


def first_tokens(batches: list[MicroBatch]) -> list[int]:
    return [int(batch.tokens[start]) for batch in batches for start in batch.cu_seqlens[:-1]]


def steps(feed: Feed, dataset: Slow, count: int) -> list[list[int]]:
    taken = []
    for number in range(count):
        taken.append(first_tokens(feed.take(8 * number, 8)))
        feed.begin(8 * number + 8, 8)
        assert feed.origin(0) == "epoch 0"  # asked while another epoch is read
    return taken


def test_the_same_batches_in_the_same_order() -> None:
    ahead, at_once = Slow(), Slow()
    with Feed(at_once, SHARE, ahead=False) as feed:
        expected = steps(feed, at_once, 5)
    with Feed(ahead, SHARE, ahead=True) as feed:
        assert steps(feed, ahead, 5) == expected
    assert expected[:2] == [[2, 3, 6, 7], [10, 11, 14, 15]]
    assert {name for _, name in at_once.threads} == {"MainThread"}
    assert {name for sample, name in ahead.threads if sample < 8} == {"MainThread"}  # nothing was ahead of the first
    assert {name for sample, name in ahead.threads if sample >= 8} == {"tandem-feed_0"}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tandem-feed")]


def test_other_samples_than_those_that_were_read_ahead() -> None:
    """As after a change of the batch size."""
    with Feed(Slow(), SHARE, ahead=True) as feed:
        feed.begin(8, 8)
        assert first_tokens(feed.take(8, 4)) == [10, 11]
        feed.begin(12, 4)
        assert first_tokens(feed.take(12, 4)) == [14, 15]


def test_an_error_comes_when_its_step_does_and_no_sooner() -> None:
    with Feed(Slow(bad=10), SHARE, ahead=True) as feed:
        assert first_tokens(feed.take(0, 8)) == [2, 3, 6, 7]
        feed.begin(8, 8)
        time.sleep(0.1)
        with pytest.raises(UserError, match=r"^train\.jsonl:10: the answer is empty$"):
            feed.take(8, 8)
    with Feed(Slow(bad=10), SHARE, ahead=True) as feed:  # a run that ends before that step never hears of it
        feed.take(0, 8)
        feed.begin(8, 8)


@pytest.fixture
def reading_ahead(framework: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The CPU reads ahead, as accelerators do. The function says which threads have read steps since its last call."""
    sets: Any = importlib.import_module(f"tandem.backends.{framework}.compute.sets")
    table = dataclasses.replace(sets.CPU, reads_ahead=True)
    monkeypatch.setitem(sets.KERNELS if framework == "torch" else sets._KERNELS, "cpu", table)
    threads: list[str] = []
    read = Feed._read

    def watched(self: Feed, start: int, count: int) -> list[MicroBatch]:
        threads.append(threading.current_thread().name)
        return read(self, start, count)

    monkeypatch.setattr(Feed, "_read", watched)

    def since() -> list[str]:
        seen = threads.copy()
        threads.clear()
        return seen

    return since


@pytest.mark.parametrize("instructions", [True, pytest.param(False, marks=pytest.mark.slow("jobs"))])
def test_runs_that_read_ahead_end_with_the_same_bits(
    instructions: bool,
    workspace: Workspace,
    framework: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """A whole run that does not, and one that does, stopped and resumed."""
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    values = {"instructions": instructions, "global_batch_size": 8, "micro_batch_size": 2, "train_iters": 8}
    expected = run(workspace, framework, save=one, **values)
    since: Callable[[], list[str]] = request.getfixturevalue("reading_ahead")
    losses = run(workspace, framework, save=other, exit_interval=3, **values)
    assert since() == ["MainThread", *["tandem-feed_0"] * 3]  # the fourth step is read, and left
    losses += run(workspace, framework, load=other, save=other, **values)
    assert since() == ["MainThread", *["tandem-feed_0"] * 4]  # from the fourth step; none after the last
    assert losses == expected
    assert_same_weights(tmp_path / "one", tmp_path / "other")
