"""The order of stored sequences in each epoch."""

from __future__ import annotations

import numpy as np


class EpochOrders:
    """Each epoch has all sequences, in a new random order. One generator shuffles all epochs in turn, as upstream.

    Args:
        ids: the numbers of the sequences.
        shuffle: False keeps the stored order.
    """

    def __init__(self, ids: range, seed: int, shuffle: bool) -> None:
        self._ids, self._shuffle = ids, shuffle
        self._random = np.random.RandomState(seed)
        self._orders: list[np.ndarray] = []

    def order(self, epoch: int) -> np.ndarray:
        """The sequence numbers of an epoch in order, int64."""
        while len(self._orders) <= epoch:
            order = np.arange(self._ids.start, self._ids.stop)
            if self._shuffle:
                self._random.shuffle(order)
            self._orders.append(order)
        return self._orders[epoch]
