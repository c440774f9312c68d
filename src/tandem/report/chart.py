"""Line charts as inline SVG. They need no script to be seen, and fetch nothing."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 30
POINTS = 600  # the most points of a line; a line with more shows averages
TICKS = 5


@dataclass(frozen=True)
class Series:
    """A line. `run` is its colour; `faint` draws it thin, behind a smoothed line; `dots` marks each point, on a dashed
    line."""

    name: str
    run: int
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dots: bool = False


def both_scales(title: str, series: Sequence[Series], note: str = "") -> str:
    """Two figures of the same lines: the page shows one of them, by its switch for a logarithmic scale."""
    return line_chart(title, series, note, kind="linear") + line_chart(title, series, note, kind="log")


def line_chart(title: str, series: Sequence[Series], note: str = "", kind: Literal["", "linear", "log"] = "") -> str:
    """A figure with one chart; an empty string when no series has a point.

    The range of values leaves out spikes: values that only one or two points have. The note counts what lies outside.
    The figure also has its points as data. With them, the page's script shows the values at the pointer.

    Args:
        kind: "log" draws values on a logarithmic scale; those that are not positive are left out. Both kinds are the
            class of the figure.
    """
    drawn = [thinned(one, positive=kind == "log") for one in series]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return ""
    scale: Callable[[float], float] = math.log10 if kind == "log" else lambda value: value
    visible = [point for one in drawn for point in one.points]
    x_low, x_high = _range([x for x, _ in visible], pad=0.0)
    ranged = [one for one in drawn if not one.faint or len(drawn) == 1]
    y_low, y_high = _range([scale(y) for one in ranged for y in without_spikes([y for _, y in one.points])], pad=0.06)
    outside = sum(not y_low <= scale(y) <= y_high for one in ranged for _, y in one.points)

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def place(x: float, y: float) -> tuple[float, float]:
        return across(x), HEIGHT - BOTTOM - (scale(y) - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in log_ticks(y_low, y_high) if kind == "log" else ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(x_low, x_high, whole=True):
        x = across(tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{number(tick)}</text>')
    for one in drawn:
        corners = [place(x, y) for x, y in one.points]
        classes = f"run{one.run}{' faint' if one.faint else ''}{' dashed' if one.dots else ''}"
        parts.append(f'<path class="line {classes}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in corners)}"/>')
        if one.dots or len(corners) == 1:
            parts += [f'<circle class="dot {classes}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in corners]
    hover = [
        {
            "name": one.name,
            "run": one.run,
            "points": [(x, float(f"{y:.6g}"), *(round(c, 1) for c in place(x, y))) for x, y in one.points],
        }
        for one in drawn
        if not one.faint
    ]
    left_out = f"points outside the chart: {outside:,}" if outside else ""
    notes = "; ".join(filter(None, (note, left_out)))
    caption = f"<figcaption>{escape(title)}<small>{escape(notes)}</small></figcaption>"
    clip = "clip-" + re.sub(r"\W+", "-", title) + kind
    lines, axes = _of_class(parts, "line", "dot"), _of_class(parts, "grid", "tick")
    return (
        f'<figure class="{kind}" data-series="{escape(json.dumps(hover, separators=(",", ":")))}">{caption}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><clipPath id="{clip}">'
        f'<rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 6}" height="{HEIGHT - TOP - BOTTOM + 8}"/>'
        f'</clipPath>{axes}<g clip-path="url(#{clip})">{lines}</g>'
        f'<path class="cursor" d=""/></svg><output></output></figure>'
    )


def without_spikes(values: Sequence[float]) -> list[float]:
    """The median of each five neighbours: what one or two values alone reach is gone. Ends have fewer neighbours.

    >>> without_spikes([3.0, 2.0, 900.0, 2.0, 1.0])
    [3.0, 2.5, 2.0, 2.0, 2.0]
    """
    windows = (values[max(0, place - min(place, 2)) : place + 3] for place in range(len(values)))
    return [statistics.median(window) for window in windows]


def thinned(series: Series, positive: bool = False) -> Series:
    """The series with at most POINTS points: the mean of each group of points, at the last x of the group.

    Values that are not finite are left out, and with `positive` those that are not above 0.
    """
    points = [(x, y) for x, y in series.points if math.isfinite(y) and (y > 0 or not positive)]
    group_size = -(-len(points) // POINTS)
    if group_size > 1:
        groups = [points[i : i + group_size] for i in range(0, len(points), group_size)]
        points = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    return Series(series.name, series.run, points, series.faint, series.dots)


def smoothed(points: Sequence[tuple[float, float]], weight: float) -> list[tuple[float, float]]:
    """Exponential moving average, corrected for its start as Adam's moments are."""
    mean, total, averages = 0.0, 0.0, []
    for x, y in points:
        if math.isfinite(y):
            mean = weight * mean + (1 - weight) * y
            total = weight * total + (1 - weight)
            averages.append((x, mean / total))
    return averages


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About TICKS round numbers from `low` to `high`: multiples of 1, 2, 2.5 or 5 times a power of ten.

    >>> ticks(0.0, 10.0)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [round(count * step, 12) for count in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from 10**low to 10**high: powers of ten, or ticks of equal distance where there are not two.

    >>> log_ticks(-0.1, 2.2)
    [1.0, 10.0, 100.0]
    """
    powers = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    if len(powers) > 2 * TICKS:
        powers = powers[:: -(-len(powers) // TICKS)]
    return powers if len(powers) > 1 else [tick for tick in ticks(10.0**low, 10.0**high) if tick > 0]


def number(value: float) -> str:
    """A number in a short form.

    >>> [number(value) for value in (12000, 3_500_000, 0.002, 1e-6)]
    ['12k', '3.5M', '0.002', '1e-6']
    """
    for bound, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= bound:
            return f"{value / (1e3 if sign == 'k' else bound):.4g}{sign}"
    if value and abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.4g}"


def _range(values: Sequence[float], pad: float) -> tuple[float, float]:
    """The range of an axis: a little more than from the smallest to the largest value; never empty."""
    low, high = min(values), max(values)
    if low == high:
        spread = abs(low) * 0.1 or 1.0
        return low - spread, high + spread
    return low - pad * (high - low), high + pad * (high - low)


def _of_class(parts: Sequence[str], *names: str) -> str:
    return "".join(part for part in parts if any(f'class="{name}' in part for name in names))
