"""Settings that were given and change nothing, as another setting that they belong to is missing.

They are named and not refused: scripts of other tools often give settings that they do not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tandem.config.parsing import departures
from tandem.config.settings import Settings
from tandem.options import as_typed


class _Rule(NamedTuple):
    """The settings `names` have an effect where `holds`; `needs` says the same in words."""

    names: tuple[str, ...]
    needs: str
    holds: Callable[[Settings], bool]


def _skips(settings: Settings) -> bool:
    training = settings.training
    return training.on_bad_step == "skip" or training.no_check_for_nan_in_loss_and_grad


_RULES = (
    _Rule(("init_method_std",), "--init random", lambda given: given.checkpoint.init is not None),
    _Rule(
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        "--fp16",
        lambda given: given.training.fp16,
    ),
    _Rule(
        ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        "a dynamic loss scale, without --loss-scale",
        lambda given: not given.training.fp16 or given.training.loss_scale is None,
    ),
    _Rule(("max_consecutive_skips",), "--on-bad-step skip", _skips),
    _Rule(("spiky_loss_factor",), "--check-for-spiky-loss", lambda given: given.training.check_for_spiky_loss),
    _Rule(
        ("recompute_method", "recompute_num_layers"),
        "--recompute-granularity full",
        lambda given: given.training.recompute_granularity is not None,
    ),
    _Rule(
        ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
        "--lr-decay-style WSD",
        lambda given: given.optimizer.lr_decay_style == "WSD",
    ),
    _Rule(
        ("lr_warmup_init",),
        "--lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction",
        lambda given: bool(
            given.optimizer.lr_warmup_iters or given.optimizer.lr_warmup_samples or given.optimizer.lr_warmup_fraction
        ),
    ),
    _Rule(
        ("min_lr",),
        "a --lr-decay-style that is not constant",
        lambda given: given.optimizer.lr_decay_style != "constant",
    ),
    _Rule(
        ("lr_decay_iters", "lr_decay_samples"),
        "a --lr-decay-style that is not constant, or --lr-warmup-fraction",
        lambda given: given.optimizer.lr_decay_style != "constant" or given.optimizer.lr_warmup_fraction is not None,
    ),
    _Rule(
        ("moe_aux_loss_coeff",),
        "--moe-router-load-balancing-type aux_loss or pooled_aux_loss",
        lambda given: given.experts.moe_router_load_balancing_type.endswith("aux_loss"),
    ),
    _Rule(
        ("moe_token_drop_policy",),
        "--moe-expert-capacity-factor",
        lambda given: given.experts.moe_expert_capacity_factor is not None,
    ),
    _Rule(("refer_model_iter",), "--ref-model", lambda given: given.preferences.ref_model is not None),
    _Rule(
        (
            *("async_save", "save_interval", "save_total_limit", "save_retain_interval", "export_hf_every"),
            *("no_save_optim", "no_shared_storage"),
        ),
        "--save",
        lambda given: given.checkpoint.save is not None,
    ),
    _Rule(
        ("profile_step_start", "profile_step_end", "profile_save_path"),
        "--profile",
        lambda given: given.logging.profile,
    ),
    _Rule(("tensorboard_log_interval",), "--tensorboard-dir", lambda given: given.logging.tensorboard_dir is not None),
    _Rule(
        ("wandb_exp_name", "wandb_entity", "wandb_save_dir"),
        "--wandb-project",
        lambda given: given.logging.wandb_project is not None,
    ),
    _Rule(
        (
            *("eval_tasks_interval", "include_path", "num_fewshot", "limit", "apply_chat_template", "allow_code"),
            *("tokens_per_batch", "task_data_path", "max_new_tokens", "chain_of_thought"),
        ),
        "--eval-tasks",
        lambda given: bool(given.evaluation.eval_tasks),
    ),
)


def without_effect(settings: Settings, *, has_experts: bool) -> Iterator[str]:
    """Lines about settings of a training run that are not at their default, and change nothing.

    >>> list(without_effect(Settings(hysteresis=4, loss_scale=8.0), has_experts=False))
    ['--loss-scale 8 --hysteresis 4: without effect; needs --fp16']
    """
    groups = departures(settings)
    if not has_experts and (of_experts := groups.pop("experts", None)):
        yield f"{_in_words(of_experts)}: without effect; the model has no experts"
    changed = {name: value for values in groups.values() for name, value in values.items()}
    for rule in _RULES:
        given = {name: changed[name] for name in rule.names if name in changed}
        if given and not rule.holds(settings):
            yield f"{_in_words(given)}: without effect; needs {rule.needs}"


def _in_words(given: Mapping[str, Any]) -> str:
    """Settings as a command line gives them."""
    return " ".join(as_typed(name, value) for name, value in given.items())
