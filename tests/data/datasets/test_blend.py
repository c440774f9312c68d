"""The weighted blend: equality with Megatron's own, and extreme weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data.datasets.blend import (
    BlendedDataset,
    ChainedDataset,
    Segment,
    blend_indices,
    blend_sizes,
    parse_blend,
    segment_indices,
)
from tandem.data.datasets.sample_index import SPLIT_NAMES
from tandem.data.datasets.text import GPTDataset
from tandem.errors import UserError

WEIGHTS = [0.3, 0.7]


@pytest.mark.parametrize("split_name", SPLIT_NAMES)
def test_blend_equals_megatrons(split_name: str, shared_data: Path) -> None:
    golden = shared_data / "golden/gpt_dataset"
    facts = json.loads((golden / "blend_weights.json").read_text())
    arrays = np.load(golden / "blend_weights.npz")
    samples = facts["sizes"][SPLIT_NAMES.index(split_name)]
    sizes, length = blend_sizes(WEIGHTS, samples)
    datasets = [
        GPTDataset(golden / f"{name}_text_document", split_name, facts["split"], size, facts["seq"], 1234)
        for name, size in zip(("small200", "small120"), sizes)
    ]
    blend = BlendedDataset(datasets, [Segment(0, tuple(WEIGHTS))], length)
    assert len(blend) == facts[split_name]["len"]
    np.testing.assert_array_equal(blend.dataset_index, arrays[f"{split_name}_dataset_index"])
    np.testing.assert_array_equal(blend.dataset_sample_index, arrays[f"{split_name}_dataset_sample_index"])
    for row, i in enumerate(facts[split_name]["sample_ids"]):
        np.testing.assert_array_equal(blend[i].tokens, arrays[f"{split_name}_tokens"][row])
        np.testing.assert_array_equal(blend[i].labels, arrays[f"{split_name}_labels"][row])


def one_by_one(weights: list[float], size: int) -> list[int]:
    shares = [weight / sum(weights) for weight in weights]
    counts, chosen = [0] * len(shares), []
    for i in range(size):
        lags = [share * max(i, 1) - count for share, count in zip(shares, counts)]
        chosen.append(lags.index(max(lags)))
        counts[chosen[-1]] += 1
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.one_of(st.floats(1e-6, 1), st.sampled_from([0.1, 0.25, 0.5, 1.0])), min_size=1, max_size=6),
    size=st.integers(1, 3000),
)
def test_side_by_side_equals_one_by_one(weights: list[float], size: int) -> None:
    dataset_index, sample_index = blend_indices(weights, size)
    assert dataset_index.tolist() == one_by_one(weights, size)
    for dataset in range(len(weights)):
        numbers = sample_index[dataset_index == dataset]
        assert numbers.tolist() == list(range(len(numbers)))


def test_extreme_weights_and_tiny_sets() -> None:
    dataset_index, sample_index = blend_indices([0.001, 0.999], 2000)
    assert np.bincount(dataset_index).tolist() == [2, 1998]
    assert sample_index[dataset_index == 1].tolist() == list(range(1998))
    with pytest.raises(UserError, match="dataset 0 of the blend has 0 samples, but its share is 1"):
        BlendedDataset([[], [1, 2]], [Segment(0, (0.5, 0.5))], 2)  # type: ignore[list-item]
    for weights in ([], [0.0, 1.0], [-1.0, 2.0], [float("nan"), 1.0]):
        with pytest.raises(UserError, match="expected a positive number for each dataset"):
            blend_indices(weights, 1)


def test_each_segment_goes_on_where_a_dataset_was_left() -> None:
    segments = [Segment(0, (0.5, 0.5, 0.0)), Segment(10, (0.9, 0.0, 0.1)), Segment(40, (0.2, 0.8, 0.0))]
    dataset_index, sample_index = segment_indices(segments, 100)
    for dataset in range(3):
        numbers = sample_index[dataset_index == dataset]
        assert numbers.tolist() == list(range(len(numbers)))
    assert np.bincount(dataset_index[:10]).tolist() == [5, 5]
    assert np.bincount(dataset_index[10:40]).tolist() == [27, 0, 3]
    assert np.bincount(dataset_index[40:]).tolist() == [12, 48]


def test_chained_datasets() -> None:
    chain = ChainedDataset([[1, 2], [], [3]])  # type: ignore[list-item]
    assert [chain[i] for i in range(len(chain))] == [1, 2, 3]


def test_data_path_is_one_prefix_several_or_weights_and_prefixes() -> None:
    assert parse_blend(["a"]) == (["a"], None)
    assert parse_blend(["a", "b"]) == (["a", "b"], None)
    assert parse_blend(["0.3", "a", "7", "b"]) == (["a", "b"], [0.3, 7.0])
    for words in (["0.3", "a", "b"], ["a", "0.7"], ["0.3", "0.7"]):
        with pytest.raises(UserError, match="expected a prefix, found"):
            parse_blend(words)
    with pytest.raises(UserError, match="--data-path is required"):
        parse_blend([])
