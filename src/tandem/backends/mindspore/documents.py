"""The documents of a micro-batch, in the form that the attention kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from mindspore import Tensor


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
