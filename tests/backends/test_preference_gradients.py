"""Both backends follow the gradients of preferences, packed, as transformers and autograd compute them, padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import Reference, assert_close_gradients, toy_weights

from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.config.settings import PreferenceSettings
from tandem.data.batch import CHOSEN, IGNORE, REJECTED, Answers, MicroBatch, Sample, collate
from tandem.models.config import ModelConfig
from tandem.training.objectives import RankBatch
from tandem.training.preferences import objective_of, without_unweighted
from toys import TOYS

BETA, RATIO = 0.3, 0.5
LENGTHS = [((5, 4), (5, 9)), ((2, 1), (3, 6)), ((7, 3), (7, 3))]  # of each pair: prompt and answer, twice


def micro_batches(config: ModelConfig) -> list[MicroBatch]:
    generator = np.random.default_rng(0)
    samples = []
    for pair in LENGTHS:
        lengths = tuple(prompt + answer for prompt, answer in pair)
        tokens = [generator.integers(0, config.vocab_size, length, dtype=np.int32) for length in lengths]
        labels = [np.append(one[1:], np.int32(IGNORE)) for one in tokens]
        for one, (prompt, _) in zip(labels, pair):
            one[: prompt - 1] = IGNORE
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        reference = -5.0 * np.array([answer for _, answer in pair])
        answers = Answers(np.array([CHOSEN, REJECTED], np.int8), reference)
        samples.append(Sample(np.concatenate(tokens), np.concatenate(labels), positions, lengths, answers))
    return [collate(samples[:2]), collate(samples[2:])]


def loss_of_padded(reference: Reference, batches: list[MicroBatch], stage: str) -> torch.Tensor:
    """The loss of all documents as rows of one batch, padded to the right: of DPO, or of SimPO (arXiv 2405.14734)."""
    rows = [
        (batch.tokens[start:stop], batch.labels[start:stop])
        for batch in batches
        for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:])
    ]
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for row, (tokens, of_row) in enumerate(rows):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        labels[row, : len(tokens)] = torch.from_numpy(of_row)
        mask[row, : len(tokens)] = 1
    logits = reference.model(input_ids=ids, attention_mask=mask).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    if stage == "simpo":
        means = -losses.sum(1) / (labels != IGNORE).sum(1)
        return -torch.nn.functional.logsigmoid(BETA * (means[0::2] - means[1::2]) - BETA * RATIO).mean()
    known = np.concatenate([batch.answers.reference for batch in batches if batch.answers is not None])
    ratios = -losses.sum(1) - torch.from_numpy(known)
    return -torch.nn.functional.logsigmoid(BETA * (ratios[0::2] - ratios[1::2])).mean()


@pytest.mark.parametrize(
    ("toy", "stage"), [("qwen3-tied", "dpo"), ("llama", "dpo"), ("qwen3-moe", "dpo"), ("qwen3-moe", "simpo")]
)
def test_packed_pairs_have_the_gradients_of_padded_ones(framework: str, toy: str, stage: str) -> None:
    source = toy_weights(TOYS[toy])
    batches = micro_batches(source.config)
    engine = create_engine(framework, source.config, EngineSettings(device="cpu"))
    engine.load_weights(source)
    settings = PreferenceSettings(dpo_beta=BETA, simpo_beta=BETA, gamma_beta_ratio=RATIO)
    objective = objective_of(stage, settings)
    weighed = objective(engine.log_probabilities(batches), RankBatch(batches, 0))
    _, gradients = engine.loss_and_gradients(*without_unweighted(batches, weighed.weights))

    reference = Reference(source)
    loss = loss_of_padded(reference, batches, stage)
    loss.backward()
    found = {name: p.grad.numpy() for name, p in reference.model.named_parameters() if p.grad is not None}
    assert weighed.loss == pytest.approx(loss.item(), rel=1e-5)
    assert_close_gradients(gradients, reference._to_mcore(found), rtol=1e-4)
