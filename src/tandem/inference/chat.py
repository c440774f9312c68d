"""Ask a model: open it from a folder, apply the chat template it was trained with, and decode the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tandem.backends import connect, create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.checkpoints.detect import open_with_adapters
from tandem.checkpoints.hf.companions import end_ids_of
from tandem.checkpoints.prompt import prompt_entry
from tandem.data.templates.catalog import get_template, template_from_entry
from tandem.data.templates.messages import Message, Template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.frameworks import check_framework
from tandem.inference.conversation import Prompter
from tandem.inference.defaults import Defaults, SamplingOptions
from tandem.inference.options import LoadOptions
from tandem.inference.replies import Question, Reply, replies
from tandem.inference.sampling import Sampling
from tandem.launch.world import Communicator, SingleProcess, World
from tandem.logs import log
from tandem.options import build
from tandem.parallel.grid import Grid, Place

ONLY_TEXTS = "prompts are continued as texts. --prompt-type names a template, and --raw says that none is wanted"
WAIT_MINUTES = 7 * 24 * 60.0  # how long processes wait for the first one, which may wait for somebody to type


@dataclass(frozen=True)
class Model:
    """A model that is ready to answer.

    Attributes:
        template: the chat template that the model was fine-tuned with. With None, the tokenizer's own chat template is
            used. Without either, the prompt is continued as plain text.
        end_ids: end tokens that the model's own files name.
        defaults: how the model's own files say that tokens are chosen.
        thinking: `enable_thinking` of the tokenizer's own template; None leaves it to the template.
        communicator: with the other processes of the job.
        grid: all processes of the job.
    """

    engine: Engine
    tokenizer: Tokenizer
    template: Template | None
    end_ids: tuple[int, ...] = ()
    defaults: Defaults = field(default_factory=lambda: Defaults({}))
    thinking: bool | None = None
    communicator: Communicator = field(default_factory=SingleProcess)
    grid: Grid = field(default_factory=Grid)

    @property
    def place(self) -> Place:
        """Of this process in the grid."""
        return self.grid.place(self.communicator.world.rank)

    @property
    def copy(self) -> int:
        """Which copy of the model this process holds a part of."""
        return self.grid.copy(self.place)

    @property
    def leader(self) -> int:
        """The first of the processes that hold this copy of the model. It alone gets answers."""
        return self.grid.model(self.copy)[0]

    def answer(
        self, questions: Sequence[str], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> list[str]:
        """One answer for each question. With a single question, `on_text` gets the answer piece by piece.

        With several processes all call this, and all get the answers.
        """

        def tell(_: int, text: str) -> None:
            if on_text is not None and len(questions) == 1:
                on_text(text)

        asked = [Question(self.prompt_ids(question), sampling) for question in questions]
        answers = [reply.text for reply in self.replies(asked, on_text=tell)]
        return list(self.communicator.all_gather(answers)[self.leader])

    def replies(self, questions: Sequence[Question], **others: Any) -> Iterator[Reply]:
        """See `tandem.inference.replies.replies`."""
        return replies(self.engine, self.tokenizer, questions, self.stop_ids(), **others)

    def generate(self, prompt: str | Sequence[str], **sampling: Any) -> str | list[str]:
        """The answer to a prompt. For a list of prompts, a list of answers.

        Args:
            sampling: the fields of `SamplingOptions`, such as `max_new_tokens=64, temperature=0.7`.

        Examples:
            >>> tandem.load("exported").generate("Reverse 123.", max_new_tokens=8)  # doctest: +SKIP
            '321'

        Raises:
            UserError: an option is unknown or has the wrong type, or a prompt does not fit into the model's positions.
        """
        options = self.defaults.sampling(build(SamplingOptions, sampling))
        if isinstance(prompt, str):
            return self.answer([prompt], options)[0]
        return self.answer(prompt, options)

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of a question, in the chat template of training; without a template, of a text to continue."""
        if not self.has_template:
            return self.tokenizer.encode_prompt(question)
        return self.prompter.prompt([Message("user", question)]).ids

    @property
    def has_template(self) -> bool:
        """Whether there is a template to ask with. Without one, prompts are continued as texts."""
        return self.template is not None or self.tokenizer.chat_template is not None

    @cached_property
    def prompter(self) -> Prompter:
        """Writes the prompts of conversations."""
        return Prompter(self.tokenizer, self.template, self.thinking)

    def stop_ids(self) -> set[int]:
        """Token ids that end an answer: all that the files of model and tokenizer name, and the template's."""
        ids = {*self.end_ids, *self.tokenizer.end_ids}
        if self.template is not None:
            ids.add(self.tokenizer.require_id(self.template.stop_word))
        return ids


def open_models(loads: Mapping[str, LoadOptions]) -> dict[str, Model]:
    """Open several models by name, all of them on the same processes."""
    models: dict[str, Model] = {}
    for name, options in loads.items():
        first = next(iter(models.values()), None)
        models[name] = open_model(options, None if first is None else first.communicator)
    return models


def open_model(
    options: LoadOptions, communicator: Communicator | None = None, *, needs_template: bool = False
) -> Model:
    """Open a Hugging Face folder or a checkpoint of any layout for inference, on the processes of the job.

    It is open when it is open on all of them. MindSpore's others may still be joining when the first one has its
    weights: a model that is said to be ready must answer, and a signal must no longer count as one at the start.

    Args:
        communicator: with these processes, where they have joined before.
        needs_template: whether texts that are only continued are no use.

    Raises:
        UserError: there is no model in the folder, no tokenizer in the folder and none is given, no template that is
            needed, or the processes do not divide into whole models.
    """
    source = open_with_adapters(options.load, options.ckpt_step, options.lora_load, lora_alpha=options.lora_alpha)
    options.check_adapters(source.config)
    for notice in source.notices:
        log.warning("> %s", notice)  # to standard error: the answers go to standard output
    folder = options.tokenizer_name_or_path or source.companions.tokenizer_folder
    if folder is None:
        raise UserError(f"{source.location} contains no tokenizer: give its folder with --tokenizer-name-or-path")
    tokenizer = Tokenizer(folder)
    if options.raw:
        tokenizer = tokenizer.without_templates()
    template = _template(options, tokenizer, prompt_entry(source))
    if needs_template:
        Prompter(tokenizer, template).check()
    elif template is None and tokenizer.chat_template is None and not options.raw:
        log.warning("> %s, and there is none from fine-tuning: %s", tokenizer.lack_of_template, ONLY_TEXTS)
    defaults = Defaults.of(source.companions)
    world = World.from_environment()
    grid = Grid(options.layout.balanced(source.config.num_layers), world.size)
    check_framework(options.ai_framework).keep_few_shapes()
    if communicator is None:
        communicator = connect(options.ai_framework, world, options.device, WAIT_MINUTES)
    settings = EngineSettings(
        training=False, device=options.device, bf16=options.bf16, fp16=options.fp16, grid=grid, rank=world.rank
    )
    engine = create_engine(options.ai_framework, source.config, settings)
    for notice in engine.notices:
        log.warning("> %s", notice)
    engine.load_weights(source)
    communicator.barrier()
    return Model(
        engine, tokenizer, template, end_ids_of(source.companions), defaults, options.thinking, communicator, grid
    )


def _template(options: LoadOptions, tokenizer: Tokenizer, entry: Mapping[str, Any] | None) -> Template | None:
    """The template that the options name, or the one of the checkpoint; None for the tokenizer's, or for plain text."""
    if options.prompt_type is not None:
        return get_template(options.prompt_type, options.thinking, tokenizer)
    template = None if options.raw else template_from_entry(entry, tokenizer)
    if template is not None and options.thinking is not None:
        return template.with_variables({"enable_thinking": options.thinking})
    return template
