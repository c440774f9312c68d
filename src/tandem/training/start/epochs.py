"""`--epochs`: turns the number of passes over the training samples into a number of steps."""

from __future__ import annotations

import math
from dataclasses import replace

from tandem.config.settings import DataSettings, TrainingSettings
from tandem.data.datasets.blend import parse_blend
from tandem.errors import UserError
from tandem.training.start.data_checks import check_files
from tandem.training.start.datasets import Datasets, kind_to_train
from tandem.training.start.state import TrainerState


def check_epochs(data: DataSettings, training: TrainingSettings) -> None:
    """Raise UserError when the prefixes have weights: then a pass over the samples is not defined."""
    _, weights = parse_blend(data.data_path)
    if training.epochs is not None and weights is not None:
        raise UserError(
            f"--epochs {training.epochs:g} takes every sample equally often, but the weights of --data-path "
            f"{' '.join(data.data_path)} take some more often than others: leave the weights out, or give "
            f"--train-iters"
        )


def with_epochs(
    data: DataSettings, training: TrainingSettings, resumed: TrainerState | None = None
) -> TrainingSettings:
    """Turn `--epochs` into `--train-iters`: the steps that take every training sample that often, rounded up.

    Raises:
        UserError: as in `check_epochs`. Or the run was resumed with another batch size, so that the number of steps
            does not give the number of samples.
    """
    if training.epochs is None:
        return training
    check_epochs(data, training)
    samples, batch = _samples_of_an_epoch(data, training), training.final_batch_size
    before = resumed.data.get("global_batch_size") if resumed else None
    if before not in (None, batch):
        raise UserError(
            f"--epochs {training.epochs:g}: the steps of this run took {before} samples so far, and "
            f"--global-batch-size is now {batch}; keep {before}, or give --train-samples "
            f"{math.ceil(training.epochs * samples)} instead of --epochs"
        )
    return replace(training, epochs=None, train_iters=max(1, math.ceil(training.epochs * samples / batch)))


def _samples_of_an_epoch(data: DataSettings, training: TrainingSettings) -> int:
    kind, (prefixes, _) = kind_to_train(data), parse_blend(data.data_path)
    for prefix in prefixes:
        check_files(prefix, kind)
    # The flags that need a tokenizer do not change the number of samples.
    plain = replace(data, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False)
    datasets = Datasets.of(kind, plain, training, None)
    return sum(len(datasets.split("train", prefix)) for prefix in prefixes)
