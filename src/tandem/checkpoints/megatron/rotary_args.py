"""Rotary scaling in the `args` of a Megatron checkpoint: the names of Megatron-LM, its Bridge, and MindSpeed-LLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tandem.errors import UserError
from tandem.models.config import RotaryScaling, yarn_amplitude

# Field of RotaryScaling -> Megatron Bridge's name, MindSpeed-LLM's, and MindSpeed-LLM's older one.
YARN_NAMES = {
    "factor": ("yarn_rotary_scaling_factor", "rope_scaling_factor"),
    "original_max_position_embeddings": (
        "yarn_original_max_position_embeddings",
        "rope_scaling_original_max_position_embeddings",
    ),
    "beta_fast": ("yarn_beta_fast", "beta_fast", "rope_scaling_beta_fast"),
    "beta_slow": ("yarn_beta_slow", "beta_slow", "rope_scaling_beta_slow"),
    "mscale": ("yarn_mscale", "rope_scaling_mscale"),
    "mscale_all_dim": ("yarn_mscale_all_dim", "rope_scaling_mscale_all_dim"),
    "truncate": ("yarn_correction_range_round_to_int",),
}


def scaling_to_args(scaling: RotaryScaling | None) -> dict[str, Any]:
    """All names that a reader may look for.

    Of YaRN, Megatron-core reads the names that begin with `yarn_`, where `position_embedding_type` is "yarn". Without
    them it stops, where "rope" would compute another model.
    """
    kind = scaling.kind if scaling is not None else None
    factor = scaling.factor if scaling is not None else None
    values: dict[str, Any] = {
        "position_embedding_type": "yarn" if kind == "yarn" else "rope",
        "rotary_seq_len_interpolation_factor": factor if kind == "linear" else None,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": factor if kind == "llama3" else 8.0,
    }
    if scaling is None or kind != "yarn":
        return values
    mscale, mscale_all_dim = _mscales(scaling)
    numbers = {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    yarn = {name: numbers.get(field, getattr(scaling, field)) for field, names in YARN_NAMES.items() for name in names}
    return {**values, **yarn, "rope_scaling_type": "yarn"}


def scaling_from_args(args: Mapping[str, Any], where: str) -> RotaryScaling | None:
    """The scaling that `args` ask for.

    Megatron's `--use-rope-scaling` is Llama 3.1's: it stores the factor; all other numbers are that model's.

    Raises:
        UserError: YaRN's factor or original length is missing, or a number is none.
    """
    if "yarn" in (args.get("rope_scaling_type"), args.get("position_embedding_type")):
        return _yarn(args, where)
    factor = args.get("rotary_seq_len_interpolation_factor")
    if args.get("use_rope_scaling"):
        return RotaryScaling("llama3", float(args.get("rope_scaling_factor") or 8.0))
    return RotaryScaling("linear", float(factor)) if factor not in (None, 1) else None


def _yarn(args: Mapping[str, Any], where: str) -> RotaryScaling:
    values = {}
    for field, names in YARN_NAMES.items():
        stated = [args[name] for name in names if args.get(name) is not None]
        if stated:
            values[field] = stated[0]
    for field in ("factor", "original_max_position_embeddings"):
        if field not in values:
            raise UserError(f"{where}: args ask for YaRN and do not say {' or '.join(YARN_NAMES[field])}")
    mscale, mscale_all_dim = values.pop("mscale", None), values.pop("mscale_all_dim", None)
    if mscale and mscale_all_dim:
        values |= {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    elif mscale is not None and mscale_all_dim is not None and (mscale, mscale_all_dim) != (1, 0):
        whole, part = (yarn_amplitude(values["factor"], scale) for scale in (mscale, mscale_all_dim))
        values["attention_factor"] = whole / part
    try:
        return RotaryScaling(kind="yarn", **values)
    except UserError as error:
        raise UserError(f"{where}: args: {error}") from None


def _mscales(scaling: RotaryScaling) -> tuple[float, float]:
    """`mscale` and `mscale_all_dim` with which Megatron multiplies cos and sin by the scaling's amplitude."""
    if scaling.attention_factor is None and scaling.mscale and scaling.mscale_all_dim:
        return scaling.mscale, scaling.mscale_all_dim
    if scaling.attention_factor is None or scaling.factor <= 1:
        return 1.0, 0.0
    return (scaling.attention_factor - 1) / (0.1 * math.log(scaling.factor)), 0.0
