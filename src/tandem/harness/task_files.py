"""Finds lm-evaluation-harness's own tasks by name, in the few of its folders that name them.

Its list of all tasks parses 14,000 YAML files, which takes half a minute. To read their words takes a second.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import filter as matching
from functools import cache
from glob import has_magic
from pathlib import Path
from typing import Any

WORD = re.compile(r"[^\s\"',\[\]{}]+")
INCLUDED = re.compile(r"^include:(.*(?:\n *- .*)*)", re.MULTILINE)
DEFINED = re.compile(r"^(?:task|group|tag): *[\"']?([^\s\"',\[\]{}]+)[\"']?\s*$", re.MULTILINE)


def add_tasks(index: dict[str, Any], names: Sequence[str], home: Path) -> None:
    """Add what `names` need of the tasks in `home`: themselves, what groups consist of, and all tasks of a tag.

    Args:
        index: by name, `lm_eval.tasks.TaskManager.task_index`. What is there already stays.
        names: of tasks, groups and tags; they can have wildcards.
        home: the folder of lm-evaluation-harness's tasks.
    """
    indices: dict[str, Mapping[str, Any]] = {}
    library: dict[str, Any] = {}
    wanted = set(names)
    while folders := _naming(wanted, home) - set(indices):
        indices.update({folder: _index_of(home / folder) for folder in folders})
        library = _merged([indices[folder] for folder in sorted(indices)])
        wanted = _needed({**library, **index}, wanted)
    index.update({name: entry for name, entry in library.items() if name not in index})


def defined_names(home: Path) -> list[str]:
    """The names in lines as `task: NAME`, `group: NAME` and `tag: NAME`, in order. Tags in lists are not among them."""
    return sorted({name for text in _texts(home).values() for name in DEFINED.findall(text)})


def _needed(known: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """The names, and those in the lists of groups among them, and in the lists of these."""
    needed, pending = set(names), list(names)
    while pending:
        name = pending.pop()
        for match in matching(known, name) if has_magic(name) else [name]:
            more = set(_members(known[match])) - needed if match in known else set()
            needed |= more
            pending += more
    return needed


def _index_of(folder: Path) -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False).task_index


def _merged(indices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As if the folders were one: of two entries the first is taken, and a tag has the tasks of all of them."""
    merged: dict[str, Any] = {}
    for name, entry in (item for index in indices for item in index.items()):
        there = merged.setdefault(name, entry)
        if there is not entry and there.yaml_path is None and entry.yaml_path is None:
            merged[name] = replace(there, tags=there.tags | entry.tags)
    return merged


def _members(entry: Any) -> Iterator[str]:
    """The names in a group's list, and in lists inside it. They may be of tasks that only the group defines."""
    members = (entry.cfg or {}).get("task")
    pending = list(members) if isinstance(members, list) else []
    while pending:
        member = pending.pop()
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict):
            for value in (member.get("group"), member.get("task")):
                pending += value if isinstance(value, list) else [value]


def _naming(names: Collection[str], home: Path) -> set[str]:
    """The folders of `home` whose files hold such a name."""
    patterns = [name for name in names if has_magic(name)]
    return {
        folder
        for folder, words in _words(home).items()
        if not words.isdisjoint(names) or any(matching(words, pattern) for pattern in patterns)
    }


@cache
def _words(home: Path) -> dict[str, set[str]]:
    """The words of each folder's files, and of the files that these include."""
    words: dict[str, set[str]] = {}
    for path, text in _texts(home).items():
        words.setdefault(path.relative_to(home).parts[0], set()).update(WORD.findall(text))
        for included in _included(path, text):
            words[path.relative_to(home).parts[0]].update(WORD.findall(included))
    return words


def _included(path: Path, text: str) -> Iterator[str]:
    """What a file includes, and what that includes. It may have any name."""
    for names in INCLUDED.findall(text):
        for name in WORD.findall(names):
            if (other := path.parent / name).is_file():
                yield (more := _read(other))
                yield from _included(other, more)


@cache
def _texts(home: Path) -> dict[Path, str]:
    """All YAML files."""
    return {path: _read(path) for path in home.glob("*/**/*.yaml")}


@cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
