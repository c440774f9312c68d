"""PEFT's `adapter_config.json`: which adapters a folder holds, and what of it Tandem does not compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.files.text import read_json
from tandem.models.lora import Lora

CONFIG = "adapter_config.json"
MERGE = "merge the adapter with peft (merge_and_unload), and give the whole model instead"
BASE = "base_model_name_or_path"

# Fields that change what an adapter computes, with the values for which they change nothing.
UNCHANGED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),
    **dict.fromkeys(("use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"), (None, False)),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the model's weights
}
# Fields that change nothing of an adapter that is trained: names, and settings of what `UNCHANGED` refuses.
WITHOUT_EFFECT = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", BASE, "revision", "inference_mode"),
        *("layers_pattern", "megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "merge_weights"),
    )
)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or _are_texts(value)


def _are_layers(value: Any) -> bool:
    return all(type(number) is int for number in (value if isinstance(value, list) else [value]))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


# The fields that are read, what each holds, in words, and whether a value does. `Lora` checks numbers.
READ: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("", lambda value: True),
    "lora_alpha": ("", lambda value: True),
    "lora_dropout": ("", lambda value: True),
    "target_modules": ("a text, or a list of texts", _are_names),
    "exclude_modules": ("a text, or a list of texts", _are_names),
    "target_parameters": ("a list of texts", _are_texts),
    "layers_to_transform": ("a whole number, or a list of them", _are_layers),
    "rank_pattern": ("an object of modules and numbers", _is_object),
    "alpha_pattern": ("an object of modules and numbers", _is_object),
    "use_rslora": ("true or false", _is_switch),
    "use_dora": ("true or false", _is_switch),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    path = folder / CONFIG
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, not a JSON object")
    return values


def read_lora(folder: Path) -> Lora:
    """The adapters that a folder's config describes.

    Raises:
        UserError: it describes what Tandem does not compute. Every such field is named.
    """
    values, path = read_config(folder), folder / CONFIG
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {values.get('peft_type')!r}; expected 'LORA'")
    wrong = [
        f"{name} {values[name]!r}" for name, same in UNCHANGED.items() if name in values and values[name] not in same
    ]
    if wrong:
        raise UserError(f"{path}: not supported: {', '.join(wrong)}: {MERGE}")
    for name, (expected, fits) in READ.items():
        if (value := values.get(name)) is not None and not fits(value):
            raise UserError(f"{path}: {name} {value!r}: expected {expected}")
    modules, parameters = values.get("target_modules"), tuple(sorted(values.get("target_parameters") or ()))
    if modules is None and not parameters:
        raise UserError(f"{path}: target_modules is missing")
    layers = values.get("layers_to_transform")
    try:
        return Lora(
            r=values.get("r", 8),
            lora_alpha=values.get("lora_alpha", 8),
            target_modules=modules if isinstance(modules, str) else tuple(sorted(modules or ())),
            use_rslora=bool(values.get("use_rslora")),
            use_dora=bool(values.get("use_dora")),
            lora_dropout=values.get("lora_dropout") or 0.0,
            rank_pattern=tuple((values.get("rank_pattern") or {}).items()),
            alpha_pattern=tuple((values.get("alpha_pattern") or {}).items()),
            layers_to_transform=None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
            exclude_modules=_names(values.get("exclude_modules")),
            target_parameters=parameters,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _names(modules: Any) -> tuple[str, ...] | str | None:
    return modules if modules is None or isinstance(modules, str) else tuple(sorted(modules)) or None


def unknown_fields(folder: Path) -> Iterator[str]:
    """A notice about fields of another version of PEFT, which are left out as `peft` does."""
    known = {*READ, *UNCHANGED, *WITHOUT_EFFECT}
    unknown = sorted(name for name, value in read_config(folder).items() if name not in known and value)
    if unknown:
        yield f"{folder / CONFIG}: not known here, and left out: {', '.join(unknown)}"


def is_for(folder: Path, model: Path) -> bool:
    """Whether the model in a folder has the name of the one that a PEFT folder was trained on, or it names none.

    Names of the hub and folders are compared by their last part. Whether the weights are the same is not known.
    """
    name = read_config(folder).get(BASE)
    if not isinstance(name, str) or not name.strip("/"):
        return True
    last = Path(name).name
    cached = any(part.startswith("models--") and part.endswith(f"--{last}") for part in model.resolve().parts)
    return cached or last in model.resolve().parts or Path(name).resolve() == model.resolve()
