"""Whether a conversion computes what its source computes: logits on fixed tokens, in fp32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.arrays import same_bits
from tandem.checkpoints.interface import TensorSource
from tandem.data.batch import MicroBatch, Sample, collate
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table

TOLERANCE = 1e-4  # largest difference of two logits
LENGTHS = (48, 16)  # of the documents on which they are compared


@dataclass(frozen=True)
class Verification:
    """How far the logits of two sources lie apart over `tokens` positions."""

    tokens: int
    max_difference: float
    top1_agreement: float

    @property
    def passed(self) -> bool:
        return self.max_difference <= TOLERANCE and self.top1_agreement == 1.0

    def __str__(self) -> str:
        return (
            f"logits on {self.tokens} tokens: largest difference {self.max_difference:.2e}, "
            f"top-1 agreement {self.top1_agreement:.1%}"
        )


def verify(source: TensorSource, result: TensorSource, ai_framework: str) -> Verification:
    """Compare the logits of two sources of the same model.

    Raises:
        UserError: the configs differ, or the logits do; the first field or tensor that differs is named.
    """
    if source.config != result.config:
        left, right = source.config.to_dict(), result.config.to_dict()
        different = [f"{name}: {left[name]}, then {right[name]}" for name in left if left[name] != right[name]]
        raise UserError(f"{result.location} is not the model of {source.location}. {'; '.join(different)}")
    engine = create_engine(ai_framework, source.config, EngineSettings(training=False, device="cpu"))
    batch = fixed_batch(source.config)
    engine.load_weights(source)
    expected = engine.logits(batch)
    engine.load_weights(result)
    found = engine.logits(batch)
    agreement = float(np.mean(found.argmax(axis=1) == expected.argmax(axis=1)))
    verification = Verification(len(found), float(np.abs(found - expected).max()), agreement)
    if not verification.passed:
        raise UserError(
            f"{result.location} does not compute what {source.location} computes: {verification}. "
            f"{first_difference(source, result)}"
        )
    return verification


def fixed_batch(config: ModelConfig) -> MicroBatch:
    """The same random tokens for every model of one vocabulary."""
    random = np.random.default_rng(0)
    lengths = [min(length, config.max_position_embeddings) for length in LENGTHS]
    drawn = [random.integers(0, config.vocab_size, length, dtype=np.int32) for length in lengths]
    return collate([Sample(tokens, tokens, np.arange(len(tokens), dtype=np.int32), (len(tokens),)) for tokens in drawn])


def first_difference(source: TensorSource, result: TensorSource) -> str:
    """A sentence that names the first tensor, in the model's order, that is not the same."""
    for name in tensor_table(source.config):
        left, right = source.read(name), result.read(name)
        if left.dtype.name != right.dtype.name:
            return f"The first differing tensor is {name}: {left.dtype} became {right.dtype}"
        if not same_bits(left, right):
            return f"The first differing tensor is {name}"
    return "Every tensor is the same: the difference is the computation's own"
