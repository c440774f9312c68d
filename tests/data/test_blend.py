"""The weighted blend: equality with Megatron's own, and extreme weights (C8)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tandem.data.blend import BlendedDataset, blend_indices, blend_sizes, parse_blend
from tandem.data.gpt_dataset import GPTDataset
from tandem.data.sample_index import SPLIT_NAMES
from tandem.errors import UserError

WEIGHTS = [0.3, 0.7]


@pytest.mark.parametrize("split_name", SPLIT_NAMES)
def test_blend_equals_megatrons(split_name: str, shared_data: Path) -> None:
    golden = shared_data / "golden/gpt_dataset"
    settings = json.loads((golden / "blend_weights.json").read_text())
    arrays = np.load(golden / "blend_weights.npz")
    wanted = settings["sizes"][SPLIT_NAMES.index(split_name)]
    sizes, _ = blend_sizes(WEIGHTS, wanted)
    datasets = [
        GPTDataset(golden / f"{name}_text_document", split_name, settings["split"], size, settings["seq"], 1234)
        for name, size in zip(("small200", "small120"), sizes)
    ]
    blend = BlendedDataset(datasets, WEIGHTS, wanted)
    assert len(blend) == settings[split_name]["len"]
    np.testing.assert_array_equal(blend.dataset_index, arrays[f"{split_name}_dataset_index"])
    np.testing.assert_array_equal(blend.dataset_sample_index, arrays[f"{split_name}_dataset_sample_index"])
    for row, i in enumerate(settings[split_name]["sample_ids"]):
        np.testing.assert_array_equal(blend[i].tokens, arrays[f"{split_name}_tokens"][row])
        np.testing.assert_array_equal(blend[i].labels, arrays[f"{split_name}_labels"][row])


def test_c8_extreme_weights_and_tiny_sets() -> None:
    dataset_index, sample_index = blend_indices([0.001, 0.999], 2000)
    assert np.bincount(dataset_index).tolist() == [2, 1998]
    assert sample_index[dataset_index == 1].tolist() == list(range(1998))
    with pytest.raises(UserError, match="dataset 0 of the blend has 0 samples, but its share is 1"):
        BlendedDataset([[], [1, 2]], [0.5, 0.5], 2)  # type: ignore[list-item]
    for weights in ([], [0.0, 1.0], [-1.0, 2.0], [float("nan"), 1.0]):
        with pytest.raises(UserError, match="expected positive numbers"):
            blend_indices(weights, 1)


def test_data_path_is_one_prefix_several_or_weights_and_prefixes() -> None:
    assert parse_blend(["a"]) == (["a"], None)
    assert parse_blend(["a", "b"]) == (["a", "b"], None)
    assert parse_blend(["0.3", "a", "7", "b"]) == (["a", "b"], [0.3, 7.0])
    for words in (["0.3", "a", "b"], ["a", "0.7"], ["0.3", "0.7"]):
        with pytest.raises(UserError, match="stands where a prefix is expected"):
            parse_blend(words)
    with pytest.raises(UserError, match="--data-path is required"):
        parse_blend([])
