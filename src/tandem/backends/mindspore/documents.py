"""The documents of a micro-batch, in the form that the attention kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from tandem.data.batch import MicroBatch
from tandem.models.config import ModelConfig
from tandem.models.rotary import cos_sin


@dataclass(frozen=True)
class Documents:
    """Where documents lie in a micro-batch, and the rotary angles of its tokens.

    Attributes:
        cu_seqlens: int32 [documents + 1], from 0 to t.
        cos, sin: fp32 [t, kv_channels].
    """

    cu_seqlens: np.ndarray
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, config: ModelConfig, micro_batch: MicroBatch) -> Documents:
        cos, sin = cos_sin(config, micro_batch.position_ids)
        return cls(micro_batch.cu_seqlens, Tensor.from_numpy(cos), Tensor.from_numpy(sin))
