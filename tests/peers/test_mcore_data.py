"""Megatron-core's data classes read what is written here and give the same samples, and what they write is read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from mcore_data import EOD, FLAGS, SEED, SEQUENCE, SPLIT, corpus, megatron_datasets

from tandem.data.batch import IGNORE, Sample
from tandem.data.datasets.blend import BlendedDataset, Segment, blend_sizes
from tandem.data.datasets.sample_index import SPLIT_NAMES
from tandem.data.datasets.text import GPTDataset
from tandem.data.indexed import IndexedDataset, IndexedWriter

SEQUENCES = [[1, 2, 3], [4], [65000], [5, 6], [7, 8, 9]]
DOCUMENTS = [SEQUENCES[:2], [], SEQUENCES[2:3], SEQUENCES[3:]]
DTYPES = ["uint16", "int32", "int64"]


@pytest.fixture
def indexed(megatron: ModuleType) -> ModuleType:
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def write(prefix: Path, dtype: str) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in DOCUMENTS:
            writer.add_document([*chain.from_iterable(sequences)], [len(sequence) for sequence in sequences])
    return prefix


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_our_files(indexed: ModuleType, dtype: str, tmp_path: Path) -> None:
    dataset = indexed.IndexedDataset(str(write(tmp_path / "x", dtype)))
    assert [sequence.tolist() for sequence in dataset] == SEQUENCES
    assert {sequence.dtype for sequence in dataset} == {np.dtype(dtype)}
    assert dataset.document_indices.tolist() == [0, 2, 2, 3, 5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatrons_files_are_read_and_are_ours(indexed: ModuleType, dtype: str, tmp_path: Path) -> None:
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "x.bin"), np.dtype(dtype).type)
    for sequences in DOCUMENTS:
        builder.add_document([*chain.from_iterable(sequences)], [len(sequence) for sequence in sequences])
    builder.finalize(str(tmp_path / "x.idx"))
    dataset = IndexedDataset(tmp_path / "x")
    assert [sequence.tolist() for sequence in dataset] == SEQUENCES
    assert dataset.document_indices.tolist() == [0, 2, 2, 3, 5]
    ours = write(tmp_path / "ours", dtype)
    for kind in (".bin", ".idx"):
        assert Path(f"{ours}{kind}").read_bytes() == (tmp_path / f"x{kind}").read_bytes()


def assert_same_samples(ours: Sequence[Sample], theirs: Sequence[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        sample, other = ours[i], theirs[i]
        np.testing.assert_array_equal(sample.tokens, other["tokens"])
        np.testing.assert_array_equal(sample.position_ids, other["position_ids"])
        np.testing.assert_array_equal(sample.labels, np.where(other["loss_mask"] > 0, other["labels"], IGNORE))
        document = np.repeat(np.arange(len(sample.lengths)), sample.lengths)
        hidden = ~np.tril(document[:, None] == document)
        np.testing.assert_array_equal(hidden, other["attention_mask"][0])


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "reset"])
def test_every_sample_is_megatrons(megatron: ModuleType, flags: bool, tmp_path: Path) -> None:
    """Of every split; of one epoch and of several, the last shuffled apart or not."""
    prefix, sizes = corpus(tmp_path / "x", 150, 1000), [450, 20, 40]
    for name, size, theirs in zip(SPLIT_NAMES, sizes, megatron_datasets([prefix], sizes, flags=flags)):
        ours = GPTDataset(prefix, name, SPLIT, size, SEQUENCE, SEED, EOD, **dict.fromkeys(FLAGS, flags))
        assert_same_samples(ours, theirs)


def test_every_sample_of_a_blend_is_megatrons(megatron: ModuleType, tmp_path: Path) -> None:
    weights, sizes = [0.3, 0.7], [300, 20, 10]
    prefixes = [corpus(tmp_path / name, 100, 1000, seed) for seed, name in enumerate("ab")]
    for name, size, theirs in zip(SPLIT_NAMES, sizes, megatron_datasets(prefixes, sizes, weights)):
        parts, length = blend_sizes(weights, size)
        datasets = [GPTDataset(prefix, name, SPLIT, part, SEQUENCE, SEED) for prefix, part in zip(prefixes, parts)]
        assert_same_samples(BlendedDataset(datasets, [Segment(0, tuple(weights))], length), theirs)
