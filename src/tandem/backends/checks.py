"""What no engine can do with a model and its settings. This is known without a device, and without the framework."""

from __future__ import annotations

from tandem.backends.interface import EngineSettings
from tandem.errors import UserError
from tandem.frameworks import Framework
from tandem.models.adapters import check_dropout
from tandem.models.config import ModelConfig


def check_engine(framework: Framework, config: ModelConfig, settings: EngineSettings) -> None:
    """Raise UserError for what no engine of a framework can do. Every engine checks this first."""
    framework.check(shards_weights=settings.use_torch_fsdp2, narrow_moments=settings.narrow_moments)
    framework.check_device(settings.device)
    settings.grid.layout.check(config)
    if settings.training:
        check_dropout(config)
    if config.experts is not None:
        _check_experts(settings)


def _check_experts(settings: EngineSettings) -> None:
    layout, kind = settings.grid.layout, settings.moe_router_load_balancing_type
    layout.check_expert_sharding(settings.use_torch_fsdp2)
    if kind == "pooled_aux_loss" and settings.moe_aux_loss_coeff and layout.pipeline_model_parallel_size > 1:
        raise UserError(
            "--moe-router-load-balancing-type pooled_aux_loss needs all layers on one pipeline stage: give aux_loss, "
            "or --pipeline-model-parallel-size 1"
        )
