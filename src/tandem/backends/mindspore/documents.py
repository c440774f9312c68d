"""The documents, tokens and labels of a micro-batch, in the form that the kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from mindspore import Tensor

# An array of the host where the kernels compute on it, otherwise a tensor on the device (`Kernels.to_device`).
Array = Any


@dataclass(frozen=True)
class Documents:
    """Where documents lie in a micro-batch, and the rotary angles of its tokens.

    Attributes:
        cu_seqlens: int32 [documents + 1], from 0 to t.
        cos, sin: [t, kv_channels], fp32 on CPU, and in the model's dtype elsewhere.
    """

    cu_seqlens: np.ndarray
    cos: Tensor
    sin: Tensor

    @cached_property
    def negative_sin(self) -> Tensor:
        """For rotating back."""
        return -self.sin

    def groups(self, most: int) -> list[tuple[slice, list[int]]]:
        """At most `most` documents at a time: their tokens, and where each of them ends, counted from the first.

        Documents without tokens are left out.
        """
        bounds = np.unique(self.cu_seqlens).tolist()
        firsts = range(0, len(bounds) - 1, most)
        cuts = [bounds[first : first + most + 1] for first in firsts]
        return [(slice(cut[0], cut[-1]), [end - cut[0] for end in cut[1:]]) for cut in cuts]


@dataclass(frozen=True)
class Lookup:
    """The tokens whose vectors this rank has.

    Attributes:
        tokens: their numbers among this rank's rows of the embedding, [n].
        here: their places in the micro-batch, [n]; None for all in order.
        count: tokens of the micro-batch.
    """

    tokens: Array
    here: Array | None
    count: int


@dataclass(frozen=True)
class Targets:
    """What the loss needs besides logits.

    Attributes:
        labels: of the rows that count, [n].
        local: the same counted from this rank's first row of the vocabulary, and 0 where another rank has the label.
        present: 1 where this rank has the label, else 0, [n, 1]; None where it has all.
        weights: of the rows in the loss, [n]; undefined in evaluation.
        scale, shares: the same as one factor times shares between -1 and 1, [n, 1] (`split_scale`).
    """

    labels: Array
    local: Array
    present: Array | None
    weights: Array
    scale: float
    shares: Array

    def part(self, rows: slice) -> Targets:
        """The targets of some of the rows."""
        present = None if self.present is None else self.present[rows]
        of_rows = (self.labels[rows], self.local[rows], present, self.weights[rows])
        return Targets(*of_rows, self.scale, self.shares[rows])
