"""Kinds of data are told by their files, and each says what trains on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_toys import byte_tokenizer, write_jsonl
from tandem.data.handlers.registry import HANDLER_NAMES, LLAMA_FACTORY, make_handler
from tandem.data.indexed import IndexedDataset
from tandem.data.kinds import (
    CONVERSATIONS,
    KINDS,
    PREFERENCES,
    TEXT,
    UNPAIRED,
    Kind,
    dataset_of_pair,
    datasets_in_folder_of,
    kind_of,
)
from tandem.data.preprocess.cache import is_raw, preprocess_once
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import PreprocessSummary, kind_of_input, preprocess
from tandem.data.record import read_record
from tandem.data.statistics import DataView
from tandem.errors import UserError
from tandem.options import flag_of

RECORDS = {
    TEXT: {"text": "some text"},
    CONVERSATIONS: {"instruction": "Q", "output": "A"},
    PREFERENCES: {"instruction": "Q", "chosen": "good", "rejected": "bad"},
    UNPAIRED: {"instruction": "Q", "output": "A", "label": True},
}
NEEDED = {kind: {} if kind is TEXT else {"prompt_type": "qwen3"} for kind in KINDS}
# Of each option that some kind does not use, a value that is not the default; with what that value needs.
GIVEN = {
    "enable_thinking": {"enable_thinking": "true"},
    "eod_token": {"append_eod": True, "eod_token": "<|im_end|>"},
    "prompt_type": {"prompt_type": "qwen3"},
    "train_turns": {"train_turns": "last"},
    "seq_length": {"seq_length": 9},
    "over_long": {"over_long": "drop", "seq_length": 9},
    "pack": {"pack": True, "seq_length": 9},
    "neat_pack": {"neat_pack": True, "pack": True, "seq_length": 9},
    "append_eod": {"append_eod": True},
    "json_keys": {"json_keys": ("a", "b")},
    "pad_to_multiple_of": {"pad_to_multiple_of": 8},
}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def options(folder: Path, kind: Kind, **changes: object) -> PreprocessOptions:
    """Those with which a record of a kind is preprocessed as `folder / "x"`."""
    source = write_jsonl(folder / f"{kind.name}.jsonl", RECORDS[kind])
    values = {**NEEDED[kind], **changes}
    return PreprocessOptions((str(source),), str(folder / "x"), str(byte_tokenizer(folder / "tokenizer")), **values)  # type: ignore[arg-type]


def written(folder: Path, kind: Kind) -> PreprocessSummary:
    return preprocess(options(folder, kind))


@every_kind
def test_a_kind_is_recognised_by_its_files(kind: Kind, tmp_path: Path) -> None:
    assert kind_of_input(options(tmp_path, kind)) is kind
    summary = written(tmp_path, kind)
    (data_path,) = summary.data_paths
    assert kind_of(data_path) is kind
    assert DataView(data_path).kind is kind
    assert DataView(data_path).statistics().trained_tokens == summary.trained_tokens
    assert len(IndexedDataset(kind.first_pair(data_path))) == summary.sequences
    assert not is_raw(data_path)
    assert read_record(data_path) is not None
    assert set(summary.prefixes) == set(kind.keys or ("text",))
    assert kind_of(str(tmp_path / "absent")) is None


@every_kind
def test_one_of_several_files_names_the_whole(kind: Kind, tmp_path: Path) -> None:
    (data_path,) = written(tmp_path, kind).data_paths
    for key in kind.keys:
        pair = kind.pair(data_path, key)
        assert (kind_of(pair), dataset_of_pair(pair)) == (None, data_path)
    assert dataset_of_pair(data_path) is None


def test_each_json_key_of_text_is_a_dataset(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"a": "one", "b": "two"})
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    summary = preprocess(PreprocessOptions((str(source),), str(tmp_path / "x"), str(tokenizer), json_keys=("a", "b")))
    assert summary.data_paths == tuple(summary.prefixes.values())
    assert {kind_of(path) for path in summary.data_paths} == {TEXT}


@every_kind
def test_what_raw_files_become_is_named_as_data_path_takes_it(kind: Kind, tmp_path: Path) -> None:
    assert kind_of(preprocess_once(options(tmp_path, kind), None)) is kind


@every_kind
def test_datasets_in_the_folder_of_a_missing_one_are_listed(kind: Kind, tmp_path: Path) -> None:
    (data_path,) = written(tmp_path, kind).data_paths
    expected = f"; the folder has {data_path} (for `tandem {kind.command}`)" if kind.command else ""
    assert datasets_in_folder_of(tmp_path / "absent") == expected


@pytest.mark.parametrize(
    ("kind", "option"),
    [(kind, option) for kind in KINDS for option in kind.unused_by_preprocess],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_option_of_preprocessing_that_a_kind_does_not_use_is_refused(
    kind: Kind, option: str, tmp_path: Path
) -> None:
    named = flag_of(option) if len(GIVEN[option]) == 1 else r"\S+"  # or the option that it needs is named first
    users = r".*\b".join(other.name for other in KINDS if option not in other.unused_by_preprocess)
    with pytest.raises(UserError, match=rf"^{named} is for {users}.*, but \w+ reads {kind.name}; leave it out$"):
        preprocess(options(tmp_path, kind, **GIVEN[option]))


def test_every_option_that_some_kind_does_not_use_is_tried_here() -> None:
    assert {option for kind in KINDS for option in kind.unused_by_preprocess} == set(GIVEN)


def test_every_handler_says_its_kind() -> None:
    kinds = {name: make_handler(name).kind for name in HANDLER_NAMES if name != LLAMA_FACTORY}
    assert {name for name, kind in kinds.items() if kind is TEXT} == {n for n in kinds if n.endswith("PretrainHandler")}
    pairs = {name for name, kind in kinds.items() if kind is PREFERENCES}
    assert pairs == {name for name in kinds if "Pairwise" in name} | {"PreferenceHandler"}
    assert {name for name, kind in kinds.items() if kind is UNPAIRED} == {n for n in kinds if "Unpaired" in n}
    assert set(kinds.values()) == set(KINDS)
