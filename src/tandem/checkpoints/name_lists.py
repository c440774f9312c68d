"""Lists of tensor names in a line: a model has hundreds, and most differ in the number of their layer only."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import groupby

from tandem.errors import UserError

MOST_PATTERNS = 12  # shown in a message: enough for all kinds of a layer; the rest is counted
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def in_a_line(names: Collection[str]) -> str:
    """The names, with numbers of layers drawn together, and the rest counted when they are many.

    >>> in_a_line(["norm.weight", "layers.0.up", "layers.1.up", "layers.3.up"])
    'layers.0-1,3.up, norm.weight'
    >>> in_a_line("abcdefghijklmnop")
    'a, b, c, d, e, f, g, h, i, j, k, l and 4 more'
    """
    numbers: dict[str, list[int]] = {}
    for name in sorted(names):
        found = NUMBER.search(name)
        numbers.setdefault(NUMBER.sub("{}", name, count=1), []).extend([int(found[0])] if found else [])
    shown = dict(list(numbers.items())[:MOST_PATTERNS])
    text = ", ".join(pattern.replace("{}", numbers_in_a_line(found), 1) for pattern, found in shown.items())
    rest = len(names) - sum(max(1, len(found)) for found in shown.values())
    return f"{text} and {rest:,} more" if rest else text


def check_names(where: str, actual: set[str], expected: set[str]) -> None:
    """Raise UserError, with the names that are missing and those that are left over, in a line."""
    missing, extra = expected - actual, actual - expected
    if missing == expected and expected and extra:
        raise UserError(
            f"{where}: none of the {len(expected):,} tensors that the config implies is there, such as "
            f"{min(expected)}; there are {len(extra):,} others: {in_a_line(extra)}"
        )
    parts = [f"{label}: {in_a_line(names)}" for label, names in (("missing", missing), ("left over", extra)) if names]
    if parts:
        raise UserError(f"{where}: the tensors do not match the config. {'; '.join(parts)}")


def numbers_in_a_line(numbers: Iterable[int]) -> str:
    """Neighbours as a range.

    >>> numbers_in_a_line([0, 1, 2, 5])
    '0-2,5'
    """
    runs = groupby(enumerate(sorted(numbers)), key=lambda item: item[1] - item[0])
    ends = [(run[0], run[-1]) for run in ([number for _, number in group] for _, group in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
