"""One process of several is refused, whichever launcher started it."""

from __future__ import annotations

import pytest

from tandem.config.settings import Settings
from tandem.errors import UserError
from tandem.parallel.launch import WORLD_SIZE_VARIABLES, require_single_process
from tandem.training.run import train


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"MS_WORKER_NUM": "1", "RANK_SIZE": "1"}])
def test_one_process_is_accepted(environment: dict[str, str]) -> None:
    require_single_process(environment)


@pytest.mark.parametrize("name", WORLD_SIZE_VARIABLES)
def test_a_larger_world_is_refused_before_anything_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"{name}=2: training runs in one process"):
        train(Settings())
