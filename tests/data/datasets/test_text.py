"""Pretraining samples: equality with Megatron-core's own indices and samples, and the flags."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tandem.data.batch import IGNORE
from tandem.data.datasets.sample_index import SPLIT_NAMES, build_sample_index, split_range
from tandem.data.datasets.text import GPTDataset
from tandem.data.indexed import IndexedDataset, IndexedWriter
from tandem.errors import UserError

EOD = 1002
RESET = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}


@pytest.mark.parametrize("split_name", SPLIT_NAMES)
@pytest.mark.parametrize(("case", "flags"), [("one_epoch", {}), ("multi_epoch_sep", {}), ("reset_eod", RESET)])
def test_indices_and_samples_equal_megatrons(case: str, flags: dict, split_name: str, shared_data: Path) -> None:
    golden = shared_data / "golden/gpt_dataset"
    settings = json.loads((golden / f"{case}.json").read_text())
    arrays = np.load(golden / f"{case}.npz")
    num_samples = settings["sizes"][SPLIT_NAMES.index(split_name)]
    prefix = golden / "small200_text_document"
    dataset = GPTDataset(prefix, split_name, settings["split"], num_samples, settings["seq"], 1234, EOD, **flags)

    assert len(dataset) == settings[split_name]["len"]
    for name in ("document_index", "sample_index", "shuffle_index"):
        ours, theirs = getattr(dataset.index, name), arrays[f"{split_name}_{name}"]
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    for row, i in enumerate(settings[split_name]["sample_ids"]):
        sample = dataset[i]
        trained = arrays[f"{split_name}_loss_mask"][row] > 0
        np.testing.assert_array_equal(sample.tokens, arrays[f"{split_name}_tokens"][row])
        np.testing.assert_array_equal(sample.position_ids, arrays[f"{split_name}_position_ids"][row])
        expected = np.where(trained, arrays[f"{split_name}_labels"][row], IGNORE)
        np.testing.assert_array_equal(sample.labels, expected)
        assert sum(sample.lengths) == len(sample.tokens)


def documents(prefix: Path, *tokens: list[int]) -> Path:
    with IndexedWriter(prefix) as writer:
        for document in tokens:
            writer.add_document(document)
    return prefix


def test_flags_on_a_stream_that_can_be_read_by_eye(tmp_path: Path) -> None:
    prefix = documents(tmp_path / "x", [5, 6, 0, 7, 0, 8, 9])  # 0 ends a document
    plain = GPTDataset(prefix, "train", "1", None, 6, seed=0)[0]
    assert plain.tokens.tolist() == [5, 6, 0, 7, 0, 8]
    assert plain.labels.tolist() == [6, 0, 7, 0, 8, 9]
    assert plain.position_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert plain.lengths == (6,)
    reset = GPTDataset(prefix, "train", "1", None, 6, seed=0, eod_token=0, **RESET)[0]
    assert reset.lengths == (3, 2, 1)
    assert reset.position_ids.tolist() == [0, 1, 2, 0, 1, 0]
    assert reset.labels.tolist() == [6, 0, IGNORE, 0, IGNORE, 9]


def test_every_token_is_predicted_once_an_epoch(tmp_path: Path) -> None:
    random = np.random.RandomState(3)
    lengths = random.randint(1, 20, 50)
    edges = np.cumsum([0, *lengths])
    prefix = documents(tmp_path / "x", *(list(range(a, b)) for a, b in pairwise(edges)))
    dataset = GPTDataset(prefix, "train", "1", None, 7, seed=5, drop_last_partial_sequence=False)
    labels = np.concatenate([dataset[i].labels for i in range(len(dataset))])
    first = IndexedDataset(prefix)[int(dataset.index.document_index[0])][0]
    assert sorted(labels) == sorted(set(range(edges[-1])) - {first})  # the very first token has nothing before it
    assert (
        sorted(len(dataset[i].tokens) for i in range(len(dataset)))[0] == (edges[-1] - 1) % 7
        or (edges[-1] - 1) % 7 == 0
    )


def test_without_extra_token_the_last_position_has_no_label(tmp_path: Path) -> None:
    prefix = documents(tmp_path / "x", [1, 2, 3, 4, 5, 6])
    dataset = GPTDataset(prefix, "train", "1", None, 3, seed=0, add_extra_token_to_sequence=False)
    assert len(dataset) == 2
    assert sorted(dataset[i].tokens.tolist() for i in range(2)) == [[1, 2, 3], [4, 5, 6]]
    assert all(dataset[i].labels[-1] == IGNORE for i in range(2))


def test_a_million_documents_are_indexed_in_seconds() -> None:
    import time

    lengths = np.random.RandomState(0).randint(1, 2000, 1_000_000).astype(np.int32)
    start = time.perf_counter()
    index = build_sample_index(lengths, 0, int(lengths.sum(dtype=np.int64)) // 4096 * 2 - 5, 4096, 1234)
    assert time.perf_counter() - start < 5
    assert index.epochs == 2


def test_splits() -> None:
    assert [split_range("98,1,1", name, 200) for name in SPLIT_NAMES] == [range(196), range(196, 198), range(198, 200)]
    assert split_range("1,0,0", "valid", 10) == range(0)
    assert split_range("100", "train", 7) == range(7)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2,0"])
def test_bad_splits_are_refused(split: str) -> None:
    with pytest.raises(UserError, match="expected one to three numbers"):
        split_range(split, "train", 10)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    prefix = documents(tmp_path / "x", [1, 2, 3])
    with pytest.raises(UserError, match="1 sequences with 3 tokens give no sample of 3 \\+ 1 tokens"):
        GPTDataset(prefix, "train", "1", None, 3, seed=0)
    with pytest.raises(UserError, match="0 sequences"):
        GPTDataset(prefix, "valid", "1,0,0", None, 3, seed=0)
    with pytest.raises(UserError, match="1 sequences with 0 tokens give no sample"):
        GPTDataset(documents(tmp_path / "empty", []), "train", "1", None, 3, seed=0)
    with pytest.raises(UserError, match="give --tokenizer-name-or-path"):
        GPTDataset(prefix, "train", "1", None, 2, seed=0, reset_attention_mask=True)
    with pytest.raises(UserError, match="did you mean 'train'"):
        GPTDataset(prefix, "trian", "1", None, 2, seed=0)
