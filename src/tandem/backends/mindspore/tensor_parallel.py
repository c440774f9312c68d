"""Megatron's tensor parallelism: ranks that share each tensor, with or without the tokens split between them.

Source: "Megatron-LM" (arXiv 1909.08053), section 3; sequence parallelism: "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198), section 4.2. As everywhere here, a function of x returns its value and a
pullback, from the value's gradient to x's. On a single rank all of them are the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Tensor, mint

from tandem.backends.mindspore.communication import Ranks
from tandem.backends.mindspore.documents import Lookup
from tandem.backends.mindspore.weight import Pullback, Weight

if TYPE_CHECKING:  # the kernels take a TensorParallel
    from tandem.backends.mindspore.kernels import Kernels


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share each tensor.

    Attributes:
        sequence: between the blocks each rank holds the residuals and norms of t / size consecutive tokens only.
        vocabulary_rows: rows of embedding and head on the first rank; other ranks have at most as many.
        own_rows: the same on this rank.
    """

    ranks: Ranks
    sequence: bool
    vocabulary_rows: int
    own_rows: int
    kernels: Kernels

    def enter(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """Before a column-split product: all tokens' x, [t, h]; backward sums the ranks' gradients."""
        return (self._gather(x), self._scatter) if self.sequence else (x, self._sum)

    def leave(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """After a row-split product: the sum of the ranks' x [t, h], of this rank's tokens if they are split."""
        return (self._scatter(x), self._gather) if self.sequence else (self._sum(x), _same)

    def embedding(self, lookup: Lookup, weight: Weight) -> tuple[Tensor, Pullback]:
        """This rank's part of the vectors of tokens [t], ready to `leave`. The pullback's result must not be used."""
        vectors, pull = self.kernels.embedding(lookup.tokens, weight)
        if lookup.here is None:
            return vectors, pull

        def backward(gradient: Tensor) -> Tensor:
            pull(self.kernels.select_rows(gradient, lookup.here)[0])
            return gradient

        return self.kernels.place_rows(vectors, lookup.here, lookup.count), backward

    def own_tokens(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The tokens whose vectors this rank has, counted from its first, and their places; None for all in order."""
        if self.ranks.group is None:
            return tokens, None
        local = self.local(tokens)
        here = np.flatnonzero((local >= 0) & (local < self.own_rows))
        return local[here], here

    def own_labels(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Labels counted from this rank's first token, and which of them it has, fp32; None for all.

        Those of other ranks are 0.
        """
        if self.ranks.group is None:
            return labels, None
        local = self.local(labels)
        present = (local >= 0) & (local < self.own_rows)
        return np.where(present, local, 0), present.astype(np.float32)

    def local(self, ids: np.ndarray) -> np.ndarray:
        """Ids counted from this rank's first row of the vocabulary; those of other ranks are negative or too large."""
        return ids - self.ranks.rank * self.vocabulary_rows

    def softmax_over_ranks(self, log_sum_exp: np.ndarray, label_logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-sum-exp and label logits over the whole vocabulary, from each rank's part.

        Args:
            log_sum_exp: of each row's logits on this rank, fp32 [n].
            label_logits: of each row's label where it is on this rank, elsewhere 0, fp32 [n].
        """
        if self.ranks.group is None:
            return log_sum_exp, label_logits
        largest = self.ranks.maximum(Tensor(log_sum_exp)).asnumpy()
        exponentials = np.exp(log_sum_exp - largest)
        totals, label_logits = self.ranks.sum(Tensor(np.stack([exponentials, label_logits]))).asnumpy()
        return largest + np.log(totals), label_logits

    def first_largest(self, largest: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The token with the largest logit in the whole vocabulary, int64 [n]; the first of equal ones.

        Args:
            largest: each row's largest logit on this rank, fp32 [n].
            places: its number on this rank, int64 [n].
        """
        ids = places + self.ranks.rank * self.vocabulary_rows
        if self.ranks.group is None:
            return ids
        has_largest = largest == self.ranks.maximum(Tensor(largest)).asnumpy()
        negated = np.where(has_largest, -ids, -np.inf).astype(np.float32)  # which holds the ids exactly
        return (-self.ranks.maximum(Tensor(negated)).asnumpy()).astype(np.int64)

    def _sum(self, x: Tensor) -> Tensor:
        return x if self.ranks.group is None else self.ranks.sum(x)

    def _gather(self, x: Tensor) -> Tensor:
        return mint.cat(self.ranks.gather(x), 0)

    def _scatter(self, x: Tensor) -> Tensor:
        return self.kernels.scatter_rows(self.ranks, x)


def _same(x: Tensor) -> Tensor:
    return x
