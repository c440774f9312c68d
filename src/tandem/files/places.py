"""Whether two paths name the same place, however each is written."""

from __future__ import annotations

import os
from collections.abc import Callable


def resolved(path: str | os.PathLike[str]) -> str:
    """The absolute path without `.`, `..` and symbolic links. Nothing needs to be there."""
    return os.path.realpath(path)


def same_place(
    now: str, before: str, place: str | None = None, is_there: Callable[[str], bool] = os.path.exists
) -> bool:
    """Whether `now` names what an earlier process called `before`.

    A relative path means something else in another folder. So the earlier process also records the `place` that
    `before` resolved to. Where that is gone, the folder around it was moved or is mounted elsewhere; then the same
    words name the same thing.

    >>> same_place("./weights/", "weights")
    True
    >>> same_place("weights", "weights", place="/")
    False
    >>> same_place("weights", "weights", place="/no/longer/here")
    True

    Args:
        place: what `resolved(before)` was then; None when it was not recorded.
        is_there: whether there is something at a place.
    """
    if resolved(now) == (place or resolved(before)):
        return True
    return place is not None and os.path.normpath(now) == os.path.normpath(before) and not is_there(place)
