"""Flags that contradict adapters stop training, conversion and generation alike, with both values."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tandem.cli.arguments import parse
from tandem.config.settings import Settings
from tandem.conversion.options import ConvertOptions
from tandem.errors import UserError
from tandem.inference.options import LoadOptions
from tandem.models.lora import Lora
from toys import toy_config

LORA = Lora(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), lora_dropout=0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lora_r": 8}, "--lora-r 8 contradicts run, whose adapters have r 4: leave it out"),
        ({"lora_alpha": 2}, "--lora-alpha 2 contradicts run, whose adapters have lora_alpha 8"),
        (
            {"lora_r": 8, "lora_target_modules": ("q_proj",)},
            "--lora-r 8 .*\n--lora-target-modules q_proj contradicts run, whose adapters have target_modules q_proj v_",
        ),
        ({"lora_target_modules": ("all-linear",)}, "--lora-target-modules all-linear contradicts"),
    ],
)
def test_contradictions(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LORA.check_flags(given, "run")
    with pytest.raises(UserError, match=words):
        ConvertOptions("run", "out", **given).check_adapters(LORA, "run")
    with pytest.raises(UserError, match=words):
        LoadOptions("run", **given).check_adapters(dataclasses.replace(toy_config(), lora=LORA))


def test_what_training_alone_can_state() -> None:
    for given, words in (
        ({"lora_dropout": 0.0}, "--lora-dropout 0 contradicts run, whose adapters have lora_dropout 0.1"),
        ({"lora_use_rslora": True}, "--lora-use-rslora contradicts run, whose adapters have use_rslora false"),
        ({"lora_use_dora": True}, "--lora-use-dora contradicts run, whose adapters have use_dora false"),
    ):
        with pytest.raises(UserError, match=words):
            LORA.check_flags(given, "run")


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_a_switch_that_is_turned_off_contradicts(kind: str) -> None:
    lora = Lora(r=4, **{f"use_{kind}": True})
    settings = parse(Settings, "finetune", "", [f"--no-lora-use-{kind}"])
    with pytest.raises(UserError, match=f"--no-lora-use-{kind} contradicts run, whose adapters have use_{kind} true"):
        lora.check_flags({f"lora_use_{kind}": getattr(settings.lora, f"lora_use_{kind}")}, "run")
    for silent in ([], [f"--lora-use-{kind}"]):
        given = getattr(parse(Settings, "finetune", "", silent).lora, f"lora_use_{kind}")
        lora.check_flags({f"lora_use_{kind}": given}, "run")


def test_flags_without_adapters() -> None:
    with pytest.raises(UserError, match="--lora-r --lora-target-modules: hf has no adapters: give theirs with --lora-"):
        LoadOptions("hf", lora_r=8, lora_target_modules=("q_proj",)).check_adapters(toy_config())
    LoadOptions("hf").check_adapters(toy_config())
    asked = LoadOptions("hf", lora_load="a", lora_r=8, lora_alpha=1.0, lora_target_modules=("q_proj",), bf16=True)
    assert asked.of("other") == LoadOptions("other", bf16=True)


def test_what_agrees_or_says_nothing() -> None:
    same = {"lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": ("v_proj", "q_proj")}
    silent = {"lora_r": None, "lora_alpha": None, "lora_target_modules": (), "lora_use_dora": False}
    for given in (same, silent):
        LORA.check_flags(given, "run")
    Lora(target_modules="all-linear").check_flags({"lora_target_modules": ("all-linear",)}, "run")
