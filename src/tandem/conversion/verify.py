"""Whether a conversion computes what its source computes: logits on fixed tokens, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem.backends import create_engine, transformers_logits
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.formats.arrays import same_bits
from tandem.checkpoints.interface import TensorSource, dtype_name
from tandem.data.batch import MicroBatch, Sample, collate
from tandem.errors import UserError
from tandem.files.publish import final_place
from tandem.frameworks import has_transformers
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, tensor_table

TOLERANCE = 1e-4  # largest difference of two logits, as a fraction of the largest logit where that is above 1
TRANSFORMERS = "transformers"  # as a reader
LENGTHS = (48, 16)  # of the documents on which logits are compared


@dataclass(frozen=True)
class Verification:
    """How much the logits of two sources differ over `tokens` positions, and what computed each."""

    tokens: int
    max_difference: float
    top1_agreement: float
    scale: float
    readers: tuple[str, str]

    @property
    def passed(self) -> bool:
        return self.max_difference <= TOLERANCE * max(1.0, self.scale) and self.top1_agreement == 1.0

    def __str__(self) -> str:
        return (
            f"logits on {self.tokens} tokens: largest difference {self.max_difference:.2e}, "
            f"top-1 agreement {self.top1_agreement:.1%}"
        )

    def describe_readers(self) -> str:
        source, result = self.readers
        if source == result:
            return f"{source} (both sides are read by Tandem)"
        return f"{source} (source) and {result} (result)"


def verify(source: TensorSource, result: TensorSource, ai_framework: str) -> Verification:
    """Compare the logits of two sources of the same model.

    Where transformers is installed, it reads and computes a side that is a Hugging Face folder: an error of our own
    reader would be the same on both sides, and so would not be seen.

    Raises:
        UserError: the configs differ, or the logits do; the first field or tensor that differs is named.
    """
    where = final_place(result.location)
    if source.config != result.config:
        left, right = source.config.to_dict(), result.config.to_dict()
        different = [f"{name}: {left[name]}, then {right[name]}" for name in left if left[name] != right[name]]
        raise UserError(f"{where} is not the model of {source.location}. {'; '.join(different)}")
    batch = fixed_batch(source.config)
    engine = create_engine(ai_framework, source.config, EngineSettings(training=False, device="cpu"))

    def compute(side: TensorSource) -> tuple[str, np.ndarray]:
        if side.hf_folder and has_transformers():
            dtype = dtype_name(side.dtype(EMBEDDING))
            return TRANSFORMERS, transformers_logits(side.hf_folder, dtype, batch)
        engine.load_weights(side)
        return ai_framework, engine.logits(batch)

    (source_reader, expected), (result_reader, actual) = compute(source), compute(result)
    verification = Verification(
        tokens=len(actual),
        max_difference=float(np.abs(actual - expected).max()),
        top1_agreement=float(np.mean(actual.argmax(axis=1) == expected.argmax(axis=1))),
        scale=float(np.abs(expected).max()),
        readers=(source_reader, result_reader),
    )
    if not verification.passed:
        raise UserError(
            f"{where} does not compute what {source.location} computes: {verification}. "
            f"{first_difference(source, result)}"
        )
    return verification


def fixed_batch(config: ModelConfig) -> MicroBatch:
    """The same random tokens for every model of one vocabulary."""
    random = np.random.default_rng(0)
    lengths = [min(length, config.max_position_embeddings) for length in LENGTHS]
    return collate([document(random.integers(0, config.vocab_size, length, dtype=np.int32)) for length in lengths])


def document(tokens: Sequence[int] | np.ndarray) -> Sample:
    """One document, of which only logits are asked."""
    ids = np.asarray(tokens, np.int32)
    return Sample(ids, ids, np.arange(len(ids), dtype=np.int32), (len(ids),))


def first_difference(source: TensorSource, result: TensorSource) -> str:
    """A sentence that names the first tensor, in the model's order, that differs."""
    for name in tensor_table(source.config):
        left, right = source.read(name), result.read(name)
        if left.dtype.name != right.dtype.name:
            return f"The first differing tensor is {name}: {left.dtype} became {right.dtype}"
        if not same_bits(left, right):
            return f"The first differing tensor is {name}"
    return "Every tensor is the same: the difference comes from the computation"
