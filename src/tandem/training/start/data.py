"""What a run reads beside its weights: tokenizer and data, and the check that they belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tandem.checkpoints.interface import TensorSource
from tandem.config.lengths import RunLength
from tandem.config.settings import DataSettings, TrainingSettings
from tandem.data.datasets.blend import ChainedDataset, parse_blend
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.mixture import Mixture
from tandem.data.datasets.sample_index import EmptySplitError
from tandem.data.kinds import CONVERSATIONS, Kind
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.training.logs.log import VALIDATION
from tandem.training.start.data_checks import check_data
from tandem.training.start.data_paths import all_prefixes, named_sets
from tandem.training.start.datasets import Datasets, kind_to_train
from tandem.training.start.state import TrainerState

# Of `data_identity`: what each dataset's own order depends on, besides the seed. Where it changed, a new order begins.
_ORDERING = ("split", "seq_length", "is_instruction_dataset", "pack", "no_shuffle")


@dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated with.

    Attributes:
        valid: validation sets by name; none when nothing is evaluated.
        template: what the data's record names, or, without a record, the flags; None for plain text, or where neither
            does.
        notices: what the user should be told.
        identity: what the order of the samples is a function of, to be kept in checkpoints.
    """

    train: Dataset
    valid: dict[str, Dataset]
    template: dict[str, Any] | None
    notices: list[str]
    identity: dict[str, Any]


def open_tokenizer(folder: str | None, source: TensorSource) -> Tokenizer | None:
    """The tokenizer of the folder that `--tokenizer-name-or-path` names, or the one that lies with the weights."""
    folder_in_use = folder or source.companions.tokenizer_folder
    return Tokenizer(folder_in_use) if folder_in_use else None


def open_data(
    data: DataSettings, training: TrainingSettings, tokenizer: Tokenizer | None, resumed: TrainerState | None = None
) -> Data:
    """Open the datasets and compare their record with the run, which goes on from `resumed` if given.

    Raises:
        UserError: files are missing, or their record names another tokenizer, template or length.
    """
    kind, named = kind_to_train(data), named_sets(data.valid_data_path)
    checks = {prefix: check_data(prefix, kind, data, tokenizer) for prefix in all_prefixes(data)}
    template = common_template({prefix: template for prefix, (_, template) in checks.items()})
    datasets = Datasets.of(kind, data, training, tokenizer)
    identity = data_identity(data, training)
    changed = _changed_ordering(identity, training.seed, resumed) if resumed else []
    train, mixture = _training(data.data_path, training.length, datasets, resumed, keeps_order=not changed)
    valid, unevaluated = _validation_sets(data.data_path, training, datasets, named)
    notices = [
        *(notice for notices, _ in checks.values() for notice in notices),
        *_notices_of_flags(data, kind),
        *unevaluated,
        *_notices_of_evaluation(training, named, valid),
    ]
    if changed:
        notices.append(
            f"the checkpoint's samples came in an order of another {', '.join(changed).replace('_', ' ')}: "
            f"a new one begins, at the same position"
        )
    lines = [f"{prefix}: {source}" for prefix, source in zip(mixture.prefixes, train.sources())]
    return Data(train, valid, template, [*lines, *notices], {**identity, "mixture": mixture.to_dict()})


def common_template(templates: dict[str, dict[str, Any] | None]) -> dict[str, Any] | None:
    """The template of all prefixes of which it is known.

    Raises:
        UserError: there are several.
    """
    known = {prefix: template for prefix, template in templates.items() if template is not None}
    first = next(iter(known), None)
    for prefix, template in known.items():
        if first and template != known[first]:
            raise UserError(
                f"{prefix} was made with the template {template}, {first} with {known[first]}: different templates; "
                f"preprocess all with the same --prompt-type and --enable-thinking"
            )
    return known[first] if first else None


def _notices_of_evaluation(training: TrainingSettings, named: dict[str, str], valid: dict[str, Dataset]) -> list[str]:
    """Where the sets that the user named are not evaluated, or not whole."""
    if named and training.eval_iters and not valid:
        return [
            f"--valid-data-path: an evaluation is due every {training.eval_interval} steps, and the run has "
            f"{training.length.iterations}: nothing will be evaluated; give a smaller --eval-interval"
        ]
    if training.eval_batches is None:
        return []
    taken = training.eval_batches * training.final_batch_size
    return [
        f"{prefix}: an evaluation takes {taken:,} of {len(valid[name]):,} samples; --eval-iters full takes all"
        for name, prefix in named.items()
        if name in valid and len(valid[name]) > taken
    ]


def _notices_of_flags(data: DataSettings, kind: Kind) -> list[str]:
    """Flags that mean nothing for this kind of data."""
    given = [f"--{name.replace('_', '-')}" for name in kind.unused_by_training if getattr(data, name)]
    return [f"{' '.join(given)}: without effect on {kind.name}"] if given else []


def data_identity(data: DataSettings, training: TrainingSettings) -> dict[str, Any]:
    """What the order of the samples is a function of, besides the seed."""
    kind = kind_to_train(data)
    return {
        "data_path": list(data.data_path),
        "split": data.split,
        "seq_length": data.seq_length,
        "global_batch_size": training.final_batch_size,
        "train_iters": training.train_iters,
        "train_samples": training.train_samples,
        "is_instruction_dataset": kind is CONVERSATIONS,
        "pack": data.pack,
        "no_shuffle": data.no_shuffle and "no_shuffle" not in kind.unused_by_training,
    }


def _validation_sets(
    data_path: Sequence[str], training: TrainingSettings, datasets: Datasets, named: dict[str, str]
) -> tuple[dict[str, Dataset], list[str]]:
    """What the run is evaluated with, by name, and notices; nothing where no evaluation is due."""
    if not training.eval_iters or training.eval_interval > training.length.iterations:
        return {}, []
    if named:
        return {name: datasets.whole(prefix) for name, prefix in named.items()}, []
    of_the_split, notices = _validation(data_path, datasets)
    return {VALIDATION: of_the_split}, notices


def _validation(data_path: Sequence[str], datasets: Datasets) -> tuple[Dataset, list[str]]:
    """The validation splits of all prefixes: one after the other where all of them is evaluated, else as many samples
    as they have together, mixed as the training data are. And notices, where some have none.

    Raises:
        UserError: all have none.
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
        full = "" if datasets.whole_validation else "--eval-iters full takes also less than a sample, "
        raise UserError(
            f"{failures[prefixes[0]]}. Or: {full}--valid-data-path evaluates other data, --eval-iters 0 nothing"
        )
    notices = [
        f"{prefix}: its share of the split has no validation sample, and is not evaluated" for prefix in failures
    ]
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
    """The training samples, and the mixture that they are. Where `resumed` is given and each dataset `keeps_order`,
    each goes on where the checkpoint stopped."""
    prefixes, weights = parse_blend(data_path)
    if weights is None and len(prefixes) > 1:
        weights = [float(len(datasets.split("train", prefix))) for prefix in prefixes]
    earlier, consumed, samples = None, 0, length.samples
    if resumed is not None:
        samples = length.samples_from(resumed.iteration, resumed.consumed_train_samples)
        if keeps_order:
            earlier, consumed = Mixture.from_dict(resumed.data.get("mixture")), resumed.consumed_train_samples
    mixture = Mixture.of(prefixes, weights or [1.0], samples, earlier, consumed)
    return mixture.open(partial(datasets.split, "train"), extendable=datasets.kind.extendable)


def _changed_ordering(identity: dict[str, Any], seed: int, resumed: TrainerState) -> list[str]:
    """What the order of each dataset depends on and is another than in the checkpoint."""
    before = {"no_shuffle": identity["no_shuffle"], **resumed.data}  # older checkpoints do not say it
    changed = [name for name in _ORDERING if before.get(name) != identity[name]]
    return changed + ([] if resumed.seed == seed else ["seed"])
