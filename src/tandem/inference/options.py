"""Which model to ask, and on which device."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

from tandem.frameworks import default_framework
from tandem.options import Options, PathText, positional


@dataclass(frozen=True)
class LoadOptions(Options):
    """A model to ask."""

    load: PathText = field(metadata=positional("MODEL", flag_too=True))
    """Hugging Face folder, or a checkpoint of any layout."""
    _: KW_ONLY
    ai_framework: str = field(default_factory=default_framework)
    """Framework: torch (or pytorch), or mindspore; default: the installed one, or torch if both are installed."""
    tokenizer_name_or_path: PathText | None = None
    """Folder of the tokenizer; default: the one in the model's folder."""
    lora_load: PathText | None = None
    """Folder of adapters for the model: PEFT's, or a run's."""
    raw: bool = False
    """Continue the prompt as plain text, without a chat template. It begins as the tokenizer begins texts."""
    ckpt_step: int | None = None
    """Iteration to load; default: the newest."""
    device: str | None = None
    """Device: cpu, cuda or npu; default: the best one present."""
