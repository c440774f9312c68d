"""Mixtures of experts: routing, losses that balance experts, and every gradient, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import Reference
from test_engine import build
from torch.nn.functional import cross_entropy, softmax
from toy_work import assert_close_gradients, mean_gradients, mean_weights, toy_batch, toy_weights
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter, load_balancing_loss_func

from tandem.checkpoints.interface import TensorSource
from tandem.data.batch import MicroBatch
from toys import moe_config

RAGGED = (7, 1, 19, 12)


class Routers:
    """The router logits of Hugging Face's layers, of every call until they are taken."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.logits: list[torch.Tensor] = []
        for module in model.modules():
            if isinstance(module, Qwen3MoeTopKRouter):
                module.register_forward_hook(lambda _, __, output: self.logits.append(output[0]))

    def by_layer(self, layers: int) -> list[torch.Tensor]:
        """[t, E] of each layer, over the documents of the micro-batch that was computed."""
        taken, self.logits = self.logits, []
        return [torch.cat(taken[layer::layers]) for layer in range(layers)]


def megatron_aux_loss(logits: torch.Tensor, topk: int) -> torch.Tensor:
    """E / (k T^2) * sum of p_te n_e, written down here once more (Megatron-core, `switch_load_balancing_loss_func`)."""
    probabilities = softmax(logits.float(), dim=-1)
    tokens, experts = logits.shape
    counts = torch.bincount(torch.topk(logits, topk, dim=1).indices.flatten(), minlength=experts)
    return (probabilities.sum(0) * counts).sum() * experts / (topk * tokens**2)


def expected(
    source: TensorSource, batches: list[MicroBatch], aux: float = 0.0, z: float = 0.0, *, pooled: bool = False
) -> tuple[float, dict[str, np.ndarray]]:
    """The mean loss, and the gradients of it plus the balancing losses, by transformers and autograd."""
    reference, experts = Reference(source), source.config.experts
    assert experts is not None
    routers, layers = Routers(reference.model), source.config.num_layers - source.config.dense_layers
    total = torch.tensor(0.0)
    loss = torch.tensor(0.0)
    for batch, weights in zip(batches, mean_weights(batches)):
        losses = cross_entropy(reference.logits(batch), torch.from_numpy(batch.labels).long(), reduction="none")
        loss = loss + (losses * torch.from_numpy(weights)).sum()
        logits = routers.by_layer(layers)
        if pooled:
            balance = load_balancing_loss_func(tuple(logits), experts.num_experts, experts.moe_router_topk)
        else:
            balance = sum(megatron_aux_loss(of_layer, experts.moe_router_topk) for of_layer in logits)
        squares = sum(torch.logsumexp(of_layer, -1).square().mean() for of_layer in logits)
        total = total + (aux * balance + z * squares) / len(batches)
    reference.model.zero_grad()
    (loss + total).backward()
    gradients = {name: p.grad.numpy() for name, p in reference.model.named_parameters()}
    return loss.item(), reference._to_mcore(gradients)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("topk", [1, 2, 3])
def test_logits_and_gradients_equal_transformers(framework: str, topk: int, norm: bool) -> None:
    source = toy_weights(moe_config(moe_router_topk=topk, norm_topk_prob=norm, mlp_only_layers=(2,)))
    batches = [toy_batch(source.config, RAGGED, seed=seed) for seed in (1, 2)]
    loss, gradients = expected(source, batches)
    engine = build(framework, source)
    np.testing.assert_allclose(
        engine.logits(batches[0]), Reference(source).logits(batches[0]).detach().numpy(), atol=1e-5, rtol=0
    )
    actual_loss, actual = mean_gradients(engine, batches)
    assert actual_loss == pytest.approx(loss, abs=1e-5)
    assert_close_gradients(actual, gradients, rtol=1e-5)


@pytest.mark.parametrize("pooled", [False, True], ids=["megatron", "hugging-face"])
def test_balancing_losses_are_in_the_gradient(framework: str, pooled: bool) -> None:
    """Means over micro-batches; not in the loss. Recomputed layers count once."""
    source = toy_weights(moe_config(mlp_only_layers=(2,)))
    batches = [toy_batch(source.config, lengths, seed=1) for lengths in (RAGGED, (24,))]
    loss, gradients = expected(source, batches, aux=0.5, z=0.3, pooled=pooled)
    kind = "pooled_aux_loss" if pooled else "aux_loss"
    settings = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.3}
    actual_loss, actual = mean_gradients(build(framework, source, recompute_layers=2, **settings), batches)
    assert actual_loss == pytest.approx(loss, abs=1e-5)
    assert_close_gradients(actual, gradients, rtol=1e-5)
    off = build(framework, source, **(settings | {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": None}))
    assert_close_gradients(mean_gradients(off, batches)[1], expected(source, batches)[1], rtol=1e-5)


def drop(model: torch.nn.Module, limit: int, policy: str) -> list[int]:
    """Let each expert of Hugging Face's layers keep `limit` tokens: the factors of the others become 0.

    Returns:
        The numbers of those, a number for each call of a layer.
    """
    dropped: list[int] = []

    def limited(_: object, __: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, factors, chosen = output
        kept = torch.zeros_like(factors)
        for expert in range(logits.shape[1]):
            places = (chosen == expert).nonzero().tolist()
            if policy == "probs":
                places.sort(key=lambda place: -factors[tuple(place)].item())
            for token, number in places[:limit]:
                kept[token, number] = 1.0
        dropped.append(int((kept == 0).sum()))
        return logits, factors * kept, chosen

    for module in model.modules():
        if isinstance(module, Qwen3MoeTopKRouter):
            module.register_forward_hook(limited)
    return dropped


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_experts_with_a_capacity_drop_tokens(framework: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 of 24 tokens' 48 choices for each of 8 experts. The gradient knows nothing of what was dropped."""
    source = toy_weights(moe_config(mlp_only_layers=(2,)))
    batches = [toy_batch(source.config, (24,), seed=seed) for seed in (1, 2)]
    settings = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": policy, "moe_aux_loss_coeff": 0.5}
    engine = build(framework, source, recompute_layers=1, **settings)
    actual_loss, actual = mean_gradients(engine, batches)
    logits = Reference(source).logits(batches[0]).detach().numpy()
    np.testing.assert_allclose(engine.logits(batches[0]), logits, atol=1e-5, rtol=0)  # outside training, none are
    made, dropped = Reference.__init__, list[list[int]]()

    def limited(self: Reference, source: TensorSource) -> None:
        made(self, source)
        dropped.append(drop(self.model, 3, policy))

    monkeypatch.setattr(Reference, "__init__", limited)
    loss, gradients = expected(source, batches, aux=0.5)
    assert actual_loss == pytest.approx(loss, abs=1e-5)
    assert_close_gradients(actual, gradients, rtol=1e-5)
    assert engine.expert_load().dropped == sum(map(sum, dropped)) > 0


@pytest.mark.parametrize("pooled", [False, True], ids=["megatron", "hugging-face"])
def test_the_load_is_that_of_transformers(framework: str, pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of each expert, and both losses summed, also where they are no part of the gradient."""
    source = toy_weights(moe_config(mlp_only_layers=(2,)))
    reference, topk = Reference(source), 2
    routers = Routers(reference.model)
    layers = [layer for layer in range(source.config.num_layers) if layer != 2]
    counts, balancing, z = np.zeros((len(layers), 8), np.int64), 0.0, 0.0
    batches = [toy_batch(source.config, lengths, seed=1) for lengths in (RAGGED, (24,))]
    for batch in batches:
        reference.logits(batch)
        logits = routers.by_layer(len(layers))
        counts += [np.bincount(of_layer.topk(topk).indices.flatten(), minlength=8) for of_layer in logits]
        of_layers = [megatron_aux_loss(of_layer, topk).item() for of_layer in logits]
        balancing += load_balancing_loss_func(tuple(logits), 8, topk).item() if pooled else sum(of_layers)
        z += sum(torch.logsumexp(of_layer, -1).square().mean().item() for of_layer in logits)
    kind = "pooled_aux_loss" if pooled else "none"
    engine = build(framework, source, recompute_layers=2, moe_router_load_balancing_type=kind)
    mean_gradients(engine, batches)
    reads, join = [], engine._joined_on_host
    monkeypatch.setattr(engine, "_joined_on_host", lambda values: reads.append(len(values)) or join(values))
    load = engine.expert_load()
    assert reads == [3 * len(layers) * len(batches)]  # the host waits once
    assert load.counts == dict(zip(layers, counts.tolist()))
    terms = len(layers) * len(batches)
    assert (load.terms, load.balanced) == (terms, len(batches) if pooled else terms)
    assert (load.load_balancing, load.z) == pytest.approx((balancing, z), rel=1e-5)


def test_of_equal_experts_the_first_are_chosen(framework: str) -> None:
    """A router of zeros: all logits are equal, so only the first two experts have gradients."""
    source = toy_weights(moe_config())
    weights = source._tensors["model"]
    for name in weights:
        if name.endswith("router.weight"):
            weights[name] = np.zeros_like(weights[name])
    _, gradients = mean_gradients(build(framework, source), [toy_batch(source.config, RAGGED)])
    used = gradients["decoder.layers.1.mlp.experts.linear_fc2.weight"].reshape(8, -1)
    assert np.flatnonzero(np.abs(used).sum(1)).tolist() == [0, 1]
