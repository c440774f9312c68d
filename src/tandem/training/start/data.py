"""Opens the tokenizer and the data of a run, and checks that they belong together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tandem.checkpoints.interface import TensorSource
from tandem.config.lengths import RunLength
from tandem.config.settings import DataSettings, TrainingSettings
from tandem.data.datasets.blend import ChainedDataset, parse_blend
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.mixture import Mixture
from tandem.data.datasets.sample_index import SPLIT_NAMES, EmptySplitError, split_range, split_weights
from tandem.data.indexed import IndexedDataset
from tandem.data.kinds import Kind
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.training.logs.log import VALIDATION
from tandem.training.start.data_checks import check_data
from tandem.training.start.data_paths import all_prefixes, named_sets
from tandem.training.start.datasets import Datasets, kind_to_train
from tandem.training.start.state import TrainerState

# The parts of `data_identity` that, with the seed, set the order inside each dataset. A change starts a new order.
_ORDERING = ("split", "seq_length", "kind", "pack", "no_shuffle")


@dataclass(frozen=True)
class Data:
    """What a run trains on, and what it is evaluated on.

    Attributes:
        valid: validation sets by name; empty when nothing is evaluated.
        template: the chat template in the record of the data, or from the flags when there is no record. None for
            plain text, or when neither names one.
        notices: for the user.
        identity: what determines the order of the samples; stored in checkpoints.
        references: of preferences, by prefix: see `AnswersDataset`.
    """

    train: Dataset
    valid: dict[str, Dataset]
    template: dict[str, Any] | None
    notices: list[str]
    identity: dict[str, Any]
    references: dict[str, np.ndarray] = field(default_factory=dict)


def open_tokenizer(folder: str | None, source: TensorSource) -> Tokenizer | None:
    """The tokenizer in `folder`, or else the one with the weights; None when there is none.

    Raises:
        UserError: it cannot be used, or the model has no rows for some of its tokens.
    """
    tokenizer_folder = folder or source.companions.tokenizer_folder
    if not tokenizer_folder:
        return None
    tokenizer = Tokenizer(tokenizer_folder)
    tokenizer.check_fits(source.config.vocab_size, f"the model in {source.location}")
    return tokenizer


def open_data(
    data: DataSettings, training: TrainingSettings, tokenizer: Tokenizer | None, resumed: TrainerState | None = None
) -> Data:
    """Open the datasets, and check that their records fit the run. A resumed run continues from `resumed`.

    Raises:
        UserError: files are missing, or their record names another tokenizer, template or length.
    """
    kind, valid_prefixes = kind_to_train(data), named_sets(data.valid_data_path)
    checks = {prefix: check_data(prefix, kind, data, tokenizer) for prefix in all_prefixes(data)}
    template = common_template({prefix: template for prefix, (_, template) in checks.items()})
    datasets = Datasets.of(kind, data, training, tokenizer)
    identity = data_identity(data, training)
    changed = _changed_ordering(identity, training.seed, resumed) if resumed else []
    train, mixture = _training(data.data_path, training.length, datasets, resumed, keeps_order=not changed)
    valid, split_notices = _validation_sets(data.data_path, training, datasets, valid_prefixes)
    notices = [
        *(notice for notices, _ in checks.values() for notice in notices),
        *_notices_of_names(checks),
        *_notices_of_flags(data, kind),
        *(notice for prefix in parse_blend(data.data_path)[0] for notice in _notices_of_split(prefix, kind, data)),
        *split_notices,
        *_notices_of_evaluation(training, valid_prefixes, valid),
    ]
    if changed:
        notices.append(
            f"the checkpoint was trained with another {', '.join(changed).replace('_', ' ')}: "
            f"the samples get a new order, from the same position"
        )
    lines = [f"{prefix}: {source}" for prefix, source in zip(mixture.prefixes, train.sources())]
    identity = {**identity, "mixture": mixture.to_dict()}
    return Data(train, valid, template, [*lines, *notices], identity, datasets.references)


def common_template(templates: dict[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """The template that all prefixes have in common; None entries do not count.

    Raises:
        UserError: there are different templates.
    """
    by_prefix = {prefix: template for prefix, template in templates.items() if template is not None}
    first = next(iter(by_prefix), None)
    for prefix, template in by_prefix.items():
        if first and template != by_prefix[first]:
            raise UserError(
                f"{prefix} was made with the template {template}, {first} with {by_prefix[first]}: different "
                f"templates; preprocess all with the same --prompt-type and --enable-thinking"
            )
    return by_prefix[first] if first else None


def _notices_of_evaluation(
    training: TrainingSettings, valid_prefixes: dict[str, str], valid: dict[str, Dataset]
) -> list[str]:
    """Notices when nothing is evaluated, or the sets of --valid-data-path only in part."""
    if not valid:
        return []
    if training.eval_batches is None:
        return []
    evaluated = training.eval_batches * training.final_batch_size
    return [
        f"{prefix}: an evaluation takes {evaluated:,} of {len(valid[name]):,} samples; --eval-iters full takes all"
        for name, prefix in valid_prefixes.items()
        if name in valid and len(valid[name]) > evaluated
    ]


def _notices_of_split(prefix: str, kind: Kind, data: DataSettings) -> list[str]:
    """A notice about the sequences of a prefix that `--split` keeps from training."""
    total = len(IndexedDataset(kind.first_pair(prefix)))
    trained, valid, test = (len(split_range(data.split, name, total)) for name in SPLIT_NAMES)
    if trained == total:
        return []
    held_out = [f"{count:,} for {use}" for count, use in ((valid, "validation"), (test, "test")) if count]
    return [
        f"{prefix}: --split {data.split} trains {trained:,} of {total:,} sequences and holds out "
        f"{' and '.join(held_out)}; --split 100,0,0 trains all"
    ]


def _notices_of_names(prefixes: Iterable[str]) -> list[str]:
    """Notices about prefixes that raw files share: the preprocessed data are taken."""
    return [
        f"{prefix}: preprocessed data, not the {'folder' if os.path.isdir(prefix) else 'file'} of the same name"
        for prefix in prefixes
        if os.path.exists(prefix)
    ]


def _notices_of_flags(data: DataSettings, kind: Kind) -> list[str]:
    """A notice about flags that have no effect on this kind of data."""
    flags = [f"--{name.replace('_', '-')}" for name in kind.unused_by_training if getattr(data, name)]
    return [f"{' '.join(flags)}: without effect on {kind.name}"] if flags else []


def data_identity(data: DataSettings, training: TrainingSettings) -> dict[str, Any]:
    """What determines the order of the samples, besides the seed."""
    kind = kind_to_train(data)
    return {
        "data_path": list(data.data_path),
        "split": data.split,
        "seq_length": data.seq_length,
        "global_batch_size": training.final_batch_size,
        "train_iters": training.train_iters,
        "train_samples": training.train_samples,
        "kind": kind.name,
        "pack": data.pack,
        "no_shuffle": data.no_shuffle and "no_shuffle" not in kind.unused_by_training,
    }


def _validation_sets(
    data_path: Sequence[str], training: TrainingSettings, datasets: Datasets, valid_prefixes: dict[str, str]
) -> tuple[dict[str, Dataset], list[str]]:
    """The validation sets by name, and notices. There are none when nothing is evaluated.

    Sets of --valid-data-path are evaluated at least once, at the end. A part of --split is only evaluated in a run
    that reaches --eval-interval, and only if it has a share.
    """
    if not training.eval_iters:
        return {}, []
    if valid_prefixes:
        return {name: datasets.whole(prefix) for name, prefix in valid_prefixes.items()}, []
    if not split_weights(datasets.data.split)[SPLIT_NAMES.index("valid")]:
        return {}, [f"--split {datasets.data.split} holds out nothing for validation: nothing is evaluated"]
    if training.eval_interval > training.length.iterations:
        return {}, [
            f"nothing is evaluated: an evaluation is due every {training.eval_interval:,} steps, and the run has "
            f"{training.length.iterations:,}: give a smaller --eval-interval, or --valid-data-path"
        ]
    split, notices = _validation(data_path, datasets)
    return {VALIDATION: split}, notices


def _validation(data_path: Sequence[str], datasets: Datasets) -> tuple[Dataset, list[str]]:
    """The validation splits of all prefixes as one dataset, and notices about prefixes without validation samples.

    When whole sets are evaluated, the splits follow each other. Otherwise they are mixed like the training data.

    Raises:
        UserError: no prefix has a validation sample.
    """
    prefixes, weights = parse_blend(data_path)
    parts: dict[str, Dataset] = {}
    failures: dict[str, EmptySplitError] = {}
    for prefix in prefixes:
        try:
            parts[prefix] = datasets.split("valid", prefix)
        except EmptySplitError as error:
            failures[prefix] = error
    if not parts:
        full = "" if datasets.whole_validation else "--eval-iters full also takes a sample that is not full, "
        raise UserError(
            f"{failures[prefixes[0]]}. Or: {full}--valid-data-path evaluates other data, --eval-iters 0 nothing"
        )
    notices = [f"{prefix}: --split gives it no validation sample, so it is not evaluated" for prefix in failures]
    if len(parts) == 1:
        return next(iter(parts.values())), notices
    if datasets.whole_validation:
        return ChainedDataset(list(parts.values())), notices
    sizes = [float(len(part)) for part in parts.values()]
    shares = [dict(zip(prefixes, weights))[prefix] for prefix in parts] if weights else sizes
    mixture = Mixture.of(list(parts), shares, int(sum(sizes)), None, 0)
    return mixture.open(partial(datasets.split, "valid"), extendable=datasets.kind.extendable)[0], notices


def _training(
    data_path: Sequence[str],
    length: RunLength,
    datasets: Datasets,
    resumed: TrainerState | None,
    *,
    keeps_order: bool,
) -> tuple[Dataset, Mixture]:
    """The training samples, and the mixture that they come from.

    If a resumed run `keeps_order`, each dataset continues where the checkpoint stopped.
    """
    prefixes, weights = parse_blend(data_path)
    if weights is None and len(prefixes) > 1:
        weights = [float(len(datasets.split("train", prefix))) for prefix in prefixes]
    earlier, consumed, samples = None, 0, length.samples
    if resumed is not None:
        samples = length.samples_from(resumed.iteration, resumed.consumed_train_samples)
        if keeps_order:
            earlier, consumed = Mixture.from_dict(resumed.data.get("mixture"), prefixes), resumed.consumed_train_samples
    mixture = Mixture.of(prefixes, weights or [1.0], samples, earlier, consumed)
    return mixture.open(partial(datasets.split, "train"), extendable=datasets.kind.extendable)


def _changed_ordering(identity: dict[str, Any], seed: int, resumed: TrainerState) -> list[str]:
    """The settings for the order of a dataset that differ from the checkpoint."""
    # Older checkpoints have no `no_shuffle`, and no `kind`.
    before = {"no_shuffle": identity["no_shuffle"], **resumed.data, "kind": resumed.kind_of_data}
    changed = [name for name in _ORDERING if before.get(name) != identity[name]]
    return changed + ([] if resumed.seed == seed else ["seed"])
