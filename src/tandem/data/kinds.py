"""Kinds of data: the name of each, the files that hold it, and the command that trains on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

REJECTS_SUFFIX = ".rejects.jsonl"  # next to the record: rows that could not be used
MOST_NAMES = 5  # so many datasets of a kind are listed in an error


@dataclass(frozen=True)
class Columns:
    """Keys of the `.bin/.idx` pairs that hold one sequence of a sample.

    Attributes:
        ids: key of the tokens.
        labels: key of the labels: the tokens again, with -100 where nothing is trained.
        segments: key of the document numbers: 1, 2, .. for each token, 0 in padding. None where rows are never packed.
        name: tells the sequences of a sample apart, where it has several; else "".
    """

    ids: str
    labels: str
    segments: str | None = None
    name: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for key in (self.ids, self.segments, self.labels) if key is not None)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of data, as `tandem preprocess` writes it under an output prefix.

    Text has a `.bin/.idx` pair for each JSON key that the user names. Each pair is a dataset, and all of it is trained.
    The other kinds have several pairs, which are one dataset by the output prefix, and labels say what is trained.
    Preferences have two answers to a prompt, a chosen and a rejected one. Unpaired preferences have one answer to each
    prompt, which is desirable or not.

    Attributes:
        name: as messages say it.
        command: the command that trains on it; None where none does.
        columns: the sequences of a sample; none for text.
        numbers: keys of pairs with one number for each sample, as a sequence of length 1.
        extendable: a dataset that is built longer begins with the same samples.
        unused_by_preprocess: options of preprocessing that have no effect on this kind.
        unused_by_training: settings of training that have no effect on this kind.
    """

    name: str
    command: str | None
    columns: tuple[Columns, ...] = ()
    numbers: tuple[str, ...] = ()
    extendable: bool = True
    unused_by_preprocess: tuple[str, ...] = ()
    unused_by_training: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all `.bin/.idx` pairs, in the order in which they are written; none for text.

        >>> CONVERSATIONS.keys
        ('input_ids', 'attention_mask', 'labels')
        """
        return (*(key for columns in self.columns for key in columns.keys), *self.numbers)

    @property
    def has_labels(self) -> bool:
        """Whether labels say which part of a sequence is trained; without labels all of it is."""
        return bool(self.columns)

    @property
    def in_words(self) -> str:
        """The name, and the command that trains on it, for messages."""
        return f"{self.name}, for `tandem {self.command}`" if self.command else f"{self.name}; no training uses them"

    def pair(self, output_prefix: str, key: str) -> str:
        """Prefix of the `.bin/.idx` pair of a key. Upstream writes "packed" with and without packing.

        >>> CONVERSATIONS.pair("data/sft", "labels")
        'data/sft_packed_labels_document'
        >>> TEXT.pair("data/corpus", "text")
        'data/corpus_text_document'
        """
        return f"{output_prefix}_packed_{key}_document" if self.keys else f"{output_prefix}_{key}_document"

    def data_paths(self, output_prefix: str, json_keys: tuple[str, ...]) -> tuple[str, ...]:
        """What to give to `--data-path`: the output prefix, or for text one prefix for each of the user's keys."""
        return (output_prefix,) if self.keys else tuple(self.pair(output_prefix, key) for key in json_keys)

    def first_pair(self, data_path: str) -> str:
        """Prefix of the first `.bin/.idx` pair of a dataset. It has one sequence for each sample."""
        return self.pair(data_path, self.keys[0]) if self.keys else data_path

    def exists_at(self, data_path: str) -> bool:
        """Whether there is a dataset of this kind under this data path."""
        return os.path.exists(f"{self.first_pair(data_path)}.idx")


TEXT = Kind(
    name="plain text",
    command="pretrain",
    extendable=False,
    unused_by_preprocess=(
        "prompt_type",
        "enable_thinking",
        "train_turns",
        "seq_length",
        "over_long",
        "pack",
        "neat_pack",
    ),
    unused_by_training=("pack", "neat_pack", "no_shuffle"),
)
CONVERSATIONS = Kind(
    name="conversations",
    command="finetune",
    columns=(Columns("input_ids", "labels", "attention_mask"),),
    unused_by_preprocess=("json_keys", "pad_to_multiple_of"),
    unused_by_training=("eod_mask_loss",),
)
PREFERENCES = Kind(
    name="preferences",
    command="finetune --stage dpo",
    columns=tuple(Columns(f"{name}_input_ids", f"{name}_labels", name=name) for name in ("chosen", "rejected")),
    unused_by_preprocess=("json_keys", "pad_to_multiple_of", "pack", "neat_pack", "append_eod", "eod_token"),
    unused_by_training=("eod_mask_loss", "pack", "neat_pack", "reset_attention_mask", "reset_position_ids"),
)
UNPAIRED = Kind(  # 1 for a desirable answer, and 0 for another
    name="unpaired preferences",
    command="finetune --stage kto",
    columns=(Columns("completion_input_ids", "completion_labels", name="completion"),),
    numbers=("completion_desirable",),
    unused_by_preprocess=PREFERENCES.unused_by_preprocess,
    unused_by_training=PREFERENCES.unused_by_training,
)
KINDS = (CONVERSATIONS, PREFERENCES, UNPAIRED, TEXT)  # where a data path fits several kinds, the first one counts


def kind_of(data_path: str) -> Kind | None:
    """The kind of a dataset, recognised by the names of its files.

    None where there is no dataset, or where the path names only one of several pairs that belong together.
    """
    if dataset_of_pair(data_path) is not None:
        return None
    return next((kind for kind in KINDS if kind.exists_at(data_path)), None)


def dataset_of_pair(prefix: str) -> str | None:
    """The data path of the dataset that this `.bin/.idx` pair is a part of; None if the pair is a dataset by itself.

    `sft_packed_labels_document` is a part of `sft`, when its files exist.
    """
    for kind in KINDS:
        for key in kind.keys:
            data_path = prefix.removesuffix(kind.pair("", key))
            if data_path != prefix and os.path.exists(f"{prefix}.idx"):
                return data_path
    return None


def datasets_in_folder_of(prefix: str | os.PathLike[str]) -> str:
    """The end of an error about a missing dataset: the datasets that its folder has, as `--data-path` takes them.

    "" when it has none.
    """
    folder = Path(prefix).parent
    pairs = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))
    data_paths = dict.fromkeys(dataset_of_pair(pair) or pair for pair in pairs)
    listed = []
    for kind in reversed(KINDS):
        names = [path for path in data_paths if kind_of(path) is kind][:MOST_NAMES]
        if names and kind.command:
            listed.append(f"{', '.join(names)} (for `tandem {kind.command}`)")
    return f"; the folder has {' and '.join(listed)}" if listed else ""
