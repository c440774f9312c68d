"""Hugging Face's model as an independent check: it reads a folder and computes logits without any code of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tandem.data.batch import MicroBatch


@torch.inference_mode()
def logits(folder: Path, batch: MicroBatch) -> np.ndarray:
    """fp32 [t, vocabulary]. Each document is computed in a separate call."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    documents = zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:])
    tokens = torch.from_numpy(np.array(batch.tokens, dtype=np.int64))
    return torch.cat([model(tokens[None, start:stop]).logits[0] for start, stop in documents]).numpy()
