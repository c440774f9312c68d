"""`tandem generate`: ask a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.config.parsing import parse_dataclass
from tandem.errors import UserError
from tandem.frameworks import default_framework
from tandem.inference.chat import open_model
from tandem.inference.sampling import Sampling

DESCRIPTION = (
    "Ask a model: a Hugging Face folder or a checkpoint of any layout. The prompt is rendered with the template that "
    "the model was fine-tuned on, or with the tokenizer's own chat template; --raw continues plain text."
)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Options."""

    load: str
    """Hugging Face folder or checkpoint."""
    prompt: tuple[str, ...] = ()
    """One or more prompts; default: one prompt per line of standard input."""
    ai_framework: str = field(default_factory=default_framework)
    """Backend: mindspore, or torch (also: pytorch)."""
    tokenizer_name_or_path: str | None = None
    """Folder of the tokenizer; default: beside the weights."""
    raw: bool = False
    """Continue the prompt as plain text."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Randomness; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability."""
    seed: int = 1234
    """Seed of the draws."""
    ckpt_step: int | None = None
    """Iteration to load; default: the newest."""
    device: str | None = None
    """cpu, cuda or npu; default: the best one present."""


def run(argv: Sequence[str]) -> None:
    flags = parse_dataclass(Flags, "generate", DESCRIPTION, argv)
    prompts = list(flags.prompt) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT, or lines on standard input")
    sampling = Sampling(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
    )
    model = open_model(
        flags.load, flags.ai_framework, flags.device, flags.ckpt_step, flags.tokenizer_name_or_path, flags.raw
    )
    for prompt in prompts:
        print(f"> {prompt}")
        model.answer([prompt], sampling, on_text=lambda text: print(text, end="", flush=True))
        print()
