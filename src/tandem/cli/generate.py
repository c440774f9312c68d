"""`tandem generate`: ask a model."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from tandem.cli import generate_tasks
from tandem.cli.arguments import parse
from tandem.cli.given_input import lines_of, open_input, typed_line
from tandem.cli.processes import run_as_processes
from tandem.config.settings import ExpertSettings, LaunchSettings, ModelSettings, Settings
from tandem.config.upstream.flags import GENERATE_IGNORED, split_ignored
from tandem.config.upstream.msrun import as_torchrun
from tandem.errors import UserError
from tandem.files.publish import write_lines_atomically
from tandem.inference.chat import Model, open_model
from tandem.inference.defaults import SamplingOptions
from tandem.inference.options import LoadOptions
from tandem.inference.prompts import Line, notices, read_prompts
from tandem.inference.replies import Question, Reply
from tandem.launch.streams import INPUT, take_streams
from tandem.logs import log
from tandem.options import Options, PathText, positional
from tandem.training.start.weights import check_model_flags

DESCRIPTION = (
    "Ask a model: a Hugging Face folder or a checkpoint of any layout. Prompts get the chat template that the model "
    "was fine-tuned with, or the tokenizer's chat template. --raw continues plain text. How tokens are chosen is taken "
    "from the model's generation_config.json where no flag says it."
)
FIRST = (
    *("load", "prompt", "prompts_file", "output", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop"),
    *("batch_size", "raw", "prompt_type", "enable_thinking", "tokenizer_name_or_path", "lora_load", "ckpt_step"),
    *("ai_framework", "device", "bf16", "tensor_model_parallel_size", "nproc_per_node", "task"),
)
SCRIPT_FLAGS = {"--use-mcore-models", "--spec"}  # scripts of MindSpeed-LLM give them


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """Options of `tandem generate`."""

    model: LoadOptions
    prompt: tuple[str, ...] = field(default=(), metadata=positional("PROMPT...", flag_too=True))
    """One or more prompts. Without any, a terminal asks for them, and each line of a file or a pipe is one."""
    prompts_file: PathText | None = None
    """JSON Lines file of prompts: on each line an object with "prompt", or with "messages" as OpenAI writes them, and
    with a "seed" where it has its own."""
    output: PathText | None = None
    """JSON Lines file for the answers, in the order of the prompts: the fields of each prompt, and then "text",
    "token_ids" and "finish_reason", which is "stop" or "length"."""
    batch_size: int | None = None
    """How many answers are written at the same time, at most; default: 16. It changes no answer."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer. They are not a part of it."""
    task: tuple[Literal["greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat"], ...] = ()
    """Tasks of MindSpeed-LLM's inference.py, on its question, in plain text; chat asks for questions. Scripts that call
    it get all of them."""
    hf_chat_template: bool = False
    """In tasks, use the tokenizer's chat template."""
    history_turns: int = 3
    """In the task chat, how many questions with their answers the model sees again."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    launch: LaunchSettings = field(default_factory=LaunchSettings)
    architecture: ModelSettings = field(default_factory=ModelSettings)
    experts: ExpertSettings = field(default_factory=ExpertSettings)

    def problems(self) -> Iterator[str]:
        if self.prompt and self.prompts_file:
            yield f"PROMPT and --prompts-file {self.prompts_file}: give one of them"
        if self.task and (self.prompts_file or self.output or self.stop):
            yield "--task: takes no --prompts-file, --output or --stop"
        if self.batch_size is not None and self.batch_size < 1:
            yield f"--batch-size {self.batch_size}: expected 1 or more"
        if self.history_turns < 0:
            yield f"--history-turns {self.history_turns}: expected 0 or more"
        if "" in self.stop:
            yield "--stop '': expected a text that is not empty"
        if self.output and Path(self.output).is_dir():
            yield f"--output {self.output}: is a folder; expected the name of a file"
        yield from self.launch.refused_dry_run()

    @property
    def needs_input(self) -> bool:
        return not self.prompt and not self.prompts_file and (not self.task or "chat" in self.task)


def read_options(argv: Sequence[str]) -> tuple[GenerateOptions, list[str]]:
    """The options in a command line, and notices about flags without effect.

    Raises:
        UserError: see `tandem.cli.arguments.parse`.
    """
    words, notices, problems = split_ignored(as_torchrun(argv), GENERATE_IGNORED)
    if SCRIPT_FLAGS.intersection(argv) and not {"--task", "--prompt", "--prompts-file"}.intersection(words):
        words += ["--task", *generate_tasks.TASKS]
    groups = ("model", "sampling", "launch")
    options = parse(GenerateOptions, "generate", DESCRIPTION, words, first=FIRST, groups=groups, problems=problems)
    return options, notices


def run(argv: Sequence[str]) -> int:
    options, notices = read_options(argv)
    settings = Settings(launch=options.launch, ai_framework=options.model.ai_framework)
    code = run_as_processes("generate", argv, settings, [INPUT] if options.needs_input else [])
    if code is not None:
        return code
    take_streams()
    model = open_model(_load_options(options))
    check_model_flags(options.architecture, options.experts, 0, model.engine.config)
    for notice in [*notices, *model.defaults.notices(options.sampling)]:
        _say(model, notice)
    if options.task:
        generate_tasks.run(model, options.task, options.prompt, options.sampling, options.history_turns)
    elif options.needs_input and _on_first(model, sys.stdin.isatty()):
        _ask_in_turn(model, options)
    else:
        _answer_all(model, options)
    model.communicator.close()
    return 0


def _load_options(options: GenerateOptions) -> LoadOptions:
    """Tasks continue plain text, as MindSpeed-LLM's do, unless a template is asked for."""
    plain = options.task and not options.hf_chat_template and options.model.prompt_type is None
    return dataclasses.replace(options.model, raw=True) if plain else options.model


def _say(model: Model, notice: str) -> None:
    """To standard error: the answers go to standard output."""
    if _is_first(model):
        log.warning("> %s", notice)


def _on_first(model: Model, value: Any) -> Any:
    """The first process's value."""
    return model.communicator.all_gather(value)[0]


def _answer_all(model: Model, options: GenerateOptions) -> None:
    """Answer prompts that are all there, and write the answers or print them."""
    lines = _lines(model, options)
    if options.output:
        start, count, tokens = time.monotonic(), 0, 0
        path = Path(options.output)

        def written() -> Iterator[bytes]:
            nonlocal count, tokens
            for line, reply in zip(lines, _replies(model, options, lines)):
                count, tokens = count + 1, tokens + len(reply.token_ids)
                yield _json(line.fields, reply)

        if _is_first(model):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lines_atomically(path, written())
        else:
            for _ in _replies(model, options, lines):
                pass
        seconds = max(time.monotonic() - start, 1e-9)
        _say(model, f"{count:,} answers, {tokens:,} tokens, {tokens / seconds:.1f} tokens/s: {path}")
        return
    _print_all(model, options, lines)


def _print_all(model: Model, options: GenerateOptions, lines: Sequence[Line]) -> None:
    """Print each prompt and its answer, which appears while it is written."""
    begun = 0

    def show(number: int, text: str) -> None:
        nonlocal begun
        if number == begun:
            print(f"> {_shown(lines[number].fields)}", flush=True)
            begun += 1
        print(text, end="", flush=True)

    is_streamed = model.grid.copies_of_the_model == 1
    for number, reply in enumerate(_replies(model, options, lines, show if is_streamed else _ignore)):
        if _is_first(model):
            show(number, "" if is_streamed else reply.text)
            print(flush=True)


def _ignore(number: int, text: str) -> None:
    pass


def _lines(model: Model, options: GenerateOptions) -> list[Line]:
    sampling = model.defaults.sampling(options.sampling)
    if options.prompts_file:
        lines = read_prompts(Path(options.prompts_file), model, sampling, options.stop, raw=options.model.raw)
        for notice in notices(lines):
            _say(model, notice)
        return lines
    prompts: Sequence[str] = options.prompt
    if not prompts:
        own = [line for line in lines_of(open_input()) if line.strip()] if _is_first(model) else []
        prompts = _on_first(model, own)
        if not prompts:
            raise UserError("no prompt: give PROMPT, --prompts-file FILE.jsonl, or lines on standard input")
    return [Line({"prompt": prompt}, Question(model.prompt_ids(prompt), sampling, options.stop)) for prompt in prompts]


def _is_first(model: Model) -> bool:
    return model.communicator.world.rank == 0


def _replies(
    model: Model, options: GenerateOptions, lines: Sequence[Line], on_text: Callable[[int, str], None] = _ignore
) -> Iterator[Reply]:
    """The answers to all lines, in order, on the first process. Copies of the model take turns, and show no text."""
    questions, copies = [line.question for line in lines], model.grid.copies_of_the_model

    def say(notice: str) -> None:
        _say(model, notice)

    if copies == 1:
        return model.replies(questions, batch_size=options.batch_size, say=say, on_text=on_text)
    own = model.replies(questions[model.copy :: copies], batch_size=options.batch_size, say=say)
    everyone = model.communicator.all_gather([[reply.text, reply.token_ids, reply.finish_reason] for reply in own])
    shares = [[Reply(*fields) for fields in everyone[model.grid.model(copy)[0]]] for copy in range(copies)]
    return (shares[number % copies][number // copies] for number in range(len(lines)))


def _json(fields: Mapping[str, Any], reply: Reply) -> bytes:
    answer = {"text": reply.text, "token_ids": reply.token_ids, "finish_reason": reply.finish_reason}
    return orjson.dumps({**fields, **answer}) + b"\n"


def _shown(fields: Mapping[str, Any]) -> str:
    return str(fields["prompt"]) if "prompt" in fields else str(fields["messages"][-1].get("content"))


def _ask_in_turn(model: Model, options: GenerateOptions) -> None:
    """Ask for one prompt after the other, until Ctrl-D. Prompts do not see the ones before them.

    The memory of the first answer is said, and not that of each.
    """
    say: Callable[[str], None] = functools.partial(_say, model)
    sampling = model.defaults.sampling(options.sampling)
    typed = _typed_prompts() if _is_first(model) else iter(())
    while (prompt := _on_first(model, next(typed, None))) is not None:
        question = Question(model.prompt_ids(prompt), sampling, options.stop)
        for _ in model.replies([question], say=say, on_text=lambda _, text: print(text, end="", flush=True)):
            pass
        say = _unsaid
        if _is_first(model):
            print(flush=True)


def _unsaid(notice: str) -> None:
    pass


def _typed_prompts() -> Iterator[str]:
    """Each prompt that is typed at a terminal, until Ctrl-D."""
    print("Type a prompt, and Enter. Each prompt is a new question. Ctrl-D ends.")
    open_input()
    while (prompt := typed_line("> ")) is not None:
        if prompt.strip():
            yield prompt
    print()
