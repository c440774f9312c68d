"""What is compared with Megatron's: logits of a PyTorch or MindSpore engine."""

from __future__ import annotations

import numpy as np

from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.interface import TensorSource
from tandem.data.batch import MicroBatch


def our_logits(source: TensorSource, batch: MicroBatch, framework: str = "torch") -> np.ndarray:
    engine = create_engine(framework, source.config, EngineSettings(training=False, device="cpu"))
    engine.load_weights(source)
    return engine.logits(batch)
