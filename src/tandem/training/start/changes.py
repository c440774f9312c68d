"""What is different about a resumed run: everything that changes how it goes on is said."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tandem.checkpoints.interface import TensorSource
from tandem.config.parsing import from_dict
from tandem.config.settings import GROUPS, DataSettings
from tandem.files.places import same_place
from tandem.training.schedule import Schedule, schedule_from
from tandem.training.start.datasets import kind_to_train
from tandem.training.start.lora import OF_ADAPTERS
from tandem.training.start.state import SETTINGS_FILE, TrainerState, saved_settings

# Settings that say where things are, or that are for one start, and may differ between two starts of a run.
FOR_ONE_START = {"load", "save", "init", "ckpt_step", "finetune", "no_load_optim", "no_load_rng", "dry_run"}
# Settings that a run with adapters keeps when they are not given again.
OF_KEPT_ADAPTERS = {*OF_ADAPTERS, "lora_target_modules", "lora_load"}
SAME_RATE = 0.01  # learning rates that differ by less than this fraction do not jump


def other_kind(state: TrainerState, data: DataSettings) -> list[str]:
    """A notice when a run goes on with data of another kind, such as fine-tuning after pretraining."""
    before, now = state.kind_of_data, kind_to_train(data).name
    if before in (None, now):
        return []
    return [
        f"the checkpoint is of training on {before}, and this is on {now}: it goes on with that run's iteration, "
        f"optimizer and schedule. --finetune begins at iteration 0, with the weights alone"
    ]


def other_rate(source: TensorSource, state: TrainerState, schedule: Schedule) -> list[str]:
    """A notice when the learning rate of the next step is not what the checkpoint's settings would give."""
    saved = saved_settings(source)
    if saved is None:
        return []
    groups = {group: _known(group, saved.get(group, {})) for group in ("optimizer", "training")}
    earlier = from_dict(groups, f"{source.location}/{SETTINGS_FILE}")
    samples = state.consumed_train_samples - state.skipped_train_samples
    was, now = schedule_from(earlier.optimizer, earlier.training).lr(samples), schedule.lr(samples)
    if math.isclose(was, now, rel_tol=SAME_RATE):
        return []
    return [f"the learning rate of the next step is {now:.6E}; the settings of the checkpoint gave {was:.6E}"]


def _known(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values of settings that this release has. Another release may have had others."""
    names = {field.name for field in dataclasses.fields(GROUPS[group])}
    return {name: value for name, value in values.items() if name in names}


def changes(source: TensorSource, now: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a table of settings that have changed since the checkpoint. The settings in `now` are used."""
    saved = saved_settings(source)
    if saved is None:
        return []
    rows = [
        (name, str(saved.get(group, {}).get(name)), str(value))
        for group, values in now.items()
        for name, value in values.items()
        if name not in FOR_ONE_START
        and not (name in OF_KEPT_ADAPTERS and not value)
        and name in saved.get(group, {})
        and not _same_value(saved[group][name], value)
    ]
    if not rows:
        return []
    widths = [max(len(row[column]) for row in [("setting", "was", "is"), *rows]) for column in range(2)]
    return [f"{name:<{widths[0]}}  {was:<{widths[1]}}  {new}" for name, was, new in [("setting", "was", "is"), *rows]]


def _same_value(before: Any, now: Any) -> bool:
    """Whether two values of a setting mean the same. A path may be written in several ways."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_same_value, before, now))
    return bool(before == now) or (isinstance(before, str) and isinstance(now, str) and same_place(now, before))
