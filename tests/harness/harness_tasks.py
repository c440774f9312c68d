"""The small tasks in tests/harness/tasks, and the form of answers to them."""

from __future__ import annotations

from typing import Any

NAMES = ("toy_choices", "toy_letters", "toy_continues", "toy_rolling", "toy_answers")

Samples = dict[str, list[dict[str, Any]]]
