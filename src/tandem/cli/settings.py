"""Settings of a command that trains or evaluates, from `--config FILE.yaml` and flags. Flags override the file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from tandem.cli.arguments import parse
from tandem.config.checks import wrong_ranges, wrong_stage
from tandem.config.parsing import flat, from_yaml, read_yaml
from tandem.config.settings import Settings
from tandem.config.upstream.flags import IGNORED, Ignored, split_ignored, with_own_flags
from tandem.config.upstream.msrun import as_torchrun
from tandem.errors import Problems, UserError
from tandem.options import expand

CONFIG_FLAG = "--config"
YAML = (".yaml", ".yml")


def parse_settings(
    command: str,
    description: str,
    argv: Sequence[str],
    *,
    first: Sequence[str] = (),
    groups: Collection[str] | None = None,
    positionals: Mapping[str, str] | None = None,
    values: Mapping[str, Any] | None = None,
    ignored: Mapping[str, Ignored] = IGNORED,
) -> tuple[Settings, list[str]]:
    """The settings in a command line, and notices about flags without effect. See `arguments.parse`.

    Args:
        ignored: flags of other tools' scripts that are accepted, and have no effect here.

    Raises:
        UserError: a name is unknown, a value is of the wrong type or out of range, or a flag belongs to another stage.
    """
    config_file, rest = _take_config(list(argv))
    given = [_name(word) for word in rest if word.startswith("--")]
    rest, notices, refused = split_ignored(with_own_flags(as_torchrun(rest)), ignored)
    problems = Problems()
    if config_file:
        with problems.noted():
            from_yaml(config_file)  # checked first, so that errors in the file name the file
            of_file = flat(read_yaml(config_file), config_file)
            given += of_file
            values = {**(values or {}), **of_file}

    def check(settings: Settings) -> Iterator[str]:
        if (load := settings.checkpoint.load) is not None and load.endswith(YAML):
            yield f"{load}: expected the folder of a model; a file of settings is given with {CONFIG_FLAG} {load}"
        yield from wrong_ranges(settings.to_dict())
        if not problems.texts:  # a file may say which stage it is
            yield from wrong_stage(settings, given, command)

    settings = parse(
        Settings,
        command,
        description,
        rest,
        first=first,
        groups=groups,
        positionals=positionals,
        values=values,
        stray=_stray,
        problems=[*problems.texts, *refused],
        check=check,
    )
    return settings, notices


def _name(flag: str) -> str:
    """`--dpo-beta=0.1` -> dpo_beta"""
    return flag[2:].partition("=")[0].replace("-", "_")


def _stray(word: str) -> str:
    """What to say of a word that belongs to no flag."""
    if word.endswith(YAML):
        return f"expected a flag; a file of settings is given with {CONFIG_FLAG} {word}"
    return "expected a flag, such as --load FOLDER or --data-path PREFIX"


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    for index, word in enumerate(argv):
        if word.startswith(f"{CONFIG_FLAG}="):
            return expand(word.split("=", 1)[1]), argv[:index] + argv[index + 1 :]
        if word == CONFIG_FLAG:
            if index + 1 == len(argv):
                raise UserError(f"{CONFIG_FLAG} needs the name of a YAML file")
            return expand(argv[index + 1]), argv[:index] + argv[index + 2 :]
    return None, argv
