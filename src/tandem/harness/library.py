"""lm-evaluation-harness itself: imported when it is needed, and its tasks by name."""

from __future__ import annotations

import fnmatch
import glob
import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.errors import UserError, nearest
from tandem.harness.task_files import add_tasks, defined_names

YAML = (".yaml", ".yml")


def require_library() -> None:
    """Import it.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars would be torn by what a run prints
    try:
        importlib.import_module("lm_eval.evaluator")
    except ImportError as error:
        raise UserError(f"benchmarks need lm-evaluation-harness: {error}; pip install 'tandem-llm[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what its warnings say is in the results


def load_tasks(names: Sequence[str], include_path: str | None) -> dict[str, Any]:
    """Tasks and groups by name, with their data, as `lm_eval.tasks.TaskManager.load` returns them.

    A name can have wildcards, or be the path of a task's YAML file. Tasks in `include_path` come before those of
    lm-evaluation-harness, which are looked for only when a name is not found there.

    Raises:
        UserError: there is no such task, or its data cannot be read.
    """
    require_library()
    import lm_eval.tasks

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path}: no such folder")
    home = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=False)
    if absent := [name for name in names if not name.endswith(YAML) and not _matches(manager.task_index, name)]:
        add_tasks(manager.task_index, absent, home)
    found = [match for name in names for match in _found(manager.task_index, name, home)]
    return load_specs(manager, found)


def load_specs(manager: Any, specs: Sequence[Any]) -> dict[str, Any]:
    """Build tasks.

    Raises:
        UserError: one of them cannot be built.
    """
    try:
        loaded: dict[str, Any] = manager.load(list(specs))
    except Exception as error:  # a task file can hold anything, and its data lie anywhere
        names = " ".join(spec for spec in specs if isinstance(spec, str))
        raise UserError(f"--tasks {names}: {_in_words(error)}" if names else _in_words(error)) from error
    return loaded


def _matches(index: Mapping[str, Any], name: str) -> list[str]:
    if name.endswith(YAML):
        return [name] if Path(name).is_file() else []
    if glob.has_magic(name):
        return sorted(fnmatch.filter(index, name))
    return [name] if name in index else []


def _found(index: Mapping[str, Any], name: str, home: Path) -> list[str]:
    if matches := _matches(index, name):
        return matches
    if name.endswith(YAML):
        raise UserError(f"--tasks {name}: no such file")
    known = [*index, *defined_names(home)]
    raise UserError(f"--tasks {name}: no such task; --include-path adds a folder{nearest(name, known)}")


def _in_words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, FileNotFoundError | UserError) else f"{type(error).__name__}: {text}"


@contextmanager
def seeds(seed: int, numpy_seed: int) -> Iterator[None]:
    """Inside, Python's and NumPy's global random numbers are those of the seeds; after it, what they were before."""
    import random

    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(numpy_seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
