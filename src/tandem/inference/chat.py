"""Ask a model: open it from a folder, apply the chat template it was trained with, and decode the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.backends import create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.checkpoints.detect import open_with_adapters
from tandem.checkpoints.hf.companions import end_ids_of
from tandem.checkpoints.prompt import prompt_entry
from tandem.data.templates.catalog import template_from_entry
from tandem.data.templates.messages import Message, Template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.inference.generate import generate
from tandem.inference.options import LoadOptions
from tandem.inference.sampling import Sampling
from tandem.logs import log
from tandem.options import build


@dataclass(frozen=True)
class Model:
    """A model that is ready to answer.

    Attributes:
        template: the chat template that the model was fine-tuned with. With None, the tokenizer's own chat template is
            used. Without either, the prompt is continued as plain text.
        end_ids: end tokens that the model's own files name.
    """

    engine: Engine
    tokenizer: Tokenizer
    template: Template | None
    end_ids: tuple[int, ...] = ()

    def answer(
        self, questions: Sequence[str], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> list[str]:
        """One answer for each question. With a single question, `on_text` gets the answer piece by piece."""
        prompts = [self.prompt_ids(question) for question in questions]
        streamer = _Streamer(self.tokenizer, on_text) if on_text and len(questions) == 1 else None
        answers = generate(self.engine, prompts, sampling, self.stop_ids(), streamer)
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]

    def generate(self, prompt: str | Sequence[str], **sampling: Any) -> str | list[str]:
        """The answer to a prompt. For a list of prompts, a list of answers.

        Args:
            sampling: the fields of `Sampling`, such as `max_new_tokens=64, temperature=0.7`.

        Examples:
            >>> tandem.load("exported").generate("Reverse 123.", max_new_tokens=8)  # doctest: +SKIP
            '321'

        Raises:
            UserError: an option is unknown or has the wrong type, or a prompt could become longer than the model's
                positions.
        """
        options = build(Sampling, sampling)
        if isinstance(prompt, str):
            return self.answer([prompt], options)[0]
        return self.answer(prompt, options)

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of a question, in the chat template of training."""
        if self.template is not None:
            pieces = self.template.generation_prompt([Message("user", question)])
            return [token for piece in pieces for token in self.tokenizer.encode(piece)]
        if self.tokenizer.chat_template is not None:
            message = {"role": "user", "content": question}
            return self.tokenizer.encode(self.tokenizer.apply_chat_template([message], add_generation_prompt=True))
        return self.tokenizer.encode_prompt(question)

    def stop_ids(self) -> set[int]:
        """Token ids that end an answer: all that the files of model and tokenizer name, and the template's."""
        ids = {*self.end_ids, *self.tokenizer.end_ids}
        if self.template is not None:
            ids.add(self.tokenizer.require_id(self.template.stop_word))
        return ids


def open_model(options: LoadOptions) -> Model:
    """Open a Hugging Face folder or a checkpoint of any layout for inference.

    Raises:
        UserError: there is no model in the folder, or no tokenizer in the folder and none is given.
    """
    source = open_with_adapters(options.load, options.ckpt_step, options.lora_load)
    for notice in source.notices:
        log.warning("> %s", notice)  # to standard error: the answers go to standard output
    folder = options.tokenizer_name_or_path or source.companions.tokenizer_folder
    if folder is None:
        raise UserError(f"{source.location} contains no tokenizer: give its folder with --tokenizer-name-or-path")
    tokenizer = Tokenizer(folder)
    settings = EngineSettings(training=False, device=options.device)
    engine = create_engine(options.ai_framework, source.config, settings)
    engine.load_weights(source)
    if options.raw:
        tokenizer.chat_template = None
    template = None if options.raw else template_from_entry(prompt_entry(source), tokenizer)
    return Model(engine, tokenizer, template, end_ids_of(source.companions))


class _Streamer:
    """Decodes one answer token by token. An incomplete character waits for the next token."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._written = 0  # characters

    def __call__(self, number: int, token: int) -> None:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("�"):
            self._write(text[self._written :])
            self._written = len(text)
