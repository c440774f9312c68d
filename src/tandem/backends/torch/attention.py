"""Causal attention, strictly within documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Run:
    """`documents` consecutive documents of `length` tokens each."""

    documents: int
    length: int


class Attention(Protocol):
    """How the tokens of a batch attend."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention's output [t, heads * d] in a layer, from q [t, heads, d], k and v [t, groups, d]."""
        ...


def runs(lengths: Sequence[int]) -> list[Run]:
    """Consecutive documents of equal length, joined.

    >>> runs([5, 5, 3])
    [Run(documents=2, length=5), Run(documents=1, length=3)]
    """
    return [Run(len(list(same)), length) for length, same in groupby(lengths)]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Sequence[Run]) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v. A token attends to its document, up to itself.

    Args:
        q: [t, heads, d]; head i attends with group i // (heads / groups).
        k, v: [t, groups, d].
        packed: the documents that the t tokens are made of.

    Returns:
        [t, heads * d]. Memory is linear in t: matrices of scores are freed block by block.
    """
    sizes = [run.documents * run.length for run in packed]
    parts = zip(packed, q.split(sizes), k.split(sizes), v.split(sizes))
    outputs = [_equal_lengths(run, *part) for run, *part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _equal_lengths(run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One batched call over documents of the same length."""
    q, k, v = (x.unflatten(0, (run.documents, run.length)).transpose(1, 2) for x in (q, k, v))  # [b, heads, s, d]
    output = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).flatten(2).flatten(0, 1)
