"""`tandem export`: any checkpoint as a Hugging Face folder that loads, and that stops where its training data stop."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.checkpoints.convert import Check, Converted, companions_for, with_one_dtype, write_checked
from tandem.checkpoints.copy import Progress
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf import HFSink
from tandem.checkpoints.interface import Companions, dtype_name
from tandem.checkpoints.native import prompt_entry
from tandem.data.templates import template_from_entry
from tandem.data.tokenizer import Tokenizer
from tandem.models.tensors import EMBEDDING


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `tandem export`."""

    load: str
    """Checkpoint folder, of a training run or of a conversion."""
    save_dir: str
    """Folder for the Hugging Face model; must not hold anything yet."""
    params_dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype to write; default: the checkpoint's."""
    ckpt_step: int | None = None
    """Iteration to export; default: the newest."""
    hf_cfg_dir: str | None = None
    """Take config and tokenizer files from this folder instead of the checkpoint."""
    ai_framework: Literal["torch", "pytorch", "mindspore"] | None = None
    """Framework that computes the checkpoint's logits for --verify; default: the one installed."""
    verify: bool = False
    """Compare the logits of the checkpoint with those of the folder, computed by transformers where that is installed;
    small models are always compared, by one framework."""
    no_verify: bool = False
    """Never compare the logits."""


def export(options: ExportOptions, progress: Progress | None = None, check: Check | None = None) -> Converted:
    """Write the folder; it appears whole or not at all.

    Args:
        check: what it raises keeps the folder from appearing.

    Raises:
        UserError: the checkpoint is damaged, the target exists, or the tokenizer lacks the template's end token.
    """
    source = open_source(options.load, options.ckpt_step)
    companions = companions_for(source, options.hf_cfg_dir)
    tokenizer = _tokenizer(companions)
    template = template_from_entry(prompt_entry(source), tokenizer)
    if template is not None and tokenizer is not None:
        companions = ending_turns(companions, tokenizer.require_id(template.stop_word), template.stop_word)
    source = with_one_dtype(source, options.params_dtype)
    folder, dtype = Path(options.save_dir), dtype_name(source.dtype(EMBEDDING))
    write_checked(folder, source, lambda work: HFSink(work, source.config, dtype, companions), progress, check)
    return Converted.of(folder, None, source.config)


def ending_turns(companions: Companions, end: int, stop_word: str) -> Companions:
    """Make the template's end token the model's, so that `generate()` stops after a turn; a former end token stays
    as a second one."""
    files = {path.name: path for path in companions.files}
    if companions.hf_config is None:
        return companions
    generation = _json(files.get("generation_config.json"))
    former = generation.get("eos_token_id", companions.hf_config.get("eos_token_id"))
    others = former if isinstance(former, list) else [former]
    ends = [end, *(token for token in others if token not in (None, end))]
    tokenizer_config = _json(files["tokenizer_config.json"])
    tokenizer_config["eos_token"] = stop_word
    texts = {
        "generation_config.json": {**generation, "eos_token_id": ends if len(ends) > 1 else end},
        "tokenizer_config.json": tokenizer_config,
    }
    return dataclasses.replace(
        companions,
        hf_config={**companions.hf_config, "eos_token_id": end},
        texts={name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in texts.items()},
    )


def _tokenizer(companions: Companions) -> Tokenizer | None:
    folders = [path.parent for path in companions.files if path.name == "tokenizer.json"]
    return Tokenizer(folders[0]) if folders else None


def _json(path: Path | None) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path else {}
