"""Settings that were given and change nothing are named."""

from __future__ import annotations

import pytest

from tandem.config.settings import Settings
from tandem.config.without_effect import without_effect

CASES = [
    ({"init_method_std": 0.01, "load": "hf"}, "--init-method-std 0.01", {"load": None, "init": "random"}),
    ({"initial_loss_scale": 4096.0, "bf16": True}, "--initial-loss-scale 4096", {"bf16": False, "fp16": True}),
    ({"fp16": True, "loss_scale": 8.0, "hysteresis": 4}, "--hysteresis 4", {"loss_scale": None}),
    ({"max_consecutive_skips": 3}, "--max-consecutive-skips 3", {"no_check_for_nan_in_loss_and_grad": True}),
    ({"spiky_loss_factor": 5.0}, "--spiky-loss-factor 5", {"check_for_spiky_loss": True}),
    (
        {"recompute_method": "block", "recompute_num_layers": 2},
        "--recompute-method block --recompute-num-layers 2",
        {"recompute_granularity": "full"},
    ),
    ({"lr_wsd_decay_iters": 5}, "--lr-wsd-decay-iters 5", {"lr_decay_style": "WSD"}),
    ({"lr_warmup_init": 1e-6}, "--lr-warmup-init 1e-06", {"lr_warmup_iters": 2}),
    ({"lr_decay_style": "constant", "min_lr": 1e-5}, "--min-lr 1e-05", {"lr_decay_style": "cosine"}),
    ({"lr_decay_style": "constant", "lr_decay_iters": 9}, "--lr-decay-iters 9", {"lr_warmup_fraction": 0.1}),
    (
        {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.1},
        "--moe-aux-loss-coeff 0.1",
        {"moe_router_load_balancing_type": "pooled_aux_loss"},
    ),
    ({"moe_token_drop_policy": "position"}, "--moe-token-drop-policy position", {"moe_expert_capacity_factor": 1.0}),
    ({"refer_model_iter": 2}, "--refer-model-iter 2", {"ref_model": "hf"}),
    ({"async_save": True, "save_interval": 5}, "--async-save --save-interval 5", {"save": "run"}),
    ({"profile_step_end": 20}, "--profile-step-end 20", {"profile": True}),
    ({"tensorboard_log_interval": 5}, "--tensorboard-log-interval 5", {"tensorboard_dir": "tb"}),
    ({"wandb_exp_name": "a", "wandb_entity": "b"}, "--wandb-exp-name a --wandb-entity b", {"wandb_project": "p"}),
    ({"num_fewshot": 0, "limit": 10.0}, "--num-fewshot 0 --limit 10", {"eval_tasks": ("arc_easy",)}),
]


@pytest.mark.parametrize(("given", "flags", "needed"), CASES)
def test_a_setting_without_what_it_belongs_to_is_named(
    given: dict[str, object], flags: str, needed: dict[str, object]
) -> None:
    (line,) = without_effect(Settings(**given), has_experts=True)
    assert line.startswith(f"{flags}: without effect; needs ")
    assert list(without_effect(Settings(**{**given, **needed}), has_experts=True)) == []


def test_defaults_are_not_named() -> None:
    assert list(without_effect(Settings(), has_experts=False)) == []
    assert list(without_effect(Settings(hysteresis=2, log_interval=7, lr=1e-3), has_experts=False)) == []


def test_settings_of_experts_need_experts() -> None:
    given = Settings(norm_topk_prob=True, moe_aux_loss_coeff=0.01)
    (line,) = without_effect(given, has_experts=False)
    assert line == "--moe-aux-loss-coeff 0.01 --norm-topk-prob: without effect; the model has no experts"
    assert list(without_effect(given, has_experts=True)) == []
