"""Pictures of the load of each expert over a run: a small one for each layer. They fetch nothing."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from tandem.report.chart import number
from tandem.training.logs.expert_loads import Loads, merged

MOST_COLUMNS = 100  # of a picture
STEPS = 4  # colours for each doubling of the load
DOUBLINGS = 2  # of the load over its mean that colours tell apart, in both directions
IDLE = (20, 20, 20)
LESS, EVEN, MORE = (0, 90, 160), (245, 245, 242), (213, 94, 0)  # colour-blind readers can tell them apart

STYLE = """
.experts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr));gap:14px}
.experts figure{padding:10px}
.experts img{display:block;width:100%;height:128px;image-rendering:pixelated;border-radius:3px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin:0 5px 0 14px;vertical-align:-1px}
.legend span{white-space:nowrap}
"""


def expert_maps(loads: Sequence[Loads]) -> str:
    """A figure for each layer: a row for each expert, the first on top, and time from left to right.

    A colour tells an expert's tokens over those of equally busy experts. An empty string without loads.
    """
    if not loads:
        return ""
    columns = merged(loads, MOST_COLUMNS)
    colours = palette()
    figures = []
    for layer, of_experts in columns[0].counts.items():
        levels = np.stack([level(column.counts[layer]) for column in columns], axis=1)
        total = np.sum([column.counts[layer] for column in columns], axis=0)
        busiest = int(total.argmax())
        note = f"expert {busiest} has {number(total[busiest] / max(total.mean(), 1e-9))} times the mean"
        title = f"Load of the {len(of_experts)} experts of layer {layer}"
        figures.append(
            f"<figure><figcaption>Layer {layer}<small>{note}</small></figcaption>"
            f'<img alt="{title}" title="{title}" src="{png(levels, colours)}"></figure>'
        )
    first, last = columns[0].first, columns[-1].iteration
    steps = sum(column.steps for column in columns)
    return (
        f"<p><small>A row is an expert, the first on top. From left to right: {steps:,} logged steps, from {first:,} "
        f"to {last:,}. Tokens of an expert over those of equally busy ones: {_legend(colours)}</small></p>"
        f'<div class="experts">{"".join(figures)}</div>'
    )


def level(counts: np.ndarray) -> np.ndarray:
    """The number of each expert's colour, from its tokens: 0 for none, and from 1 on by the logarithm of its load.

    >>> level(np.array([0, 1, 4, 4, 4, 4, 4, 4, 4, 11])).tolist()
    [0, 1, 9, 9, 9, 9, 9, 9, 9, 15]
    """
    share = counts / max(counts.mean(), 1e-9)
    doublings = np.clip(np.log2(np.maximum(share, 1e-9)), -DOUBLINGS, DOUBLINGS)
    return np.where(counts > 0, 1 + np.rint((doublings + DOUBLINGS) * STEPS), 0).astype(np.uint8)


def palette() -> list[tuple[int, int, int]]:
    """The colours of `level`'s numbers."""
    half = DOUBLINGS * STEPS
    less = [_between(LESS, EVEN, step / half) for step in range(half)]
    more = [_between(EVEN, MORE, step / half) for step in range(half + 1)]
    return [IDLE, *less, *more]


def png(levels: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> str:
    """An image of one pixel for each number of `levels` [rows, columns], as a data URI. Format: RFC 2083."""
    rows, columns = levels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in levels)  # 0: the line is not filtered
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(value for colour in colours for value in colour)),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def _between(start: tuple[int, int, int], end: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    first, second, third = (round(a + (b - a) * share) for a, b in zip(start, end))
    return first, second, third


def _legend(colours: Sequence[tuple[int, int, int]]) -> str:
    half = DOUBLINGS * STEPS
    shown = {"none": 0, "a quarter or less": 1, "half": 1 + half // 2, "1": 1 + half, "2": 1 + half * 3 // 2}
    shown["4 and more"] = 1 + 2 * half
    entries = (f'<span><i style="background:rgb{colours[place]}"></i>{name}</span>' for name, place in shown.items())
    return f'<span class="legend">{"".join(entries)}</span>'
