"""`run.json`: everything that is needed to repeat a training."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tandem.backends.interface import Engine
from tandem.checkpoints.interface import TensorSource
from tandem.config.settings import Settings
from tandem.data.record import record_of
from tandem.errors import UserError
from tandem.files.jsonl import DAMAGED
from tandem.files.places import same_place
from tandem.files.publish import write_text_atomically
from tandem.files.real import check_folder
from tandem.files.text import unreadable
from tandem.logs import log
from tandem.models.tensors import parameter_count, trained_count
from tandem.training.start.data_paths import all_prefixes
from tandem.version import __version__

RUN_FILE = "run.json"
FORMAT = {"format": "tandem-run", "version": 1}
# Packages whose version may change what a run computes.
PACKAGES = ("torch", "torch_npu", "mindspore", "numpy", "tokenizers", "gigatoken", "pyarrow")
# Environment variables that may change it: number of threads, launchers, collectives.
ENVIRONMENT = ("OMP_", "MKL_", "CUDA_", "NCCL_", "CUBLAS_", "ASCEND_", "HCCL_", "PYTORCH_", "MS_", "TASK_QUEUE_")


def describe_start(
    settings: Settings, source: TensorSource, engine: Engine, iteration: int, processes: int
) -> dict[str, Any]:
    """One start of a run: its settings, its command, and everything else that the losses may depend on."""
    return {
        "iteration": iteration,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "command": shlex.join(sys.argv),
        "directory": os.getcwd(),
        "processes": processes,
        "settings": settings.to_dict(),
        "weights": _places(source, settings.lora.lora_load),
        "model": {
            **source.config.to_dict(),
            "parameters": parameter_count(source.config),
            "trained": trained_count(source.config),
        },
        "data": {prefix: record_of(prefix) for prefix in all_prefixes(settings.data)},
        "versions": versions(),
        "code": code_version(),
        "device": engine.device_name,
        "param_dtype": engine.param_dtype,
        "platform": {"system": platform.platform(), "host": platform.node(), "cpus": os.cpu_count()},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)},
    }


def _places(source: TensorSource, lora_load: str | None) -> dict[str, Any]:
    """Where the weights of a run were, and the adapters of `--lora-load`, each with the iteration.

    A run that goes on has its adapters from its own checkpoint, whatever `--lora-load` says.
    """
    adapters, base = source.adapters, source.base
    if adapters is not None and base is not None and lora_load is not None and _is_in(adapters, lora_load):
        return {**_place(base), "adapters": _place(adapters)}
    return _place(source)


def _place(source: TensorSource) -> dict[str, Any]:
    return {"location": source.location, "ckpt_step": source.iteration}


def _is_in(source: TensorSource, folder: str) -> bool:
    """Whether a source is in a folder, or is an iteration of it."""
    return source.folder is not None and any(same_place(folder, str(p)) for p in (source.folder, source.folder.parent))


def append_start(folder: Path, start: dict[str, Any]) -> None:
    """Add a start to the record of a run. Earlier starts are removed if the run repeats all of their steps.

    A damaged record is moved away, with a warning: it must not keep a run from going on.
    """
    path = folder / RUN_FILE
    try:
        recorded = read_starts(folder) if path.exists() else []
    except UserError as error:
        aside = path.with_name(path.name + DAMAGED)
        path.rename(aside)
        log.warning("%s: this one. The damaged file is now %s", error, aside.name)
        recorded = []
    starts = [*(other for other in recorded if other["iteration"] < start["iteration"]), start]
    write_text_atomically(path, json.dumps({**FORMAT, "starts": starts}, indent=1, ensure_ascii=False) + "\n")


def read_starts(folder: str | Path) -> list[dict[str, Any]]:
    """Every start of a run, oldest first.

    Raises:
        UserError: there is no record, or the file is not a record.
    """
    check_folder(folder, "the --save folder of a training run")
    path = Path(folder) / RUN_FILE
    if not path.exists():
        runs = sorted(str(file.parent) for file in Path(folder).glob(f"*/{RUN_FILE}"))
        step = f"give one of the runs in it: {', '.join(runs)}" if runs else "expected the --save folder of a run"
        raise UserError(f"{folder} is no training run, as it has no {RUN_FILE}: {step}")
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(unreadable(path, error)) from error
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}. The next start of the run begins a new record") from error
    if not isinstance(content, dict) or {name: content.get(name) for name in FORMAT} != FORMAT:
        raise UserError(f"{path}: expected {FORMAT}")
    starts = content.get("starts")
    if not isinstance(starts, list) or not starts or not all(_is_start(start) for start in starts):
        raise UserError(f"{path}: damaged: expected a list of starts. The next start of the run begins a new record")
    return starts


def _is_start(start: object) -> bool:
    return isinstance(start, dict) and isinstance(start.get("iteration"), int)


def versions() -> dict[str, str]:
    """The versions of Python, of Tandem, and of installed packages that may change what a run computes."""
    installed = {"python": platform.python_version(), "tandem": __version__}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def code_version() -> dict[str, Any] | None:
    """The commit of Tandem's code, and whether files differ from it; None when it is not a git checkout."""
    folder = Path(__file__).parents[1]
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed, perhaps inside the checkout of another project
    return {"commit": _git(folder, "rev-parse", "HEAD"), "modified": bool(_git(folder, "status", "--porcelain", "."))}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None
