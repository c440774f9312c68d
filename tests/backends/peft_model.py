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


def peft_model(folder: Path, seed: int = 0, **config: Any) -> Any:
    """The model in `folder` with adapters whose B's are not zero, so that each adapter shows from the first step."""
    torch.manual_seed(seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
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
