"""A command line into a dataclass of options, and the options' help.

Words may come in any order; everything that is wrong with a line is told at once.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from tandem.errors import UserError, nearest, raise_all
from tandem.options import Option, build, flag_of, groups_of, options_of

T = TypeVar("T")

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
MOST_WIDTH = 110
INDENT = 30  # where help texts begin


def parse(
    kind: type[T],
    command: str,
    description: str,
    argv: Sequence[str],
    *,
    first: Sequence[str] = (),
    groups: Collection[str] | None = None,
    positionals: Mapping[str, str] | None = None,
    values: Mapping[str, Any] | None = None,
) -> T:
    """The options that a command line gives; `--help` prints them and ends the program.

    Args:
        first: options that `--help` lists; `--help-all` lists all. None named: both list all.
        groups: the groups of options that matter to the command, which help lists; default: all.
        positionals: options that words without a flag give, in order, and how help calls them; default: those that are
            declared so.
        values: of another origin, which flags replace.

    Raises:
        UserError: unknown flags, values of another type, missing options: all of them are named.
    """
    options = options_of(kind)
    free = positionals or {name: option.positional for name, option in options.items() if option.positional}
    if any(word in (*HELP, HELP_ALL) for word in argv):
        print(help_text(kind, command, description, free, () if HELP_ALL in argv else first, groups, values))
        sys.exit(0)
    given, problems = _given(options, argv, free)

    def describe(name: str, value: Any) -> str:
        words = value if isinstance(value, list) else [value]
        called = free.get(name, flag_of(name))
        return " ".join([called, *(str(word) for word in words if word is not None)])

    try:
        built = build(kind, {**(values or {}), **given}, describe)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    raise_all(problems)
    return built


def _given(
    options: Mapping[str, Option], argv: Sequence[str], positionals: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """The values that were typed, by name, and what is wrong with the line."""
    flagged = [option for option in options.values() if option.has_flag]
    flags = {flag: option for option in flagged for flag in (option.flag, *option.aliases)}
    left, free = list(argv), list[str]()
    given: dict[str, Any] = {}
    unknown, problems = list[str](), list[str]()
    while left:
        word = left.pop(0)
        flag, equals, value = _hyphened(word).partition("=")
        option = flags.get(flag)
        if word == "--":
            free += left
            break
        if option is None:
            if word.startswith("--"):
                unknown.append(f"{flag}: unknown flag{nearest(flag, list(flags))}")
            else:
                free.append(word)
            continue
        words = [value] if equals else _taken(left, option.takes)
        if option.takes == 0 and not equals:
            given[option.name] = True
        elif not words or (option.takes == 0 and equals):
            problems.append(f"{flag} takes no value" if option.is_switch else f"{flag} needs a value: {option.metavar}")
        else:
            given[option.name] = words[0] if option.takes == 1 else words
    if not unknown:
        problems += _take_positionals(options, positionals, free, given)
    return given, [*unknown, *problems]


def _taken(words: list[str], count: int | None) -> list[str]:
    """The first words, at most `count`, that are no flags; they are taken off the list."""
    taken: list[str] = []
    while words and not words[0].startswith("--") and (count is None or len(taken) < count):
        taken.append(words.pop(0))
    return taken


def _take_positionals(
    options: Mapping[str, Option], positionals: Mapping[str, str], words: Sequence[str], given: dict[str, Any]
) -> list[str]:
    """Put the words without a flag into their options, in order; returns what is wrong."""
    left, problems = list(words), []
    for name, called in positionals.items():
        taken = left if options[name].takes is None else left[:1]
        if taken and name in given:
            problems.append(f"{called} {' '.join(taken)} and {flag_of(name)}: give one of them")
        elif taken:
            given[name] = list(taken) if options[name].takes is None else taken[0]
        left = left[len(taken) :]
    return [*problems, *(f"{word}: expected a flag" for word in left)]


def _hyphened(word: str) -> str:
    """A flag with hyphens, as it is declared: `--train_iters=3` is `--train-iters=3`."""
    flag, equals, value = word.partition("=")
    return f"{flag.replace('_', '-')}{equals}{value}" if word.startswith("--") else word


def help_text(
    kind: type,
    command: str,
    description: str,
    positionals: Mapping[str, str],
    first: Sequence[str],
    groups: Collection[str] | None = None,
    values: Mapping[str, Any] | None = None,
) -> str:
    """What `--help` prints: the options named `first`, or all of them, group by group."""
    changed = values or {}
    options = {
        name: dataclasses.replace(option, default=changed.get(name, option.default))
        for name, option in options_of(kind).items()
    }
    width = min(MOST_WIDTH, shutil.get_terminal_size().columns)
    lines = [
        " ".join(["usage: tandem", command, *positionals.values(), "[OPTIONS]"]),
        "",
        *textwrap.wrap(description, width, break_on_hyphens=False),
        "",
    ]
    if first:
        lines += [line for name in first for line in _entry(options[name], width, brief=True)]
        return "\n".join([*lines, "", f"tandem {command} --help-all lists all options."])
    for group in dict.fromkeys(option.group for option in options.values()):
        if group is None or groups is None or group in groups:
            shown = [option for option in options.values() if option.group == group]
            title = [] if group is None else [*([""] if lines[-1] else []), _title(kind, group)]
            lines += [*title, *(line for option in shown for line in _entry(option, width))]
    return "\n".join(lines)


def _title(kind: type, group: str) -> str:
    return " ".join((groups_of(kind)[group].__doc__ or group).split())


def _entry(option: Option, width: int, brief: bool = False) -> list[str]:
    """An option's lines; `brief`: only the first sentence of its text."""
    head = option.positional or " ".join([option.flag, option.metavar]).strip()
    if len(head) > 3 * INDENT:  # long choices stand in the text's place
        head = option.flag
    text = option.help.partition(". ")[0].rstrip(".") if brief else option.help
    others = [*option.aliases, *([option.flag] if option.positional and option.has_flag else [])]
    if others and not brief:
        text += f" Also: {', '.join(others)}."
    if option.default not in (None, False, "", (), dataclasses.MISSING):
        default = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
        text += f" [{default}]"
    wrapped = textwrap.wrap(text, max(width - INDENT, 30), break_on_hyphens=False)
    if len(head) + 4 > INDENT:
        return [f"  {head}", *(" " * INDENT + line for line in wrapped)]
    return [f"  {head:<{INDENT - 2}}{wrapped[0]}", *(" " * INDENT + line for line in wrapped[1:])]
