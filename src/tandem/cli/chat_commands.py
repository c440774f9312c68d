"""The commands of a conversation, such as `/system`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import UserError, nearest
from tandem.files.publish import write_lines_atomically, write_text_atomically
from tandem.inference.dialogue import Dialogue
from tandem.options import build, coerce, expand, options_of

THINKING = {"on": True, "off": False, "auto": None}


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        said: for the user.
        answers: the last question is to be answered again.
        ends: the conversation ends.
    """

    said: str = ""
    answers: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Command:
    """A command: what help says of it, and what it does with the dialogues of all models and the words after it."""

    takes: str
    help: str
    do: Callable[[Sequence[Dialogue], str], Outcome]


def run_command(line: str, dialogues: Sequence[Dialogue]) -> Outcome:
    """Do what a line asks for that begins with `/`.

    Raises:
        UserError: there is no such command, or it cannot do this.
    """
    name, _, words = line.partition(" ")
    name, newline, rest = name.partition("\n")
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command{nearest(name, list(COMMANDS))}; /help lists them")
    return COMMANDS[name].do(dialogues, (rest + newline * bool(words) + words).strip())


def _help(dialogues: Sequence[Dialogue], words: str) -> Outcome:
    titles = {name: f"{name} {command.takes}".strip() for name, command in COMMANDS.items()}
    width = max(map(len, titles.values())) + 2
    lines = [f"  {titles[name]:<{width}}{command.help}" for name, command in COMMANDS.items()]
    lines += [
        "",
        '  """ begins and ends a text of several lines; so does a \\ at the end of each line but the last.',
        "  Ctrl-C stops an answer. Ctrl-D ends the conversation.",
    ]
    return Outcome("\n".join(lines))


def _system(dialogues: Sequence[Dialogue], words: str) -> Outcome:
    if not words:
        system = dialogues[0].system
        return Outcome("no system message" if system is None else f"system: {system}")
    for dialogue in dialogues:
        dialogue.system = None if words == "-" else words
    return Outcome("no system message from now on" if words == "-" else "from the next answer on")


def _think(dialogues: Sequence[Dialogue], words: str) -> Outcome:
    if words not in THINKING:
        raise UserError(f"/think {words}: expected on, off or auto")
    if not any(dialogue.thinks_on_demand() for dialogue in dialogues):
        raise UserError("/think: the template of this model has no thinking mode")
    for dialogue in dialogues:
        dialogue.thinking = THINKING[words]
    return Outcome(f"thinking {words}, from the next answer on")


def _regenerate(dialogues: Sequence[Dialogue], words: str) -> Outcome:
    asked = [dialogue.ask_again() for dialogue in dialogues]
    if not all(asked):
        raise UserError("/regenerate: nothing was asked yet")
    greedy = all(dialogue.sampling.temperature == 0 for dialogue in dialogues)
    return Outcome("with temperature 0 it is the same answer; /set temperature 0.7" if greedy else "", answers=True)


def _clear(dialogues: Sequence[Dialogue], words: str) -> Outcome:
    for dialogue in dialogues:
        dialogue.messages.clear()
    return Outcome("a new conversation")


def _save(dialogues: Sequence[Dialogue], words: str) -> Outcome:
    if not words:
        raise UserError("/save: expected the name of a file, such as chat.jsonl or chat.md")
    path = Path(expand(words))
    if not dialogues[0].messages:
        raise UserError("/save: nothing was said yet")
    if path.is_dir():
        raise UserError(f"/save {words}: is a folder; expected the name of a file")
    if path.suffix != ".jsonl" and path.exists():
        raise UserError(f"/save {words}: exists; choose another name, or a .jsonl, which gets another line")
    try:
        _write(path, dialogues)
    except OSError as error:
        raise UserError(f"/save {words}: {error.strerror}") from error
    return Outcome(f"saved to {path}")


def _write(path: Path, dialogues: Sequence[Dialogue]) -> None:
    """Markdown in a `.md`. In others, a line of JSON for each model: that is how `tandem preprocess` reads data."""
    if path.suffix == ".md":
        write_text_atomically(path, "\n".join(_markdown(dialogue) for dialogue in dialogues))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines = [json.dumps(dialogue.to_record(), ensure_ascii=False).encode() + b"\n" for dialogue in dialogues]
    write_lines_atomically(path, [*there, *lines])


def _markdown(dialogue: Dialogue) -> str:
    parts = []
    for message in dialogue.to_record()["messages"]:
        thought = message.get("reasoning_content")
        parts.append(f"## {message['role'].capitalize()}\n")
        parts += ["\n".join(f"> {line}" for line in thought.splitlines()) + "\n"] if thought else []
        parts.append(f"{message['content']}\n")
    return "\n".join(parts)


def _set(dialogues: Sequence[Dialogue], words: str) -> Outcome:
    sampling = dialogues[0].sampling
    options = options_of(type(sampling))
    if not words:
        return Outcome("\n".join(f"  {name} {getattr(sampling, name)}" for name in options))
    name, _, value = words.partition(" ")
    name = name.removeprefix("--").replace("-", "_")
    if name not in options:
        raise UserError(f"/set {name}: unknown{nearest(name, list(options))}; /set lists them")
    try:
        coerce(value.strip(), options[name].hint)
    except ValueError as error:
        raise UserError(f"/set {words}: {error}") from None
    for dialogue in dialogues:
        own = dataclasses.asdict(dialogue.sampling)
        dialogue.sampling = build(type(sampling), {**own, name: value.strip()})
    return Outcome(f"{name} {getattr(dialogues[0].sampling, name)}")


def _quit(dialogues: Sequence[Dialogue], words: str) -> Outcome:
    return Outcome(ends=True)


COMMANDS = {
    "/help": Command("", "show this", _help),
    "/system": Command("[TEXT]", "set the system message, or show it; - removes it", _system),
    "/think": Command("on|off|auto", "whether answers begin with a thought", _think),
    "/regenerate": Command("", "answer the last question again", _regenerate),
    "/set": Command("[NAME VALUE]", "how tokens are chosen, such as temperature 0.7; alone it lists all", _set),
    "/save": Command("FILE", "write the conversation: a line of a .jsonl, or Markdown in a .md", _save),
    "/clear": Command("", "begin a new conversation", _clear),
    "/quit": Command("", "end", _quit),
}
