"""Parts of the slow suite, for machines and people with less time than all of it takes: `make test-slow PART=kills`.

`@pytest.mark.slow(PART)` puts a test into one. On two free cores each part is meant to take at most 20 minutes.
"""

from __future__ import annotations

import pytest

PARTS = {
    "sizes": "real sizes: conversions, data, memory, a real model; the README's commands, and example scripts",
    "users": "what users do, from the first step to the last: guide, scripts, notebooks, quickstart",
    "layouts": "layouts of two and four processes: adapters, experts, preferences, and a NaN in them",
    "eight": "layouts of eight processes",
    "matrix": "all combinations of layouts of two and four processes on PyTorch, and fp16 on both frameworks",
    "matrix-mindspore": "the same combinations on MindSpore",
    "jobs": "other jobs: resuming elsewhere, launchers, Megatron, kernels",
    "answers": "what uses a model: generation, sessions, servers, evaluation, benchmarks of models and of devices",
    "signals": "signals at any time, and launchers that end",
    "kills": "kills, hangs and NaN, and going on after them; signals to each rank on PyTorch",
}


def parts_of(item: pytest.Item) -> list[str]:
    """The parts that a slow test names; one is right."""
    return [part for mark in item.iter_markers("slow") for part in mark.args or ("no part",)]


def misplaced(items: list[pytest.Item]) -> list[str]:
    """Slow tests that are not in exactly one known part, and where they say they are."""
    return [
        f"{item.nodeid}: {', '.join(parts)}"
        for item in items
        if (parts := parts_of(item)) and (len(parts) > 1 or parts[0] not in PARTS)
    ]
