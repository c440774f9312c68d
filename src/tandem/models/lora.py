"""Low-rank adapters (arXiv 2106.09685): which modules get one, and of which rank. Fields mean what PEFT's mean."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tandem.errors import UserError, raise_all
from tandem.options import Describe, as_typed, flag_of

ALL_LINEAR = "all-linear"
Pattern = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Settings of adapters, under PEFT's names.

    A module's weight W gets two factors: B A, times a scale, is added to it. Only A and B are trained.

    Attributes:
        r: the rank: rows of A, and columns of B.
        lora_alpha: the scale is `lora_alpha / r`.
        target_modules: ends of module paths, such as `q_proj`; or one regular expression for whole paths; or
            "all-linear". Megatron's names (`linear_qkv`) give the modules that are fused in it one A in common.
        use_rslora: the scale is `lora_alpha / sqrt(r)` (arXiv 2312.03732).
        use_dora: rows of W + scale B A are also given a trained length (arXiv 2402.09353).
        lora_dropout: the share of an adapter's input numbers that a training step drops.
        rank_pattern, alpha_pattern: exceptions, by regular expression for the end of a module path.
        layers_to_transform: numbers of the layers that get adapters; None for all.
        exclude_modules: modules that get none, in the form of `target_modules`; None for no exceptions.
        target_parameters: ends of paths of parameters that are no module's `weight`, such as `experts.gate_up_proj` of
            transformers 5: all experts of a layer in one tensor.
    """

    r: int = 16
    lora_alpha: float = 32
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()
    layers_to_transform: tuple[int, ...] | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        raise_all(wrong_values(vars(self)))

    @classmethod
    def of_flags(cls, **values: Any) -> Lora:
        """Adapters that flags describe: errors call the fields as these are typed."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        raise_all(wrong_values({**defaults, **values}, as_flag))
        return cls(**values)

    @property
    def kind(self) -> str:
        """Its name in words."""
        return "DoRA" if self.use_dora else "rsLoRA" if self.use_rslora else "LoRA"

    @property
    def modules(self) -> str:
        """`target_modules` as one text, as flags take them, and `target_parameters`."""
        return " ".join(filter(None, (_words(self.target_modules), _words(self.target_parameters))))

    def includes(self, path: str, layer: int) -> bool:
        """Whether the module at `path`, in decoder layer `layer`, gets an adapter."""
        if self.layers_to_transform is not None and layer not in self.layers_to_transform:
            return False
        if self.exclude_modules is not None and _matches(self.exclude_modules, self._excluded_ends, path):
            return False
        return self.target_modules == ALL_LINEAR or _matches(self.target_modules, self._target_ends, path)

    def includes_parameter(self, path: str) -> bool:
        """Whether the parameter at `path` gets an adapter. As in PEFT, other settings choose modules only."""
        return _matches(self.target_parameters, frozenset(self.target_parameters), path)

    @cached_property
    def _target_ends(self) -> frozenset[str]:
        return frozenset(self.target_modules)

    @cached_property
    def _excluded_ends(self) -> frozenset[str]:
        return frozenset(self.exclude_modules or ())

    def rank_of(self, path: str) -> int:
        return int(_exception(self.rank_pattern, path, self.r))

    def alpha_of(self, path: str) -> float:
        return _exception(self.alpha_pattern, path, self.lora_alpha)

    def scale_of(self, path: str) -> float:
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def check_flags(self, given: Mapping[str, object], where: str) -> None:
        """Raise UserError, with both values, for flags that contradict these adapters, which are at `where`.

        Args:
            given: values by the name of their setting, such as `lora_r`. None and () say nothing; 0 and False do.
        """
        wrong = []
        for name, value in given.items():
            if not _is_stated(value):
                continue
            own_name = name if hasattr(self, name) else name.removeprefix("lora_")
            recorded = getattr(self, own_name)
            expected = as_targets(value) if isinstance(value, tuple) else value
            if _unordered(expected) != _unordered(recorded):
                wrong.append(
                    f"{as_typed(name, value)} contradicts {where}, whose adapters have {own_name} {_words(recorded)}: "
                    f"leave it out"
                )
        if wrong:
            raise UserError(*wrong)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Lora:
        """The inverse of `to_dict`, also when JSON has turned tuples into lists."""
        return cls(**{name: _as_tuples(value) for name, value in values.items()})


def as_recorded(name: str, value: Any) -> str:
    """A field of `Lora` as a file has it."""
    return name if value is None else f"{name} {value!r}"


def wrong_values(values: Mapping[str, Any], describe: Describe = as_recorded) -> Iterator[str]:
    """What is wrong with the fields of `Lora`, one text for each problem.

    Args:
        values: by name of the field.
        describe: how to call a field, by default as PEFT does.
    """
    for rank in (values["r"], *(rank for _, rank in values["rank_pattern"])):
        if type(rank) is not int or rank < 1:
            yield f"{describe('r', rank)}: expected a whole number, at least 1"
    for alpha in (values["lora_alpha"], *(alpha for _, alpha in values["alpha_pattern"])):
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            yield f"{describe('lora_alpha', alpha)}: expected a number above 0"
    dropout = values["lora_dropout"]
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        yield f"{describe('lora_dropout', dropout)}: expected at least 0 and below 1"
    elif dropout and values["use_dora"]:
        yield f"{describe('lora_dropout', dropout)} and {describe('use_dora', True)} exclude each other: leave one out"
    for name, text in _expressions(values):
        try:
            re.compile(text)
        except re.error as error:
            yield f"{describe(name, text)} is no regular expression: {error}"
    if not values["target_modules"] and not values["target_parameters"]:
        yield f"{describe('target_modules', None)} is empty: expected names such as q_proj, or all-linear"


def as_flag(name: str, value: Any) -> str:
    """A field of `Lora` as the command line has it.

    >>> as_flag("r", 0), as_flag("lora_dropout", 2.5)
    ('--lora-r 0', '--lora-dropout 2.5')
    """
    return as_typed(name if name.startswith("lora_") else f"lora_{name}", value)


def _expressions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The regular expressions, each with the name of its setting."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := values[name], str):
            yield name, value
    for name in ("rank_pattern", "alpha_pattern"):
        yield from ((name, key) for key, _ in values[name])


def check_stated(lora: Lora | None, given: Mapping[str, object], where: str) -> None:
    """The same for adapters that may not be there: then no flag can be given."""
    if lora is not None:
        lora.check_flags(given, where)
    elif flags := [flag_of(name) for name, value in given.items() if _is_stated(value)]:
        raise UserError(f"{' '.join(flags)}: {where} has no adapters: give theirs with --lora-load")


def _is_stated(value: object) -> bool:
    """Whether the value of a setting was given."""
    return value is not None and value != ()


def as_targets(words: tuple[str, ...]) -> tuple[str, ...] | str:
    """`target_modules` from the words of `--lora-target-modules`."""
    return ALL_LINEAR if words == (ALL_LINEAR,) else words


def _words(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _unordered(value: object) -> object:
    """Names of modules in any order are the same."""
    return set(value) if isinstance(value, tuple) else value


def _matches(names: tuple[str, ...] | str, ends: frozenset[str], path: str) -> bool:
    """Whether names match a path: as one regular expression for all of it, or as one of the `ends` that they are."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in ends or any(path[dot + 1 :] in ends for dot, letter in enumerate(path) if letter == ".")


def _exception(pattern: Iterable[tuple[str, float]], path: str, default: float) -> float:
    """The value of the first key that matches the end of `path`, as in PEFT."""
    return next((value for key, value in pattern if re.match(rf"(.*\.)?({key})$", path)), default)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
