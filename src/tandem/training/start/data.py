"""What a run reads beside its weights: tokenizer and data, and the check that they belong together."""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tandem.checkpoints.interface import TensorSource
from tandem.config.settings import Settings
from tandem.data.datasets.blend import ChainedDataset, parse_blend
from tandem.data.datasets.dataset import Dataset
from tandem.data.datasets.mixture import Mixture
from tandem.data.datasets.sample_index import EmptySplitError
from tandem.data.kinds import CONVERSATIONS
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.training.logs.log import VALIDATION
from tandem.training.start.data_checks import check_data, check_files
from tandem.training.start.datasets import Datasets, kind_to_train
from tandem.training.start.state import TrainerState

# Of `data_identity`: what each dataset's own order depends on, beside the seed. Where it changed, a new order begins.
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


def open_tokenizer(settings: Settings, source: TensorSource) -> Tokenizer | None:
    """The tokenizer that `--tokenizer-name-or-path` names, or the one that lies beside the weights."""
    folder = settings.data.tokenizer_name_or_path or source.companions.tokenizer_folder
    return Tokenizer(folder) if folder else None


def open_data(settings: Settings, tokenizer: Tokenizer | None, resumed: TrainerState | None = None) -> Data:
    """Open the datasets and compare their record with the run, which goes on from `resumed` if given.

    Raises:
        UserError: files are missing, or their record names another tokenizer, template or length.
    """
    kind, named = kind_to_train(settings.data), named_sets(settings.data.valid_data_path)
    checks = {prefix: check_data(prefix, kind, settings.data, tokenizer) for prefix in all_prefixes(settings)}
    template = the_one_template({prefix: found for prefix, (_, found) in checks.items()})
    datasets = Datasets.of(kind, settings, tokenizer)
    train, mixture = _training(settings, datasets, resumed)
    valid, unevaluated = _validation_sets(settings, datasets, named)
    notices = [
        *(notice for notices, _ in checks.values() for notice in notices),
        *_notices_of_flags(settings),
        *unevaluated,
        *_notices_of_evaluation(settings, named, valid),
    ]
    if resumed is not None and not _keeps_its_order(settings, resumed):
        changed = ", ".join(_changed_ordering(settings, resumed)).replace("_", " ")
        notices.append(
            f"the checkpoint's samples came in an order of another {changed}: a new one begins, at the same position"
        )
    lines = [f"{prefix}: {source}" for prefix, source in zip(mixture.prefixes, train.sources())]
    return Data(train, valid, template, [*lines, *notices], {**data_identity(settings), "mixture": mixture.to_dict()})


def the_one_template(templates: dict[str, dict[str, Any] | None]) -> dict[str, Any] | None:
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


def _notices_of_evaluation(settings: Settings, named: dict[str, str], valid: dict[str, Dataset]) -> list[str]:
    """Where the sets that the user named are not evaluated, or not whole."""
    training = settings.training
    if named and training.eval_iters and not valid:
        return [
            f"--valid-data-path: an evaluation is due every {training.eval_interval} steps, and the run has "
            f"{settings.length.iterations}: nothing will be evaluated; give a smaller --eval-interval"
        ]
    if training.eval_iters == "full":
        return []
    taken = training.eval_iters * settings.global_batch_size
    return [
        f"{prefix}: an evaluation takes {taken:,} of {len(valid[name]):,} samples; --eval-iters full takes all"
        for name, prefix in named.items()
        if name in valid and len(valid[name]) > taken
    ]


def _notices_of_flags(settings: Settings) -> list[str]:
    """Flags that mean nothing for this kind of data."""
    kind = kind_to_train(settings.data)
    given = [f"--{name.replace('_', '-')}" for name in kind.unused_by_training if getattr(settings.data, name)]
    return [f"{' '.join(given)}: without effect on {kind.name}"] if given else []


def all_prefixes(settings: Settings) -> list[str]:
    """Of all data that the run reads."""
    prefixes, _ = parse_blend(settings.data.data_path)
    return list(dict.fromkeys([*prefixes, *named_sets(settings.data.valid_data_path).values()]))


def named_sets(paths: Sequence[str]) -> dict[str, str]:
    """Prefixes by name, from words NAME=PREFIX; a single PREFIX alone has the name of the split's own set.

    Raises:
        UserError: a name is missing or given twice.
    """
    if len(paths) == 1 and split_name(paths[0])[0] is None:
        return {VALIDATION: paths[0]}
    found: dict[str, str] = {}
    for word in paths:
        name, prefix = split_name(word)
        if not name or not prefix:
            raise UserError(f"--valid-data-path {word}: expected NAME=PREFIX, or one PREFIX alone")
        if name in found:
            raise UserError(f"--valid-data-path: two sets have the name {name!r}")
        found[name] = prefix
    return found


def split_name(word: str) -> tuple[str | None, str]:
    """Name and path of a word NAME=PATH; None for the name of a path alone. Where files have the whole word's name, the
    `=` belongs to it."""
    name, equals, path = word.partition("=")
    return (name, path) if equals and not glob.glob(f"{glob.escape(word)}*") else (None, word)


def with_epochs(settings: Settings, resumed: TrainerState | None = None) -> Settings:
    """`--epochs` as `--train-iters`: the steps that take every training sample that often, rounded up.

    Raises:
        UserError: as `check_epochs`; or the run goes on from steps of another size, so that the number of steps does
            not tell how many samples it takes.
    """
    training = settings.training
    if training.epochs is None:
        return settings
    check_epochs(settings)
    kind, (prefixes, _) = kind_to_train(settings.data), parse_blend(settings.data.data_path)
    for prefix in prefixes:
        check_files(prefix, kind)
    # The number of samples depends on none of the flags that need a tokenizer.
    plain = dataclasses.replace(
        settings.data, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False
    )
    datasets = Datasets.of(kind, dataclasses.replace(settings, data=plain), None)
    samples = sum(len(datasets.split("train", prefix)) for prefix in prefixes)
    iters = max(1, math.ceil(training.epochs * samples / settings.global_batch_size))
    before = resumed.data.get("global_batch_size") if resumed else None
    if before not in (None, settings.global_batch_size):
        raise UserError(
            f"--epochs {training.epochs:g}: the run's steps took {before} samples so far, and --global-batch-size is "
            f"now {settings.global_batch_size}; keep {before}, or give --train-samples "
            f"{math.ceil(training.epochs * samples)} in place of --epochs"
        )
    return dataclasses.replace(settings, training=dataclasses.replace(training, epochs=None, train_iters=iters))


def check_epochs(settings: Settings) -> None:
    """Raise UserError when the prefixes have weights, which say by themselves how often a sample is taken."""
    _, weights = parse_blend(settings.data.data_path)
    if settings.training.epochs is not None and weights is not None:
        raise UserError(
            f"--epochs {settings.training.epochs:g} takes every sample so often, but with the weights of --data-path "
            f"{' '.join(settings.data.data_path)} some come more often than others: leave the weights out, or give "
            f"--train-iters"
        )


def data_identity(settings: Settings) -> dict[str, Any]:
    """What the order of the samples is a function of, beside the seed."""
    kind = kind_to_train(settings.data)
    return {
        "data_path": list(settings.data.data_path),
        "split": settings.data.split,
        "seq_length": settings.data.seq_length,
        "global_batch_size": settings.global_batch_size,
        "train_iters": settings.training.train_iters,
        "train_samples": settings.training.train_samples,
        "is_instruction_dataset": kind is CONVERSATIONS,
        "pack": settings.data.pack,
        "no_shuffle": settings.data.no_shuffle and "no_shuffle" not in kind.unused_by_training,
    }


def _validation_sets(
    settings: Settings, datasets: Datasets, named: dict[str, str]
) -> tuple[dict[str, Dataset], list[str]]:
    """What the run is evaluated with, by name, and notices; nothing where no evaluation is due."""
    training = settings.training
    if not training.eval_iters or training.eval_interval > settings.length.iterations:
        return {}, []
    if named:
        return {name: datasets.whole(prefix) for name, prefix in named.items()}, []
    of_the_split, notices = _validation(settings, datasets)
    return {VALIDATION: of_the_split}, notices


def _validation(settings: Settings, datasets: Datasets) -> tuple[Dataset, list[str]]:
    """The validation splits of all prefixes: one after the other where all of them is evaluated, else as many samples
    as they have together, mixed as the training data are. And notices, where some have none.

    Raises:
        UserError: all have none.
    """
    prefixes, weights = parse_blend(settings.data.data_path)
    parts: dict[str, Dataset] = {}
    failures: dict[str, EmptySplitError] = {}
    for prefix in prefixes:
        try:
            parts[prefix] = datasets.split("valid", prefix)
        except EmptySplitError as error:
            failures[prefix] = error
    is_full = settings.training.eval_iters == "full"
    if not parts:
        full = "" if is_full else "--eval-iters full takes also less than a sample, "
        raise UserError(
            f"{failures[prefixes[0]]}. Or: {full}--valid-data-path evaluates other data, --eval-iters 0 nothing"
        )
    notices = [
        f"{prefix}: its share of the split has no validation sample, and is not evaluated" for prefix in failures
    ]
    if len(parts) == 1:
        return next(iter(parts.values())), notices
    if is_full:
        return ChainedDataset(list(parts.values())), notices
    sizes = [float(len(part)) for part in parts.values()]
    shares = [dict(zip(prefixes, weights))[prefix] for prefix in parts] if weights else sizes
    mixture = Mixture.of(list(parts), shares, int(sum(sizes)), None, 0)
    return mixture.open(partial(datasets.split, "valid"), grows=datasets.kind.grows)[0], notices


def _training(settings: Settings, datasets: Datasets, resumed: TrainerState | None) -> tuple[Dataset, Mixture]:
    """The training samples, going on in each prefix where `resumed` stopped, and the mixture that they are."""
    prefixes, weights = parse_blend(settings.data.data_path)
    if weights is None and len(prefixes) > 1:
        weights = [float(len(datasets.split("train", prefix))) for prefix in prefixes]
    earlier, consumed, samples = None, 0, settings.length.samples
    if resumed is not None:
        samples = settings.length.samples_from(resumed.iteration, resumed.consumed_train_samples)
        if _keeps_its_order(settings, resumed):
            earlier, consumed = Mixture.from_dict(resumed.data.get("mixture")), resumed.consumed_train_samples
    mixture = Mixture.of(prefixes, weights or [1.0], samples, earlier, consumed)
    return mixture.open(partial(datasets.split, "train"), grows=datasets.kind.grows)


def _keeps_its_order(settings: Settings, resumed: TrainerState) -> bool:
    """Whether each dataset's own order is still that of the checkpoint."""
    return not _changed_ordering(settings, resumed)


def _changed_ordering(settings: Settings, resumed: TrainerState) -> list[str]:
    """What the order depends on and is another than in the checkpoint."""
    identity = data_identity(settings)
    before = {"no_shuffle": identity["no_shuffle"], **resumed.data}  # older checkpoints do not say it
    changed = [name for name in _ORDERING if before.get(name) != identity[name]]
    return changed + ([] if resumed.seed == settings.training.seed else ["seed"])
