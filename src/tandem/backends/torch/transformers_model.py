"""Hugging Face's model as an independent check: it reads a folder and computes logits without any code of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from tandem.backends.folder_reading import FolderReading
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


@torch.inference_mode()
def read(
    folder: Path, prompts: Sequence[str | Sequence[Mapping[str, str]]], sequences: Sequence[Sequence[int]]
) -> FolderReading:
    """What a user of transformers gets from a folder, in the dtype that its config names. Raises as `read_folder`."""
    with _quiet():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, **{DTYPE: "auto"}, attn_implementation="eager", output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # of foreign code
            raise UserError(f"{folder}: transformers {transformers.__version__} cannot open it: {error}") from error
        model = model.float().eval()
        ends = model.generation_config.eos_token_id
        return FolderReading(
            reader=f"transformers {transformers.__version__}",
            prompts=tuple(_rendered(tokenizer, prompt) for prompt in prompts),
            end_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
            logits=tuple(model(torch.tensor([list(tokens)])).logits[0].numpy() for tokens in sequences),
            missing=tuple(sorted(info["missing_keys"])),
            unexpected=tuple(sorted(info["unexpected_keys"])),
        )


def _rendered(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]]) -> tuple[int, ...] | None:
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    except Exception:  # noqa: BLE001 - there is no template, or it refuses: both are another template than training's
        return None
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


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
