"""Hugging Face's model as an independent check: it reads a folder and computes logits without any code of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tandem.data.batch import MicroBatch
from tandem.errors import UserError

# `torch_dtype` was renamed in transformers 4.56.
DTYPE = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


@torch.inference_mode()
def logits(folder: Path, dtype: str, batch: MicroBatch) -> np.ndarray:
    """fp32 [t, vocabulary]. Each document is computed in a separate call. Raises as `transformers_logits`."""
    # Without a dtype, transformers rounds the weights to the one that config.json names, whatever the files hold.
    options = {DTYPE: getattr(torch, dtype), "attn_implementation": "eager"}
    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, **options).float().eval()
        except Exception as error:  # of foreign code
            raise UserError(
                f"{folder}: transformers {transformers.__version__}, with which the logits are to be compared, cannot "
                f"open it: {error}. --no-verify converts without a comparison"
            ) from error
    documents = zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:])
    tokens = torch.from_numpy(np.array(batch.tokens, dtype=np.int64))
    return torch.cat([model(tokens[None, start:stop]).logits[0] for start, stop in documents]).numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar and warnings of transformers: what it takes otherwise shows in the logits."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
