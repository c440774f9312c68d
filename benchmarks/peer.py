"""The peer of the benchmarks: Hugging Face transformers as its users run it, on CPU in fp32 or on a device in bf16."""

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
        device: where it trains.
        bf16: as its Trainer's `bf16=True`: weights stay fp32, and products are computed in bf16 (autocast).
    """

    def __init__(
        self,
        source: TensorSource,
        lr: float,
        weight_decay: float,
        clip_grad: float,
        betas: tuple[float, float],
        experts_implementation: str = "eager",
        device: str = "cpu",
        *,
        bf16: bool = False,
    ) -> None:
        self._model = model_of(source, experts_implementation, device)
        self._forward, self._device, self._bf16 = self._model, device, bf16
        self._compiled: torch.nn.Module | None = None
        self._clip_grad = clip_grad
        parameters = list(self._model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)

    def compile(self, *, compiled: bool) -> None:
        """Whether steps from now on run what torch.compile makes of the model."""
        if compiled and self._compiled is None:
            self._compiled = torch.compile(self._model)  # type: ignore[assignment]
        self._forward = self._compiled if compiled and self._compiled is not None else self._model

    def gradients(self, arrays: dict[str, np.ndarray], trained_tokens: int) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and the gradients by the names of a Hugging Face file, fp32."""
        inputs = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
        with torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
            loss = self._model(**inputs, num_items_in_batch=trained_tokens, use_cache=False).loss
        loss.backward()
        of_names = {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
        found = {name: gradient.float().cpu().numpy() for name, gradient in of_names.items()}
        self._optimizer.zero_grad()
        return loss.item(), found

    def step(self, micro_batches: Iterable[dict[str, np.ndarray]], trained_tokens: int) -> float:
        """Train one step; the loss is the mean over the trained tokens of all micro-batches."""
        total = 0.0
        for arrays in micro_batches:
            inputs = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
            with torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
                loss = self._forward(**inputs, num_items_in_batch=trained_tokens, use_cache=False).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_grad)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


def model_of(source: TensorSource, experts_implementation: str = "eager", device: str = "cpu") -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(**to_hf(source.config, dtype="float32"))
    ways = {"attn_implementation": "sdpa", "experts_implementation": experts_implementation}
    with torch.device(device):
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
