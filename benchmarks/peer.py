"""The peer of the benchmarks: Hugging Face transformers on CPU in fp32, as its users run it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import torch
import transformers

from tandem.checkpoints.interface import TensorSource
from tandem.models.hf_config import to_hf
from tandem.models.tensors import tensor_table
from tandem.models.weight_map import WeightMap

OF_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class HuggingFaceTrainer:
    """sdpa attention, the loss that the model computes from labels, clip_grad_norm_ and AdamW(fused=True).

    Args:
        experts_implementation: transformers' name of how experts are computed, for a model that has some.
    """

    def __init__(
        self,
        source: TensorSource,
        lr: float,
        weight_decay: float,
        clip_grad: float,
        betas: tuple[float, float],
        experts_implementation: str = "eager",
    ) -> None:
        self._model = model_of(source, experts_implementation)
        self._clip_grad = clip_grad
        parameters = list(self._model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)

    def step(self, micro_batches: Iterable[dict[str, np.ndarray]], trained_tokens: int) -> float:
        """Train one step; the loss is the mean over the trained tokens of all micro-batches."""
        total = 0.0
        for arrays in micro_batches:
            inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
            loss = self._model(**inputs, num_items_in_batch=trained_tokens, use_cache=False).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_grad)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


def model_of(source: TensorSource, experts_implementation: str = "eager") -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(**to_hf(source.config, dtype="float32"))
    ways = {"attn_implementation": "sdpa", "experts_implementation": experts_implementation}
    model = transformers.AutoModelForCausalLM.from_config(config, **ways, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    weight_map = WeightMap(source.config)
    for name in tensor_table(source.config):
        for part, array in weight_map.to_hf(name, source.read(name)).items():
            _place_of(part, parameters).copy_(torch.from_numpy(np.ascontiguousarray(array)))
    model.train()
    return model


def _place_of(name: str, parameters: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    """Where a tensor of a file is in a model: transformers has all experts of a layer in one, gate above up."""
    match = OF_EXPERT.fullmatch(name)
    if match is None:
        return parameters[name].data
    stem, expert, kind = match[1], int(match[2]), match[3]
    if kind == "down":
        return parameters[f"{stem}.down_proj"].data[expert]
    return parameters[f"{stem}.gate_up_proj"].data[expert].chunk(2)[kind == "up"]
