"""Dataclasses of options, filled with values from a command line, YAML or Python.

A frozen dataclass declares options once. Its fields are flags, keywords and YAML keys. A field's type says which values
are valid, and the text below a field is its help.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from tandem.errors import UserError, raise_all
from tandem.other_names import suggestion

T = TypeVar("T")

_VARIABLE = re.compile(r"(?:^|(?<=[/=]))\$\{?([A-Za-z_][A-Za-z0-9_]*)[^/]*")  # a part of a path that begins with one

PathText = Annotated[str, "PATH"]  # a file or a folder; `~` is expanded, and `pathlib.Path` is accepted


def aliases(*flags: str) -> Mapping[str, Any]:
    """Field metadata: other spellings of the flag."""
    return {"aliases": flags}


def positional(metavar: str, flag_too: bool = False, also: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """Field metadata: the value is given without a flag. With `flag_too`, its flag and those in `also` work as well."""
    return {"positional": metavar, "flag_too": flag_too, "aliases": also}


@dataclass(frozen=True)
class Option:
    """One field of a dataclass of options, or of one of its groups.

    Attributes:
        group: the field of the outer dataclass that holds the group; None for an option in no group.
        positional: the name in help of an option that is given without a flag; None for other options.
        has_flag: whether it can be given with a flag.
    """

    name: str
    hint: Any
    default: Any
    help: str
    group: str | None
    aliases: tuple[str, ...] = ()
    positional: str | None = None
    has_flag: bool = True

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def is_switch(self) -> bool:
        return bool in alternatives(self.hint)

    @property
    def flags(self) -> tuple[str, ...]:
        """Every flag that gives the option a value. Those of a switch turn it on."""
        return (self.flag, *self.aliases) if self.has_flag else ()

    @property
    def takes(self) -> int | None:
        """How many words follow the flag; None for any number of words."""
        for hint in alternatives(self.hint):
            if typing.get_origin(hint) is tuple:
                kinds = typing.get_args(hint)
                return None if kinds[-1] is Ellipsis else len(kinds)
        return 0 if self.is_switch else 1

    @property
    def metavar(self) -> str:
        """What follows the flag, as help shows it: `N`, or `bf16|fp16`."""
        return "|".join(_metavar(hint) for hint in alternatives(self.hint) if hint is not type(None))


def flag_of(name: str) -> str:
    """The flag of a field.

    >>> flag_of("train_iters")
    '--train-iters'
    """
    return f"--{name.replace('_', '-')}"


def as_typed(name: str, value: Any) -> str:
    """A field and its value as a command line gives them; the flag alone for a value of None.

    >>> as_typed("lora_r", 8), as_typed("lora_use_rslora", False), as_typed("split", (9, 1))
    ('--lora-r 8', '--no-lora-use-rslora', '--split 9 1')
    """
    if value is None:
        return flag_of(name)
    if isinstance(value, bool):
        return flag_of(name) if value else opposite(flag_of(name))
    words = value if isinstance(value, tuple | list) else [value]
    whole = (int(word) if isinstance(word, float) and word.is_integer() else word for word in words)
    return " ".join([flag_of(name), *map(str, whole)])


def opposite(flag: str) -> str:
    """The flag that turns off what `flag` turns on.

    >>> opposite("--bf16"), opposite("--no-shuffle")
    ('--no-bf16', '--shuffle')
    """
    return f"--{flag[5:]}" if flag.startswith("--no-") else f"--no-{flag[2:]}"


_OPTIONS: dict[type, Mapping[str, Option]] = {}  # results of `options_of`


def options_of(kind: type) -> Mapping[str, Option]:
    """Every option of a dataclass by name, with the options of its groups."""
    if kind not in _OPTIONS:
        _OPTIONS[kind] = _read_options(kind)
    return _OPTIONS[kind]


def _read_options(kind: type) -> Mapping[str, Option]:
    hints = typing.get_type_hints(kind, include_extras=True)
    options: dict[str, Option] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if _is_group(hint):
            inner = options_of(hint)
            options |= {name: dataclasses.replace(option, group=field.name) for name, option in inner.items()}
        else:
            options[field.name] = _option(kind, field, hint)
    return options


class Options:
    """Base of the dataclasses with a command's options. An instance checks itself when it is created."""

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: lists every value of the wrong type. If there is none, lists everything in `problems`.
        """
        wrong_types = []
        for name, option in options_of(type(self)).items():
            if option.group is not None:
                continue
            value = getattr(self, name)
            try:
                read = coerce(value, option.hint)
                if isinstance(read, float) and math.isnan(read):  # comparisons let it pass
                    raise ValueError("expected a number")
                object.__setattr__(self, name, read)
            except ValueError as error:
                wrong_types.append(f"{option.flag} {value}: {error}")
        raise_all(wrong_types or self.problems())

    def problems(self) -> Iterator[str]:
        """What is wrong with the options together, one text for each problem."""
        return iter(())


def as_words(options: Any) -> list[str]:
    """The command line that gives these options: what has no flag, and each flag whose value is not the default.

    `PlanOptions("qwen3-8B", bf16=True)` becomes `["qwen3-8B", "--bf16"]`.
    """
    words: list[str] = []
    for name, option in options_of(type(options)).items():
        value = getattr(options, name)
        if value is None or value == option.default:
            continue
        if option.is_switch:
            words.append(option.flag if value else opposite(option.flag))
        else:
            values = [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
            words += values if option.positional else [option.flag, *values]
    return words


Describe = Callable[[str, Any], str]  # how an error shows a name and its value (None: the name alone)


def in_place(where: str) -> Describe:
    """How an error shows a value that stands in a file, under its name there.

    >>> in_place("index.json")("noop_layers", 3)
    'index.json: noop_layers 3'
    """
    return lambda name, value: f"{where}: {name}" if value is None else f"{where}: {name} {value}"


def as_keyword(name: str, value: Any) -> str:
    return name if value is None else f"{name}={value!r}"


def build(kind: type[T], values: Mapping[str, Any], describe: Describe = as_keyword) -> T:
    """An instance of the dataclass `kind` with these values, by name of the option. Types are checked.

    Raises:
        UserError: lists all names that are unknown, all values of the wrong type, and all missing options.
    """
    groups = as_groups(kind, values, describe)
    ungrouped = groups.pop(None, {})
    return kind(**ungrouped, **{name: group(**groups.get(name, {})) for name, group in groups_of(kind).items()})


def as_groups(
    kind: type, values: Mapping[str, Any], describe: Describe = as_keyword
) -> dict[str | None, dict[str, Any]]:
    """The values by group and name, converted to the types of the fields. Values in no group are under None.

    Raises:
        UserError: lists all names that are unknown, all values of the wrong type, and all missing options.
    """
    options = options_of(kind)
    groups: dict[str | None, dict[str, Any]] = {}
    problems = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in options:
            problems.append(f"{describe(str(key), None)}: unknown{suggestion(name, list(options))}")
            continue
        try:
            groups.setdefault(options[name].group, {})[name] = coerce(value, options[name].hint)
        except ValueError as error:
            problems.append(f"{describe(str(key), value)}: {error}")
    given = {str(key).replace("-", "_") for key, value in values.items() if value is not None}
    for name, option in options.items():
        if option.is_required and name not in given:
            problems.append(f"{describe(name, None)} is required: {option.help.partition('. ')[0].rstrip('.')}")
    raise_all(problems)
    return groups


def coerce(value: Any, hint: Any) -> Any:
    """Convert a value to a field's type. Numbers may be given as text, and one value instead of a tuple of one.

    >>> coerce("3", int | None)
    3
    >>> coerce("a", tuple[str, ...])
    ('a',)

    Raises:
        ValueError: the value does not have that type. The message says what was expected.
    """
    kinds = alternatives(hint)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        try:
            return _coerce_one(value, kind)
        except (TypeError, ValueError) as error:
            if kind in _EXPLAINED or isinstance(error, _NoPathError):
                raise ValueError(str(error)) from None
    raise ValueError(f"expected {' or '.join(_in_words(kind) for kind in kinds if kind is not type(None))}")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union type. Any other type is returned alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _coerce_one(value: Any, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        word = str(value).lower() if isinstance(value, bool) else value  # YAML reads `true` as a boolean, not as text
        if word in arguments:
            return word
    elif origin is tuple:
        return _coerce_tuple(value, arguments)
    elif kind == PathText:
        if isinstance(value, str | os.PathLike):
            return expand(os.fspath(value))
    elif kind is int:
        if not isinstance(value, bool | float):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif kind is float:
        if not isinstance(value, bool):
            return float(value)
    elif kind == JSON_OBJECT:
        return _json_object(value)
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise ValueError


def _coerce_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    if arguments[0] in (int, float):
        items = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
    if arguments[-1] is not Ellipsis and len(items) != len(arguments):
        raise ValueError
    if arguments[0] is not int and arguments[0] is not float:
        # weights in a mixture of data are numbers in YAML
        items = [str(item) if isinstance(item, int | float) else item for item in items]
    return tuple(_coerce_one(item, arguments[0]) for item in items)


class _NoPathError(UserError):
    """A path holds what a shell would have replaced: ~NAME of no user, or a variable."""


def expand(text: str) -> str:
    """Replace `~` at the start of a path, or of the path in NAME=PATH, with the home folder.

    Raises:
        UserError: the path begins with `~NAME`, and there is no such user. Or a part of it is a variable, `$NAME`, and
            nothing of that name is there.
    """
    name, equals, path = text.partition("=")
    if not (equals and path.startswith("~")):
        name, equals, path = "", "", text
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise _NoPathError(f"there is no user {user[1:]}; for a folder of that name, give ./{expanded}")
    variable = _VARIABLE.search(expanded)
    if variable and not os.path.exists(expanded[: variable.end()]):
        raise _NoPathError(
            f"${variable[1]} stands for no environment variable here. In YAML write ${{{variable[1]}}}, and in a shell "
            f"leave out single quotes"
        )
    return f"{name}{equals}{expanded}"


def parse_json_object(flag: str, text: str | None) -> Mapping[str, Any] | None:
    """The JSON object in a flag's text; None when the flag is not given.

    >>> parse_json_object("--map-keys", '{"prompt": "question"}')
    {'prompt': 'question'}

    Raises:
        UserError: the text is not a JSON object.
    """
    try:
        return None if text is None else _json_object(text)
    except ValueError as error:
        raise UserError(f"{flag} {text}: {error}") from None


JSON_OBJECT = Mapping[str, Any]
_EXPLAINED = (JSON_OBJECT,)  # types whose conversion errors already explain the problem


def _json_object(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _option(kind: type, field: dataclasses.Field[Any], hint: Any) -> Option:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return Option(
        name=field.name,
        hint=hint,
        default=default,
        help=_texts_below_fields(kind)[field.name],
        group=None,
        aliases=field.metadata.get("aliases", ()),
        positional=field.metadata.get("positional"),
        has_flag=field.metadata.get("flag_too", True),
    )


def groups_of(kind: type) -> dict[str, type]:
    """The fields of a dataclass that are groups of options, with the groups' types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if _is_group(hints[field.name])}


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


@lru_cache(maxsize=64)
def _texts_below_fields(kind: type) -> dict[str, str]:
    """The text below each field, with the fields of base classes."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                texts[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return texts


def _metavar(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        names = [_metavar(argument) for argument in arguments if argument is not Ellipsis]
        return f"{names[0]} [{names[0]} ...]" if arguments[-1] is Ellipsis else " ".join(names)
    if kind == PathText:
        return "PATH"
    return {int: "N", float: "NUMBER", str: "TEXT", JSON_OBJECT: "JSON", bool: ""}[kind]


def _in_words(kind: Any) -> str:
    """A type as text for errors: `a whole number`, `bf16 or fp16`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        inner = _in_words(arguments[0])
        return f"{inner}, or several" if arguments[-1] is Ellipsis else f"{len(arguments)} times {inner}"
    if kind == PathText:
        return "a path"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words[kind]
