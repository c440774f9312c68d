"""Kinds of data: what each is called, which files hold it, and what trains on it. And the names of those files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

REJECTS_SUFFIX = ".rejects.jsonl"  # next to the record: rows that could not be used
MOST_NAMES = 5  # of each kind, in an error


@dataclass(frozen=True)
class Columns:
    """Keys of the `.bin/.idx` pairs that hold one sequence of a sample.

    Attributes:
        ids: its tokens.
        labels: the same, with -100 where nothing is trained.
        segments: of each token which document it is in, from 1 on, 0 in padding; None where rows are never packed.
        name: which of several sequences of a sample this is.
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

    Attributes:
        name: in words.
        command: the one that trains on it; None where none does.
        columns: the sequences of a sample; none for text.
        grows: the order of its samples does not depend on how many a run takes.
        unused_by_preprocess: options of preprocessing that mean nothing for it.
        unused_by_training: settings of training that mean nothing for it.
    """

    name: str
    command: str | None
    columns: tuple[Columns, ...] = ()
    grows: bool = True
    unused_by_preprocess: tuple[str, ...] = ()
    unused_by_training: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the `.bin/.idx` pairs, in the order in which they are written; none for text."""
        return tuple(key for columns in self.columns for key in columns.keys)

    @property
    def has_labels(self) -> bool:
        """Labels say which part of a sequence is trained; otherwise all is."""
        return bool(self.columns)

    @property
    def in_words(self) -> str:
        """The name, and what it is for."""
        return f"{self.name}, for `tandem {self.command}`" if self.command else f"{self.name}; no training uses them"

    def pair(self, output_prefix: str, key: str) -> str:
        """Prefix of the `.bin/.idx` pair of a key. Upstream's "packed" stands there with and without packing."""
        return f"{output_prefix}_packed_{key}_document" if self.keys else f"{output_prefix}_{key}_document"

    def data_paths(self, output_prefix: str, json_keys: tuple[str, ...]) -> tuple[str, ...]:
        """What `--data-path` takes of what was written: one, or of text one for each of the user's keys."""
        return (output_prefix,) if self.keys else tuple(self.pair(output_prefix, key) for key in json_keys)

    def first_pair(self, data_path: str) -> str:
        """Prefix of the first pair of a dataset, which has a sequence per sample."""
        return self.pair(data_path, self.keys[0]) if self.keys else data_path

    def lies_at(self, data_path: str) -> bool:
        """Whether a data path names data of this kind."""
        return os.path.exists(f"{self.first_pair(data_path)}.idx")


TEXT = Kind(
    name="plain text",
    command="pretrain",
    grows=False,
    unused_by_preprocess=("prompt_type", "train_turns", "seq_length", "over_long", "pack", "neat_pack"),
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
    command=None,
    columns=tuple(Columns(f"{name}_input_ids", f"{name}_labels", name=name) for name in ("chosen", "rejected")),
    unused_by_preprocess=("json_keys", "pad_to_multiple_of", "pack", "neat_pack", "append_eod"),
)
KINDS = (CONVERSATIONS, PREFERENCES, TEXT)  # a data path that fits several is of the first


def kind_of(data_path: str) -> Kind | None:
    """The kind of the data that a data path names, by their files; None where there are none, or it names but one of
    several files that belong together."""
    if whole_of(data_path) is not None:
        return None
    return next((kind for kind in KINDS if kind.lies_at(data_path)), None)


def whole_of(prefix: str) -> str | None:
    """The data path of which `prefix` is but one of several pairs; None if it is not."""
    for kind in KINDS:
        for key in kind.keys:
            data_path = prefix.removesuffix(kind.pair("", key))
            if data_path != prefix and os.path.exists(f"{prefix}.idx"):
                return data_path
    return None


def data_beside(prefix: str | os.PathLike[str]) -> str:
    """For an error about a missing dataset: the ones in its folder, as `--data-path` takes them; "" without any."""
    folder = Path(prefix).parent
    pairs = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))
    data_paths = dict.fromkeys(whole_of(pair) or pair for pair in pairs)
    listed = []
    for kind in reversed(KINDS):
        names = [path for path in data_paths if kind_of(path) is kind][:MOST_NAMES]
        if names and kind.command:
            listed.append(f"for `tandem {kind.command}` {', '.join(names)}")
    return f"; there is {' and '.join(listed)}" if listed else ""
