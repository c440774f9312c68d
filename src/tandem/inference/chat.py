"""Ask a model: open it from any folder, render the question as it was trained, print what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.backends import create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.native.source import prompt_entry
from tandem.data.templates.catalog import template_from_entry
from tandem.data.templates.messages import Message, Template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.inference.generate import generate
from tandem.inference.sampling import Sampling


@dataclass(frozen=True)
class Model:
    """An engine ready to answer.

    Attributes:
        template: the prompt type that the model was fine-tuned on; None leaves the choice to the tokenizer's own chat
            template, and without one the prompt is continued as plain text.
    """

    engine: Engine
    tokenizer: Tokenizer
    template: Template | None

    def answer(
        self, questions: Sequence[str], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> list[str]:
        """One answer per question. `on_text` gets the text of a single question's answer as it appears."""
        prompts = [self.prompt_ids(question) for question in questions]
        shown = _Streamer(self.tokenizer, on_text) if on_text and len(questions) == 1 else None
        answers = generate(self.engine, prompts, sampling, self.stop_ids(), shown)
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of a question, rendered as in training (D6)."""
        if self.template is not None:
            pieces = self.template.generation_prompt([Message("user", question)])
            return [token for piece in pieces for token in self.tokenizer.encode(piece)]
        if self.tokenizer.chat_template is not None:
            message = {"role": "user", "content": question}
            return self.tokenizer.encode(self.tokenizer.apply_chat_template([message], add_generation_prompt=True))
        return self.tokenizer.encode(question)

    def stop_ids(self) -> set[int]:
        ends = {self.tokenizer.eos_id, self.tokenizer.pad_id}
        if self.template is not None:
            ends.add(self.tokenizer.require_id(self.template.stop_word))
        return {token for token in ends if token is not None}


def open_model(
    load: str,
    ai_framework: str,
    device: str | None = None,
    ckpt_step: int | None = None,
    tokenizer_folder: str | None = None,
    raw: bool = False,
) -> Model:
    """Open a Hugging Face folder or a checkpoint of any layout for inference.

    Args:
        raw: continue the prompt as plain text, without any template.

    Raises:
        UserError: there is no model, or no tokenizer beside it and none is named.
    """
    source = open_source(load, ckpt_step)
    tokenizer = Tokenizer(tokenizer_folder or _folder_of_tokenizer(source))
    engine = create_engine(ai_framework, source.config, EngineSettings(training=False, device=device))
    engine.load_weights(source)
    if raw:
        tokenizer.chat_template = None
    return Model(engine, tokenizer, None if raw else template_from_entry(prompt_entry(source), tokenizer))


def _folder_of_tokenizer(source: TensorSource) -> str:
    for path in source.companions.files:
        if path.name == "tokenizer.json":
            return str(path.parent)
    raise UserError(f"{source.location} has no tokenizer beside it: name one with --tokenizer-name-or-path")


class _Streamer:
    """Decodes one answer as it grows; a character that is not whole yet waits for its next token."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._shown = 0

    def __call__(self, number: int, token: int) -> None:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("�"):
            self._write(text[self._shown :])
            self._shown = len(text)
