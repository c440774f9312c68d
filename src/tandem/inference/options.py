"""Which model to ask, and where it computes."""

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
    """Backend: mindspore, or torch (also: pytorch); default: the one that is installed, torch where both are."""
    tokenizer_name_or_path: PathText | None = None
    """Folder of the tokenizer; default: the one with the weights."""
    raw: bool = False
    """Continue the prompt as plain text."""
    ckpt_step: int | None = None
    """Iteration to load; default: the newest."""
    device: str | None = None
    """cpu, cuda or npu; default: the best one present."""
