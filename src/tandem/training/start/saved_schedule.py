"""`--use-checkpoint-opt_param-scheduler`: a run that goes on keeps the schedule that it was trained with."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from tandem.checkpoints.interface import TensorSource
from tandem.config.settings import AdamSettings, OptimizerSettings, Settings
from tandem.training.start.state import saved_settings

SCHEDULE = {field.name for field in fields(OptimizerSettings)} - {field.name for field in fields(AdamSettings)}


def with_saved_schedule(settings: Settings, source: TensorSource) -> Settings:
    """The settings with learning rate, its decay and warm-up, and weight decay as a checkpoint records them.

    A decay over the whole run is one over the length that the run had then, as Megatron stores it.
    """
    saved = saved_settings(source) or {}
    before = saved.get("optimizer", {})
    values: dict[str, Any] = {name: value for name, value in before.items() if name in SCHEDULE}
    values["use_checkpoint_opt_param_scheduler"] = True
    if values.get("lr_decay_iters") is None and values.get("lr_decay_samples") is None:
        length = saved.get("training", {})
        by_samples = settings.training.train_samples is not None
        decay, run = ("lr_decay_samples", "train_samples") if by_samples else ("lr_decay_iters", "train_iters")
        values[decay] = length.get(run)
    return replace(settings, optimizer=replace(settings.optimizer, **values))
