"""Pictures of the load of experts, read by Pillow."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest

from tandem.report.expert_maps import EVEN, IDLE, LESS, MORE, MOST_COLUMNS, expert_maps
from tandem.training.logs.expert_loads import Loads


def pictures(html: str) -> list[np.ndarray]:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [np.asarray(image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def test_a_row_is_an_expert_and_a_column_a_logged_step() -> None:
    steps = [[8, 8, 8, 8], [0, 2, 6, 24], [0, 0, 1, 31]]
    loads = [Loads(n, n, 1, {1: np.array(of), 2: np.array(of[::-1])}) for n, of in enumerate(steps, start=1)]
    html = expert_maps(loads)
    first, second = pictures(html)
    assert first.shape == (4, 3, 3)
    assert [tuple(pixel) for pixel in first[:, 0]] == [EVEN] * 4
    assert tuple(first[0, 1]) == tuple(first[0, 2]) == tuple(first[1, 2]) == IDLE
    assert tuple(first[1, 1]) == LESS  # a quarter
    (alone,) = pictures(expert_maps([Loads(1, 1, 1, {0: np.array([0, 0, 0, 0, 9])})]))
    assert tuple(alone[4, 0]) == MORE  # four times and more
    np.testing.assert_array_equal(first, second[::-1])
    assert "expert 3 has 2.625 times the mean" in html
    assert "3 logged steps, from 1 to 3" in html


def test_long_runs_and_many_experts_make_a_small_page() -> None:
    """As many layers and experts as 30B-A3B, and as many lines as the file can have."""
    random = np.random.default_rng(1)
    layers = {layer: random.poisson(256, 128) for layer in range(48)}
    html = expert_maps([Loads(n, n, 1, layers) for n in range(1, 256)])
    assert len(html) < 2**20
    assert all(picture.shape[0] == 128 and picture.shape[1] <= MOST_COLUMNS for picture in pictures(html))
    assert expert_maps([]) == ""
