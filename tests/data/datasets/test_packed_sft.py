"""Fine-tuning samples packed at run time: nothing lost, nothing seen by its neighbour, any sample found at once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runs import open_data, with_epochs
from tandem.data.batch import Sample
from tandem.data.datasets.conversations import SFTDataset
from tandem.data.indexed import IndexedWriter
from tandem.data.kinds import CONVERSATIONS
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.tokens.tokenizer import Tokenizer
from workspace import Workspace

Document = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def write(folder: Path, lengths: list[int]) -> Path:
    """Sequences of these lengths, each of one token that no other has, trained but for the first."""
    writers = {key: IndexedWriter(f"{folder / 'x'}_packed_{key}_document") for key in CONVERSATIONS.keys}
    for number, length in enumerate(lengths):
        ids = np.full(length, number + 1)
        labels = np.where(np.arange(length) > 0, ids, -100)
        for key, values in zip(CONVERSATIONS.keys, (ids, np.ones(length), labels)):
            writers[key].add_document(values.astype(np.int32))
    for writer in writers.values():
        writer.publish()
    return folder / "x"


def documents(sample: Sample) -> list[Document]:
    edges = np.cumsum([0, *sample.lengths])
    columns = (sample.tokens, sample.labels, sample.position_ids)
    return [tuple(tuple(column[a:b].tolist()) for column in columns) for a, b in pairwise(edges)]  # type: ignore[misc]


def dataset(prefix: Path, samples: int | None, pack: bool = True, **changes: object) -> SFTDataset:
    return SFTDataset(prefix, "train", "1", samples, 20, seed=5, pack=pack, **changes)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=25))
def test_each_epoch_holds_each_sequence_once_as_a_document_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    prefix = write(tmp_path_factory.mktemp("x"), lengths)
    packed, plain = dataset(prefix, 1), dataset(prefix, 1, pack=False)
    rows = len(packed)
    three_epochs = dataset(prefix, 3 * rows)
    expected = Counter(document for i in range(len(plain)) for document in documents(plain[i]))
    for epoch in range(3):
        samples = [three_epochs[epoch * rows + i] for i in range(rows)]
        assert Counter(document for sample in samples for document in documents(sample)) == expected
        assert all(len(sample.tokens) <= 20 for sample in samples)
    assert three_epochs.describe()["samples_per_epoch"] == rows


def test_seeking_gives_what_going_through_gives(tmp_path: Path) -> None:
    prefix = write(tmp_path, [3, 5, 5, 5, 5, 9, 12, 12, 17, 2, 4] * 3)
    through = dataset(prefix, 60)
    samples = [through[i].tokens.tolist() for i in range(len(through))]
    for i in (len(through) - 1, 0, len(through) // 2):
        assert dataset(prefix, 60)[i].tokens.tolist() == samples[i]
    rows = len(dataset(prefix, 1))
    assert samples[:rows] != samples[rows : 2 * rows]  # another order, with other companions
    assert {tuple(sample) for sample in samples[:rows]} != {tuple(sample) for sample in samples[rows : 2 * rows]}
    still = dataset(prefix, 60, shuffle=False)
    assert still[0].tokens.tolist() == still[rows].tokens.tolist()


def test_the_setting_counts_rows_and_leaves_packed_data_alone(workspace: Workspace, tmp_path: Path) -> None:
    values = {"instructions": True, "seq_length": 128, "train_iters": None, "epochs": 2, "micro_batch_size": 1}
    packed = with_epochs(workspace.settings("torch", pack=True, global_batch_size=1, **values))
    plain = with_epochs(workspace.settings("torch", global_batch_size=1, **values))
    assert packed.training.length.samples < plain.training.length.samples / 2
    tokenizer = Tokenizer(workspace.hf)
    data = [open_data(run, tokenizer).train for run in (packed, plain)]
    seen = [
        Counter(document for i in range(run.training.length.samples) for document in documents(train[i]))
        for run, train in zip((packed, plain), data)
    ]
    assert seen[0] == seen[1]

    prefix = tmp_path / "neat"
    options = PreprocessOptions((str(workspace.questions),), str(prefix), str(workspace.hf), prompt_type="qwen3")
    preprocess(dataclasses.replace(options, pack=True, neat_pack=True, seq_length=128))
    ready = [workspace.settings("torch", pack=pack, data_path=str(prefix), **values) for pack in (True, False)]
    assert with_epochs(ready[0]).training.length.samples == with_epochs(ready[1]).training.length.samples
