"""Megatron's names for the folders of a checkpoint, shared by the native and the `torch` format."""

from __future__ import annotations

from pathlib import Path

from tandem.errors import UserError
from tandem.files.publish import recover
from tandem.parallel.layout import Layout

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # what the tracker file of a published checkpoint may say instead of a number
COMPANIONS = "hf"  # inside an iteration: config.json and tokenizer files


def iteration_folder(folder: str | Path, iteration: int) -> Path:
    """Where an iteration lies in a checkpoint folder.

    >>> iteration_folder("ckpt", 10)
    PosixPath('ckpt/iter_0000010')
    """
    return Path(folder) / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """The number in the name of an iteration's folder; None for other folders, such as `release`."""
    prefix, _, number = folder.name.partition("_")
    return int(number) if prefix == "iter" and number.isdigit() else None


def rank_folder(layout: Layout, tensor_rank: int, pipeline_rank: int, expert_rank: int = 0) -> str:
    """Megatron's name: a number is left out where all ranks have the same.

    >>> rank_folder(Layout(expert_model_parallel_size=4), 0, 0, 3)
    'mp_rank_00_003'
    """
    pipeline = f"_{pipeline_rank:03d}" if layout.pipeline_model_parallel_size > 1 else ""
    expert = f"_{expert_rank:03d}" if layout.expert_model_parallel_size > 1 else ""
    return f"mp_rank_{tensor_rank:02d}{pipeline}{expert}"


def find_iteration(folder: str | Path, iteration: int | None = None) -> Path:
    """The folder of `iteration`; for None, of the iteration that the tracker file names.

    If a process was killed while it published the folder, that is finished first.

    Raises:
        UserError: there is no tracker file, or it holds neither a number nor "release".
    """
    recover(Path(folder))
    chosen = _newest(folder) if iteration is None else iteration_folder(folder, iteration)
    recover(chosen)
    return chosen


def _newest(folder: str | Path) -> Path:
    path = Path(folder) / TRACKER
    if not Path(folder).is_dir():
        raise UserError(f"{folder} does not exist: expected a checkpoint folder with {TRACKER}")
    if not path.exists():
        raise UserError(f"{folder} has no {TRACKER}: not a checkpoint folder, or its first save never finished")
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        return Path(folder) / RELEASE
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{path} holds {text!r}; expected the number of an iteration")
    return iteration_folder(folder, int(text))


def holds_iterations(folder: str | Path) -> bool:
    """Whether iterations were saved in `folder`, whole or damaged."""
    return (Path(folder) / TRACKER).exists() or bool(saved_iterations(folder))


def saved_iterations(folder: str | Path) -> list[int]:
    """The iterations that a checkpoint folder holds, newest first."""
    numbers = (iteration_of(path) for path in Path(folder).glob("iter_*") if path.is_dir())
    return sorted((number for number in numbers if number is not None), reverse=True)
