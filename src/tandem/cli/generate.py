"""`tandem generate`: ask a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tandem.cli.arguments import parse
from tandem.errors import UserError
from tandem.inference.chat import open_model
from tandem.inference.options import LoadOptions
from tandem.inference.sampling import Sampling
from tandem.options import Options, positional

DESCRIPTION = (
    "Ask a model: a Hugging Face folder or a checkpoint of any layout. Prompts get the chat template that the model "
    "was fine-tuned with, or the tokenizer's chat template. --raw continues plain text."
)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """Options of `tandem generate`."""

    model: LoadOptions
    prompt: tuple[str, ...] = field(default=(), metadata=positional("PROMPT...", flag_too=True))
    """One or more prompts. Without any, a terminal asks for them, and each line of a file or a pipe is one."""
    sampling: Sampling = field(default_factory=Sampling)


def run(argv: Sequence[str]) -> None:
    options = parse(GenerateOptions, "generate", DESCRIPTION, argv)
    typed = not options.prompt and sys.stdin.isatty()
    prompts = list(options.prompt)
    if not prompts and not typed:
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not prompts:
            raise UserError("no prompt: give PROMPT, or lines on standard input")
    model = open_model(options.model)
    for prompt in typed_prompts() if typed else prompts:
        if not typed:
            print(f"> {prompt}")
        model.answer([prompt], options.sampling, on_text=lambda text: print(text, end="", flush=True))
        print(flush=True)


def typed_prompts() -> Iterator[str]:
    """Each prompt that is typed at a terminal, until Ctrl-D. Prompts do not see the ones before them."""
    print("Type a prompt, and Enter. Each prompt is a new question. Ctrl-D ends.")
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        if prompt.strip():
            yield prompt
