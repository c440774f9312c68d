"""Puts adapters next to the initial weights of a run: those of `--lora-load`, or new ones."""

from __future__ import annotations

import dataclasses

from tandem.checkpoints.adapters.fresh import FreshAdapters
from tandem.checkpoints.adapters.views import Adapted
from tandem.checkpoints.detect import open_adapters
from tandem.checkpoints.interface import TensorSource
from tandem.config.settings import LoraSettings
from tandem.errors import UserError
from tandem.models.adapters import module_names
from tandem.models.config import ModelConfig
from tandem.models.lora import ALL_LINEAR, Lora, as_targets
from tandem.options import flag_of
from tandem.training.logs.log import log_notice
from tandem.training.start.datasets import KIND_OF_STAGE

# Settings that say nothing without adapters.
OF_ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_use_rslora", "lora_use_dora")


def with_adapters(base: TensorSource, lora: LoraSettings, seed: int, *, resumes: bool) -> TensorSource:
    """`base` with the adapters that the settings ask for; `base` itself when they ask for none.

    Weights that have adapters keep them: a run that trained adapters goes on with them.

    Args:
        resumes: `base` is the run's own checkpoint, which began with `--lora-load` if that is given.

    Raises:
        UserError: `--lora-load` holds no adapters for this model, or a setting contradicts the adapters that are there.
    """
    if lora.lora_load is not None and not (resumes and base.config.lora is not None):
        told = base.notices
        base = open_adapters(lora.lora_load, base, lora.lora_alpha)
        for notice in base.notices:
            if notice not in told:
                log_notice(notice)
    if base.config.lora is not None:
        values = {name: getattr(lora, name) for name in (*OF_ADAPTERS, "lora_target_modules")}
        base.config.lora.check_flags(values, lora.lora_load or base.location)
        return base
    if not lora.lora_target_modules:
        if given := [flag_of(name) for name in OF_ADAPTERS if _is_given(getattr(lora, name))]:
            raise UserError(f"{' '.join(given)}: nothing gets adapters: add --lora-target-modules all-linear, or names")
        return base
    config = dataclasses.replace(base.config, lora=new_lora(lora))
    check_targets(lora.lora_target_modules, config)
    return Adapted(FreshAdapters(base, config, seed), base, base)


def config_to_train(config: ModelConfig, stage: str | None) -> ModelConfig:
    """The model as it is trained. Adapters of other runs may have dropout, and answers are compared without."""
    if stage not in KIND_OF_STAGE or config.lora is None or not config.lora.lora_dropout:
        return config
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, lora_dropout=0.0))


def has_fresh_adapters(source: TensorSource) -> bool:
    """Whether `source` got new adapters, which change nothing yet."""
    return isinstance(source.adapters, FreshAdapters)


def new_lora(lora: LoraSettings) -> Lora:
    """The adapters that the settings describe."""
    return Lora.of_flags(
        r=16 if lora.lora_r is None else lora.lora_r,
        lora_alpha=32 if lora.lora_alpha is None else lora.lora_alpha,
        lora_dropout=lora.lora_dropout or 0.0,
        target_modules=as_targets(lora.lora_target_modules),
        use_rslora=bool(lora.lora_use_rslora),
        use_dora=bool(lora.lora_use_dora),
    )


def check_targets(targets: tuple[str, ...], config: ModelConfig) -> None:
    """Raise UserError when a name of `--lora-target-modules` is no module that can have an adapter."""
    if targets == (ALL_LINEAR,):
        return
    known = module_names(config)
    if unknown := [target for target in targets if target.rpartition(".")[2] not in known]:
        raise UserError(
            f"--lora-target-modules {' '.join(unknown)}: expected all-linear, or some of {', '.join(known)}"
        )


def _is_given(value: object) -> bool:
    """Whether a setting was given: not None, nor a switch that is off. A number of 0 was."""
    return value is not None and value is not False
