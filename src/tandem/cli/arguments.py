"""Reads a command line into a dataclass of options, and prints help.

Words may come in any order. One error lists everything that is wrong with a command line.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tandem.errors import UserError, raise_all
from tandem.options import Option, build, flag_of, groups_of, opposite, options_of
from tandem.other_names import suggestion

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
    stray: Callable[[str], str] = lambda _: "expected a flag",
    problems: Sequence[str] = (),
    check: Callable[[T], Iterable[str]] = lambda _: (),
) -> T:
    """The options in a command line. `--help` prints the options and ends the program.

    Args:
        kind: the dataclass of options.
        first: options that `--help` lists; `--help-all` lists all. When empty, both list all.
        groups: the groups of options that help lists; default: all groups.
        positionals: options that are given without a flag, in order, with their names in help; default: the options
            that are declared so.
        values: values from elsewhere, such as a YAML file. Flags replace them.
        stray: what to say of a word that belongs to no flag.
        problems: what is wrong with words that were taken out of the command line before.
        check: says what is wrong with the options together.

    Raises:
        UserError: lists `problems`, all unknown flags, all values of the wrong type, all missing options, and what
            `check` says.
    """
    options = options_of(kind)
    titles = positionals or {name: option.positional for name, option in options.items() if option.positional}
    if any(word in (*HELP, HELP_ALL) for word in argv):
        print(help_text(kind, command, description, titles, () if HELP_ALL in argv else first, groups, values))
        sys.exit(0)
    given, found = _given(options, argv, titles, stray, may_be_values=bool(problems))
    problems = [*problems, *found]

    def describe(name: str, value: Any) -> str:
        words = value if isinstance(value, list) else [value]
        return " ".join([_title_of(name, titles, options), *(str(word) for word in words if word is not None)])

    try:
        built = build(kind, {**(values or {}), **given}, describe)
    except UserError as error:
        raise_all([*problems, *error.problems])
        raise
    raise_all([*problems, *check(built)])
    return built


def _title_of(name: str, positionals: Mapping[str, str], options: Mapping[str, Option]) -> str:
    """How errors call an option: `--lr`, `RUN`, or `MODEL (--load)` when both ways of giving it work."""
    if name not in positionals:
        return flag_of(name)
    return f"{positionals[name]} ({flag_of(name)})" if options[name].has_flag else positionals[name]


def _given(
    options: Mapping[str, Option],
    argv: Sequence[str],
    positionals: Mapping[str, str],
    stray: Callable[[str], str],
    may_be_values: bool,
) -> tuple[dict[str, Any], list[str]]:
    """The typed values by name of the option, and what is wrong with the command line.

    Args:
        may_be_values: words without a flag may be values of flags that were taken out. So may they after an unknown
            flag. Nothing is said of them then.
    """
    flags = {flag: option for option in options.values() for flag in option.flags}
    off = {opposite(flag): option for flag, option in flags.items() if option.is_switch}
    words_left, free = list(argv), list[str]()
    given: dict[str, Any] = {}
    unknown, problems = list[str](), list[str]()
    while words_left:
        word = words_left.pop(0)
        flag, equals, value = _hyphened(word).partition("=")
        option = flags.get(flag) or off.get(flag)
        if word == "--":
            free += words_left
            break
        if option is None:
            if word.startswith("--"):
                unknown.append(f"{flag}: unknown flag{suggestion(flag, flags)}")
            else:
                free.append(word)
            continue
        if option.is_switch:
            if equals or (words_left and words_left[0].lower() in ("true", "false")):
                value = value if equals else words_left.pop(0)
                problems.append(f"{flag} {value}: takes no value; {flag} alone is true, {opposite(flag)} is false")
            given[option.name] = flag in flags
            continue
        words = [value] if equals else _take_values(words_left, option.takes)
        if not words:
            problems.append(f"{flag} needs a value: {option.metavar}")
        else:
            given[option.name] = words[0] if option.takes == 1 else words
    strays = _take_positionals(options, positionals, free, given, stray)
    if not unknown and not may_be_values:
        problems += strays
    return given, [*unknown, *problems]


def _take_values(words: list[str], count: int | None) -> list[str]:
    """Remove the words before the next flag from the list, at most `count`, and return them."""
    values: list[str] = []
    while words and not words[0].startswith("--") and (count is None or len(values) < count):
        values.append(words.pop(0))
    return values


def _take_positionals(
    options: Mapping[str, Option],
    positionals: Mapping[str, str],
    words: Sequence[str],
    given: dict[str, Any],
    stray: Callable[[str], str],
) -> list[str]:
    """Add the words without a flag to `given`, in order of the options. Returns what is wrong.

    A positional that its flag has given takes no word: in `generate --load M hi`, `hi` is the prompt.
    """
    words_left = list(words)
    by_flag = [f"{flag_of(name)} gives {title} already" for name, title in positionals.items() if name in given]
    for name in positionals:
        if not words_left or name in given:
            continue
        if options[name].takes is None:
            given[name], words_left = words_left, []
        else:
            given[name] = words_left.pop(0)
    return [f"{word}: {'; '.join([stray(word), *by_flag])}" for word in words_left]


def _hyphened(word: str) -> str:
    """A flag with hyphens instead of underscores: `--train-iters=3` for `--train_iters=3`."""
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
    """The text of `--help`: the options in `first`, or all options by group."""
    defaults = values or {}
    options = {
        name: dataclasses.replace(option, default=defaults.get(name, option.default))
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
    """The help lines of one option. With `brief`, only the first sentence of its text."""
    ways = [option.positional or "", f"{option.flag} {option.metavar}".strip() if option.has_flag else ""]
    head = ", ".join(filter(None, ways))
    if len(head) > 3 * INDENT:  # a long list of choices is left out
        head = option.flag
    text = option.help.partition(". ")[0].rstrip(".") if brief else option.help
    if option.aliases and not brief:
        text += f" Also: {', '.join(option.aliases)}."
    if option.default not in (None, False, "", (), dataclasses.MISSING):
        default = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
        text += f" [{default}]"
    wrapped = textwrap.wrap(text, max(width - INDENT, 30), break_on_hyphens=False)
    if len(head) + 4 > INDENT:
        return [f"  {head}", *(" " * INDENT + line for line in wrapped)]
    return [f"  {head:<{INDENT - 2}}{wrapped[0]}", *(" " * INDENT + line for line in wrapped[1:])]
