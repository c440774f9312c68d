"""Every shipped recipe is a run that could start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.config.checks import check_settings
from tandem.config.parsing import from_yaml
from tandem.training.schedule import schedule_from

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_consistent(recipe: Path) -> None:
    settings = from_yaml(recipe)
    check_settings(settings)
    schedule = schedule_from(settings.optimizer, settings.training)
    assert schedule.lr(schedule.warmup_samples) == pytest.approx(settings.optimizer.lr)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2
