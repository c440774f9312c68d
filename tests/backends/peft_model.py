"""PEFT's own model as the reference: a toy with adapters, and its training with PyTorch's AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tandem.data.batch import IGNORE, MicroBatch

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tandem-llm[dev]'")
BETAS, EPSILON, DECAY = (0.9, 0.999), 1e-8, 0.1


class ModulesOfExperts(torch.nn.Module):
    """A layer's router and experts as transformers 4 has them: each projection of each expert is a linear layer."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.top_k, self.norm = block.gate.top_k, block.gate.norm_topk_prob
        self.gate = linear_of(block.gate.weight)
        halves = zip(block.experts.gate_up_proj.chunk(2, 1), ("gate_proj", "up_proj"))
        projections = {name: half for half, name in halves} | {"down_proj": block.experts.down_proj}
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: linear_of(weight[expert]) for name, weight in projections.items()})
            for expert in range(len(block.experts.down_proj))
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.flatten(0, 1)
        factors, chosen = torch.topk(torch.softmax(self.gate(x).float(), -1), self.top_k)
        factors = factors / factors.sum(-1, keepdim=True) if self.norm else factors
        sums = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == number)
            rows = x[tokens]
            active = torch.nn.functional.silu(expert["gate_proj"](rows)) * expert["up_proj"](rows)
            sums = sums.index_add(0, tokens, expert["down_proj"](active) * factors[tokens, place, None])
        return sums.view_as(hidden)


def linear_of(weight: torch.Tensor) -> torch.nn.Linear:
    outputs, inputs = weight.shape
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    linear.weight = torch.nn.Parameter(weight.detach().clone())
    return linear


def peft_model(folder: Path, seed: int = 0, *, transformers_4: bool = False, **config: Any) -> Any:
    """The model in `folder` with adapters whose B's are not zero, so that each adapter shows from the first step.

    Args:
        transformers_4: experts are modules, and PEFT takes them as such.
    """
    torch.manual_seed(seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    with pytest.MonkeyPatch.context() as patch:
        if transformers_4:
            for layer in base.model.layers:
                if hasattr(layer.mlp, "experts"):
                    layer.mlp = ModulesOfExperts(layer.mlp)
            patch.setattr(
                "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers", lambda *_, **__: None
            )
        model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    return model


def sum_of_losses(model: Any, batch: MicroBatch) -> torch.Tensor:
    """The sum of -log p(label) over the trained tokens, one call per document."""
    total = torch.zeros(())
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:]):
        tokens, labels = (torch.from_numpy(x[start:stop].astype(np.int64)) for x in (batch.tokens, batch.labels))
        logits = model(input_ids=tokens[None]).logits[0].float()
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def train(model: Any, batches: list[list[MicroBatch]], lr: float) -> list[tuple[float, float]]:
    """Steps of AdamW, clipped to a norm of 1; vectors do not decay. Returns each step's loss and norm."""
    weights = trained(model)
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": DECAY},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=BETAS, eps=EPSILON)
    results = []
    for micro_batches in batches:
        tokens = sum(batch.trained_tokens for batch in micro_batches)
        loss = sum((sum_of_losses(model, batch) for batch in micro_batches), torch.zeros(())) / tokens
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        results.append((loss.item(), norm.item()))
    return results


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
