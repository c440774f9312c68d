"""`tandem chat`: a conversation with a model on the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING

from tandem.cli.arguments import parse
from tandem.cli.processes import run_as_processes
from tandem.config.settings import LaunchSettings, Settings
from tandem.errors import UserError
from tandem.inference.defaults import SamplingOptions
from tandem.inference.options import LoadOptions, models_to_open
from tandem.launch.stopping import handled
from tandem.launch.streams import ERRORS, INPUT, OUTPUT, take_streams
from tandem.launch.world import World, is_one_of_several
from tandem.options import Options, PathText

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.inference.dialogue import Dialogue

DESCRIPTION = (
    "Talk with a model: a Hugging Face folder or a checkpoint of any layout. It is asked with the template that it was "
    "fine-tuned with, or with its own. /help lists what can be typed besides questions."
)
FIRST = (
    *("load", "lora_load", "compare", "system", "enable_thinking", "prompt_type", "max_new_tokens", "temperature"),
    *("top_k", "top_p", "seed", "ai_framework", "device", "bf16", "no_history"),
    *("tensor_model_parallel_size", "nproc_per_node"),
)
MAX_NEW_TOKENS = 2048  # where neither the user nor the model says how many


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Options):
    """Options of `tandem chat`."""

    model: LoadOptions
    compare: PathText | None = None
    """A second model: it gets the same questions, and its answers stand next to those of the first."""
    system: str | None = None
    """System message."""
    no_history: bool = False
    """Neither read nor write the history of what was typed in earlier conversations."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    launch: LaunchSettings = field(default_factory=LaunchSettings)

    def problems(self) -> Iterator[str]:
        if self.model.raw:
            yield "--raw: a conversation needs a chat template; `tandem generate --raw` continues texts"
        yield from self.launch.refused_dry_run()


def run(argv: Sequence[str]) -> int:
    options = parse(ChatOptions, "chat", DESCRIPTION, argv, first=FIRST)
    settings = Settings(launch=options.launch, ai_framework=options.model.ai_framework)
    if (code := run_as_processes("chat", argv, settings, [INPUT, OUTPUT, ERRORS])) is not None:
        return code
    world = World.from_environment()
    options.model.check_processes(world.size)
    take_streams()
    from rich.console import Console

    console = Console(highlight=False)
    dialogues = _open(options, console)
    first = next(iter(dialogues.values()))
    if world.rank == 0:
        _talk(options, dialogues, console)
    else:
        with handled({signal.SIGINT: signal.SIG_IGN}):  # Ctrl-C is for the first process
            first.follow()
    for dialogue in dialogues.values():
        dialogue.close()
    first.model.communicator.close()
    return 0


def _open(options: ChatOptions, console: Console) -> dict[str, Dialogue]:
    """By name, the dialogues with the model, and with the one that it is compared with."""
    from tandem.inference.chat import open_model  # frameworks take a second to start
    from tandem.inference.dialogue import Dialogue

    models, communicator = {}, None
    for name, load in models_to_open(options.model, options.compare).items():
        with console.status(f"opening {load.load}") if console.is_terminal else _nothing():
            models[name] = model = open_model(load, communicator, needs_template=True)
            communicator = model.communicator
    dialogues, first = {}, None
    for name, model in models.items():
        sampling = model.defaults.sampling(options.sampling)
        if options.sampling.max_new_tokens is None and "max_new_tokens" not in model.defaults.values:
            sampling = replace(sampling, max_new_tokens=MAX_NEW_TOKENS)
        dialogues[name] = dialogue = Dialogue(model, sampling, len(models), first)
        first = first or dialogue
        dialogue.system = options.system
        for notice in (*model.defaults.notices(options.sampling), dialogue.notice):
            _say(console, f"> {name}: {notice}" if len(models) > 1 else f"> {notice}")
    return dialogues


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _talk(options: ChatOptions, models: Mapping[str, Dialogue], console: Console) -> None:
    """Ask and answer until the end of the input."""
    from tandem.cli.chat_commands import COMMANDS
    from tandem.cli.chat_input import history_file, line_editing, read_message

    names, dialogues = list(models), list(models.values())
    history = None if options.no_history else history_file()
    if console.is_terminal:
        _say(console, f"{' and '.join(names)}. /help lists commands, Ctrl-D ends.")
    with line_editing(history, list(COMMANDS)):
        while True:
            try:
                line = read_message()
            except KeyboardInterrupt:  # the line is given up, not the conversation
                _say(console, "\nCtrl-D or /quit ends.")
                continue
            if line is None:
                break
            try:
                with _stoppable() as stop:
                    if not _turn(line, dialogues, names, console, stop):
                        return
            except UserError as error:
                print(f"> {error}", file=sys.stderr, flush=True)
    if console.is_terminal:
        print()


def _turn(line: str, dialogues: Sequence[Dialogue], names: Sequence[str], console: Console, stop: _Stop) -> bool:
    """Do what a line asks for. False when it ends the conversation."""
    from tandem.cli.chat_commands import run_command

    answers = bool(line)
    if line.startswith("/"):
        outcome = run_command(line, dialogues)
        if outcome.ends:
            return False
        _say(console, outcome.said)
        answers = outcome.answers
    elif line:
        for dialogue in dialogues:
            dialogue.ask(line)
    if answers:
        _answer(dialogues, names, console, stop)
    return True


def _say(console: Console, text: str) -> None:
    """A remark that is no answer; it goes to standard error when answers go to a file."""
    if not text:
        return
    if console.is_terminal:
        console.print(text, style="dim", markup=False)
    else:
        print(text, file=sys.stderr, flush=True)


def _answer(dialogues: Sequence[Dialogue], names: Sequence[str], console: Console, stop: _Stop) -> None:
    """Show the answers while they are written, one token of each model in turn."""
    from tandem.cli.chat_screen import OneAnswer, SideBySide

    alone, together = OneAnswer(console), SideBySide(console, names)
    running = {number: dialogue.answer() for number, dialogue in enumerate(dialogues)}
    try:
        while running:
            for number in list(running):
                try:
                    piece = next(running[number])
                except StopIteration:
                    del running[number]
                    continue
                if piece is not None and len(dialogues) == 1:
                    alone.show(piece)
                elif piece is not None:
                    together.show(number, piece)
            if stop.asked:  # never before the first step: an answer that has not begun takes no question back
                break
    finally:
        for answer in running.values():
            answer.close()  # type: ignore[attr-defined]
        (alone if len(dialogues) == 1 else together).end()
    remarks = [", ".join(filter(None, (str(dialogue.speed), dialogue.cut))) for dialogue in dialogues]
    _say(console, " | ".join(remarks))


class _Stop:
    """Whether Ctrl-C was pressed. The second time it interrupts, but not where other processes are in the same step."""

    asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not is_one_of_several():
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def _stoppable() -> Iterator[_Stop]:
    """Inside, the first Ctrl-C is noted and does nothing else: a step of the model is not torn apart."""
    stop = _Stop()
    with handled({signal.SIGINT: stop.ask}):
        yield stop
