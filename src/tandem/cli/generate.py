"""`tandem generate`: ask a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.cli.arguments import parse
from tandem.errors import UserError
from tandem.inference.chat import open_model
from tandem.inference.options import LoadOptions
from tandem.inference.sampling import Sampling
from tandem.options import Options

DESCRIPTION = (
    "Ask a model: a Hugging Face folder or a checkpoint of any layout. Prompts get the chat template that the model "
    "was fine-tuned with, or the tokenizer's chat template. --raw continues plain text."
)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """Options of `tandem generate`."""

    model: LoadOptions
    prompt: tuple[str, ...] = ()
    """One or more prompts; default: one prompt per line of standard input."""
    sampling: Sampling = field(default_factory=Sampling)


def run(argv: Sequence[str]) -> None:
    options = parse(GenerateOptions, "generate", DESCRIPTION, argv)
    prompts = list(options.prompt) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT, or lines on standard input")
    model = open_model(options.model)
    for prompt in prompts:
        print(f"> {prompt}")
        model.answer([prompt], options.sampling, on_text=lambda text: print(text, end="", flush=True))
        print()
