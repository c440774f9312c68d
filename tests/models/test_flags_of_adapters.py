"""Flags that contradict adapters stop training and conversion alike, with both values."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.conversion.options import ConvertOptions
from tandem.errors import UserError
from tandem.models.lora import Lora

LORA = Lora(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), lora_dropout=0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lora_r": 8}, "--lora-r 8 contradicts run, whose adapters have 4"),
        ({"lora_alpha": 2}, "--lora-alpha 2 contradicts run, whose adapters have 8"),
        (
            {"lora_r": 8, "lora_target_modules": ("q_proj",)},
            "--lora-r 8 .*; --lora-target-modules q_proj contradicts run, whose adapters have q_proj v_proj",
        ),
        ({"lora_target_modules": ("all-linear",)}, "--lora-target-modules all-linear contradicts"),
    ],
)
def test_contradictions(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LORA.check_flags(given, "run")
    with pytest.raises(UserError, match=words):
        ConvertOptions("run", "out", **given).check_adapters(LORA, "run")


def test_what_training_alone_can_state() -> None:
    for given in ({"lora_dropout": 0.0}, {"lora_use_rslora": True}, {"lora_use_dora": True}):
        with pytest.raises(UserError, match="contradicts run, whose adapters have"):
            LORA.check_flags(given, "run")


def test_what_agrees_or_says_nothing() -> None:
    same = {"lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": ("v_proj", "q_proj")}
    silent = {"lora_r": None, "lora_alpha": None, "lora_target_modules": (), "lora_use_dora": False}
    for given in (same, silent):
        LORA.check_flags(given, "run")
    Lora(target_modules="all-linear").check_flags({"lora_target_modules": ("all-linear",)}, "run")
