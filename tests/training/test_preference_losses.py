"""Every loss of preferences, its gradient and its metrics equal TRL's code, fed with the same log-probabilities."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.config.settings import PreferenceSettings
from tandem.data.batch import CHOSEN, IGNORE, MISMATCHED, REJECTED, Answers, MicroBatch, Sample, collate
from tandem.training.objectives import RankBatch, Weighed
from tandem.training.preferences import objective_of, without_unweighted

TOLERANCE = 1e-5
PAIR = (CHOSEN, REJECTED)


def batches_of(pairs: list[list[tuple[int, int]]], roles: list[tuple[int, ...]], seed: int = 0) -> list[MicroBatch]:
    """Micro-batches of documents with these numbers of tokens in prompt and answer, each pair with random references.

    The log-probabilities of references are about those of `log_probabilities`.
    """
    generator = np.random.default_rng(seed)
    samples = []
    for documents, of_pair in zip(pairs, roles, strict=True):
        labels, lengths = [], []
        for prompt, answer in documents:
            labels += [IGNORE] * (prompt - 1) + generator.integers(0, 50, answer).tolist() + [IGNORE]
            lengths.append(prompt + answer)
        tokens = generator.integers(0, 50, len(labels), dtype=np.int32)
        reference = -np.array([answer for _, answer in documents]) * generator.uniform(1, 3, len(documents))
        answers = Answers(np.array(of_pair, np.int8), reference)
        samples.append(Sample(tokens, np.array(labels, np.int32), tokens, tuple(lengths), answers))
    return [collate(samples[:2]), collate(samples[2:])]


def log_probabilities(batches: list[MicroBatch], seed: int = 1) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [np.where(b.labels == IGNORE, 0.0, -generator.exponential(2.0, len(b.labels))) for b in batches]


PAIRS = batches_of([[(3, 5), (3, 2)], [(2, 1), (2, 9)], [(4, 4), (4, 4)]], [PAIR] * 3)


def weigh(stage: str, batches: list[MicroBatch], **settings: Any) -> tuple[Weighed, list[np.ndarray]]:
    values = log_probabilities(batches)
    objective = objective_of(stage, PreferenceSettings(**settings))
    return objective(values, RankBatch(batches, sum(batch.trained_tokens for batch in batches))), values


class Padded:
    """Documents as TRL gets them: a row each, padded to the right, in TRL's order of rows."""

    def __init__(self, batches: list[MicroBatch], values: list[np.ndarray], *roles: int) -> None:
        self.places = []
        for role in roles:
            for number, batch in enumerate(batches):
                bounds = zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist())
                assert batch.answers is not None
                for bound, of_document, reference in zip(bounds, batch.answers.roles, batch.answers.reference):
                    if of_document == role:
                        self.places.append((number, *bound, float(reference)))
        longest = max(stop - start for _, start, stop, _ in self.places)
        self.mask = torch.zeros(len(self.places), longest, dtype=torch.long)
        log_probs = torch.zeros(len(self.places), longest - 1)
        for row, (number, start, stop, _) in enumerate(self.places):
            trained = torch.from_numpy(batches[number].labels[start : stop - 1] != IGNORE)
            self.mask[row, 1 : stop - start] = trained.long()
            log_probs[row, : stop - start - 1] = torch.from_numpy(values[number][start : stop - 1])
        self.log_probs = log_probs.requires_grad_()
        self.reference = torch.tensor([reference for *_, reference in self.places])

    @property
    def sums(self) -> torch.Tensor:
        return self.log_probs.sum(1)

    @property
    def means(self) -> torch.Tensor:
        return self.sums / self.mask.sum(1)

    def outputs(self) -> SimpleNamespace:
        nothing = torch.zeros_like(self.log_probs)
        top = nothing.bool()
        return SimpleNamespace(log_probs=self.log_probs, entropy=nothing, mean_logits=nothing, is_top1=top)

    def inputs(self, prefix: str = "") -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask", "completion_mask")
        return {f"{prefix}{name}": self.mask.clone() for name in names}

    def assert_gradients(self, weights: list[np.ndarray]) -> None:
        """Minus the derivative by each log-probability is our weight."""
        gradient = self.log_probs.grad if self.log_probs.grad is not None else torch.zeros_like(self.log_probs)
        for row, (number, start, stop, _) in enumerate(self.places):
            ours = -weights[number][start : stop - 1]
            theirs = (gradient[row] * self.mask[row, 1:])[: stop - start - 1].numpy()
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def trainer_of(kind: type, **values: Any) -> Any:
    """A trainer of TRL without its model, with only what computing a loss needs."""
    trainer = kind.__new__(kind)
    itself: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    accelerator = SimpleNamespace(device="cpu", gather=itself, gather_for_metrics=itself)
    common = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in {**common, **values}.items():
        object.__setattr__(trainer, name, value)
    return trainer


def assert_metrics(weighed: Weighed, theirs: dict[str, list[float]], *names: str) -> None:
    for name in names:
        assert weighed.metrics[name] == pytest.approx(theirs[name][0], rel=TOLERANCE, abs=TOLERANCE), name


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("sigmoid", {}),
        ("hinge", {"dpo_beta": 0.5}),
        ("ipo", {"dpo_beta": 0.3}),
        ("robust", {"dpo_label_smoothing": 0.2}),
        ("apo_zero", {}),
        ("sigmoid_norm", {"dpo_beta": 2.0}),
    ],
)
def test_dpo_equals_trl(loss_type: str, settings: dict[str, float]) -> None:
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    weighed, values = weigh("dpo", PAIRS, dpo_loss_type=loss_type, **settings)
    padded = Padded(PAIRS, values, CHOSEN, REJECTED)
    trainer = trainer_of(
        dpo.DPOTrainer,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=settings.get("dpo_beta", 0.1),
        label_smoothing=settings.get("dpo_label_smoothing", 0.0),
        use_weighting=False,
    )
    chosen, rejected = padded.reference.chunk(2)
    inputs = {**padded.inputs(), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = trainer._compute_loss(lambda **_: padded.outputs(), inputs, False)
    loss.backward()
    assert weighed.loss == pytest.approx(loss.item(), rel=TOLERANCE)
    padded.assert_gradients(weighed.weights)
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    assert_metrics(weighed, trainer._metrics["train"], *names, "logps/chosen", "logps/rejected")


def test_label_smoothing_and_pref_ftx_follow_their_formula() -> None:
    """TRL's sigmoid has neither: -(1 - e) log s(bd) - e log s(-bd), and the chosen answer's mean loss per token."""
    weighed, values = weigh("dpo", PAIRS, dpo_label_smoothing=0.3, pref_ftx=0.7)
    padded = Padded(PAIRS, values, CHOSEN, REJECTED)
    (chosen, rejected), (ref_chosen, ref_rejected) = padded.sums.chunk(2), padded.reference.chunk(2)
    x = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    log_sigmoid = torch.nn.functional.logsigmoid
    loss = (-0.7 * log_sigmoid(x) - 0.3 * log_sigmoid(-x) - 0.7 * padded.means.chunk(2)[0]).mean()
    loss.backward()
    assert weighed.loss == pytest.approx(loss.item(), rel=TOLERANCE)
    padded.assert_gradients(weighed.weights)


def test_orpo_equals_trl() -> None:
    """TRL's log-odds; the loss of the chosen answer is that of its tokens, as in the paper. TRL adds the prompt's."""
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    weighed, values = weigh("orpo", PAIRS, orpo_beta=0.4)
    padded = Padded(PAIRS, values, CHOSEN, REJECTED)
    chosen, rejected = padded.means.chunk(2)
    trainer = trainer_of(orpo.ORPOTrainer, beta=0.4)
    ratio, chosen_rewards, rejected_rewards, _, _ = trainer.odds_ratio_loss(chosen, rejected)
    loss = -chosen.mean() - ratio.mean()
    loss.backward()
    assert weighed.loss == pytest.approx(loss.item(), rel=TOLERANCE)
    padded.assert_gradients(weighed.weights)
    assert weighed.metrics["rewards/chosen"] == pytest.approx(chosen_rewards.mean().item(), rel=TOLERANCE)
    assert weighed.metrics["rewards/rejected"] == pytest.approx(rejected_rewards.mean().item(), rel=TOLERANCE)
    assert weighed.metrics["logps/chosen"] == pytest.approx(padded.sums.chunk(2)[0].mean().item(), rel=TOLERANCE)


@pytest.mark.parametrize(("loss_type", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0), ("ipo", 0)])
def test_simpo_equals_trl(loss_type: str, smoothing: float) -> None:
    """TRL subtracts the margin for its loss "simpo", which is our sigmoid; hinge and ipo get it as in MindSpeed-LLM."""
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    weighed, values = weigh("simpo", PAIRS, simpo_loss_type=loss_type, simpo_label_smoothing=smoothing)
    padded = Padded(PAIRS, values, CHOSEN, REJECTED)
    chosen, rejected = padded.means.chunk(2)
    trainer = trainer_of(cpo.CPOTrainer, beta=2.5, alpha=0.0, simpo_gamma=1.4 * 2.5, label_smoothing=smoothing)
    trainer.loss_type = "simpo" if loss_type == "sigmoid" else loss_type
    shift = 0.0 if loss_type == "sigmoid" else 1.4
    losses, chosen_rewards, rejected_rewards = trainer.cpo_loss(chosen - shift, rejected)
    losses.mean().backward()
    assert weighed.loss == pytest.approx(losses.mean().item(), rel=TOLERANCE)
    padded.assert_gradients(weighed.weights)
    assert weighed.metrics["rewards/chosen"] == pytest.approx(chosen_rewards.mean().item() + 2.5 * shift, rel=TOLERANCE)
    assert weighed.metrics["rewards/rejected"] == pytest.approx(rejected_rewards.mean().item(), rel=TOLERANCE)


@pytest.mark.parametrize("kl", ["positive", "negative"])
def test_kto_equals_trl(kl: str) -> None:
    trl = pytest.importorskip("trl.trainer.kto_trainer")
    roles = [(role, MISMATCHED) for role in (CHOSEN, REJECTED, REJECTED)]
    batches = batches_of([[(3, 5), (3, 2)], [(2, 1), (2, 9)], [(4, 4), (4, 4)]], roles)
    values = log_probabilities(batches)
    for batch in batches:
        assert batch.answers is not None
        batch.answers.reference[1::2] -= {"positive": 30, "negative": -30}[kl]
    settings = PreferenceSettings(kto_beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    weighed = objective_of("kto", settings)(values, RankBatch(batches, 0))
    answers, others = Padded(batches, values, CHOSEN, REJECTED), Padded(batches, values, MISMATCHED)
    trainer = trainer_of(
        trl.KTOTrainer,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.7,
    )
    inputs = {**answers.inputs(), **others.inputs("KL_"), "label": torch.tensor([True, False, False])}
    inputs |= {"ref_logps": answers.reference, "ref_KL_logps": others.reference}
    outputs = iter((others.outputs(), answers.outputs()))
    loss = trainer._compute_loss(lambda **_: next(outputs), inputs, False)
    loss.backward()
    assert weighed.loss == pytest.approx(loss.item(), rel=TOLERANCE)
    assert (weighed.metrics["kl"] > 0) == (kl == "positive")
    answers.assert_gradients(weighed.weights)
    others.assert_gradients(weighed.weights)  # none follows the divergence
    names = ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
    assert_metrics(weighed, trainer._metrics["train"], *names)


@pytest.mark.parametrize("stage", ["dpo", "orpo", "simpo", "kto"])
def test_the_split_into_micro_batches_and_ranks_does_not_matter(stage: str) -> None:
    roles = [(CHOSEN, MISMATCHED), (REJECTED, MISMATCHED), (CHOSEN, MISMATCHED)] if stage == "kto" else [PAIR] * 3
    batches = batches_of([[(3, 5), (3, 2)], [(2, 1), (2, 9)], [(4, 4), (4, 4)]], roles)
    whole, values = weigh(stage, batches)
    # As two data ranks: each has a micro-batch, and a sum needs both. The first pass only collects what is summed.
    objective = objective_of(stage, PreferenceSettings())
    collected: list[list[list[float]]] = [[], []]

    def sums_of(rank: int, known: list[list[float]]) -> Callable[[Any], list[float]]:
        numbers = iter(range(9))

        def total(given: Any) -> list[float]:
            number = next(numbers)
            collected[rank][number:] = [list(given)]
            return known[number] if number < len(known) else list(given)

        return total

    known: list[list[float]] = []
    for _ in range(2):  # what is summed second depends on the first sums
        parts = [objective([values[rank]], RankBatch([batches[rank]], 0, sums_of(rank, known))) for rank in range(2)]
        known = [np.add(*each).tolist() for each in zip(*collected)]
    parts = [objective([values[rank]], RankBatch([batches[rank]], 0, sums_of(rank, known))) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert part.loss == pytest.approx(whole.loss, rel=1e-12)
        assert part.metrics == pytest.approx(dict(whole.metrics), rel=1e-12)
        np.testing.assert_allclose(part.weights[0], whole.weights[rank], rtol=1e-12)


def test_an_unchanged_policy_starts_at_ln_2() -> None:
    values = log_probabilities(PAIRS)
    batches = []
    for batch, of_tokens in zip(PAIRS, values):
        assert batch.answers is not None
        sums = np.add.reduceat(of_tokens, batch.cu_seqlens[:-1])
        batches.append(dataclasses.replace(batch, answers=dataclasses.replace(batch.answers, reference=sums)))
    weighed = objective_of("dpo", PreferenceSettings())(values, RankBatch(batches, 0))
    assert weighed.loss == pytest.approx(math.log(2), abs=1e-15)
    assert weighed.metrics["rewards/margins"] == 0


def test_documents_without_a_weight_are_left_out() -> None:
    """As the mismatched answers of KTO, and pairs that a hinge is satisfied with."""
    weights = [np.where(batch.labels == IGNORE, 0.0, 1.0) for batch in PAIRS]
    weights[0][: PAIRS[0].cu_seqlens[1]] = 0.0
    weights[1][:] = 0.0
    batches, kept = without_unweighted(PAIRS, weights)
    np.testing.assert_array_equal(batches[0].lengths, PAIRS[0].lengths[1:])
    np.testing.assert_array_equal(batches[0].tokens, PAIRS[0].tokens[PAIRS[0].cu_seqlens[1] :])
    np.testing.assert_array_equal(kept[0], weights[0][PAIRS[0].cu_seqlens[1] :])
    assert batches[1] is PAIRS[1]  # a pipeline needs every micro-batch
