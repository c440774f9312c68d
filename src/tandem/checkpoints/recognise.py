"""What a path is that holds no model for us: in words, with the step that helps."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tandem.checkpoints.folders import COMPANIONS, RELEASE, TRACKER, iteration_of, saved_iterations
from tandem.checkpoints.hf.weights import form_in
from tandem.errors import UserError
from tandem.files.real import check_real, near_names
from tandem.files.text import read_json

MOST_NAMES = 4  # of a list in a message
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
GGUF, NEMO = ".gguf", ".nemo"
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", f"*{GGUF}", f"*{NEMO}")


def unusable(path: Path) -> UserError:
    """The error for a path that is neither a Hugging Face folder nor a checkpoint folder.

    The first description that fits is taken. A dangling link or a Git-LFS pointer raises its own error.
    """
    for place in (path, path / CONFIG, path / TRACKER):
        check_real(place)
    kinds = MISSING if not path.exists() else FILES if path.is_file() else FOLDERS
    texts = (describe(path) for describe in kinds)
    text = next((text for text in texts if text), "expected a Hugging Face folder or a checkpoint folder")
    return UserError(f"{path} {text}")


def no_adapter(path: Path) -> UserError:
    """The error for a path of `--lora-load` that holds no adapters."""
    expected = "expected a PEFT folder, or a run that trained adapters"
    if not path.exists():
        return UserError(f"--lora-load {path} does not exist: {expected}")
    if path.is_file():
        step = f"is a file: give the folder, {path.parent}" if (path.parent / ADAPTER).exists() else expected
    elif is_model_folder(path):
        step = f"holds a whole model: give it with --load; {expected}"
    else:
        step = _trainer_output(path) or expected
    return UserError(f"--lora-load {path}: {step}")


# Each of the functions below says what `path` is, and what helps; None when it is something else.


def _hub_name(path: Path) -> str | None:
    if not HUB_NAME.fullmatch(str(path)) or path.parent.exists():
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    cached = home / "hub" / f"models--{str(path).replace('/', '--')}"
    if snapshot := _newest(cached.glob("snapshots/*")):
        return f"does not exist. If you mean the model of that name on the hub, it lies in {snapshot}: give that folder"
    return (
        f"does not exist. If you mean the model of that name on the hub: nothing is downloaded here; run "
        f"`hf download {path} --local-dir {path.name}`, and give {path.name}"
    )


def _absent(path: Path) -> str | None:
    return f"does not exist: expected a Hugging Face folder or a checkpoint folder{near_names(path)}"


def _weight_file(path: Path) -> str | None:
    if path.suffix == GGUF:
        return "is a GGUF file, whose weights are quantised: give the folder of the original model, with safetensors"
    if path.suffix == NEMO:
        return "is a NeMo archive, which is not read: export it from NeMo to Hugging Face's form first"
    return None


def _single_file(path: Path) -> str | None:
    folder = path.parent
    step = f"give the folder, {folder}" if (folder / CONFIG).exists() or (folder / TRACKER).exists() else None
    if step is None and (iteration := _iteration_above(path)) is not None:
        step = _load(iteration)
    return f"is a file: {step or f'expected a folder, and {folder} holds no {CONFIG}, which describes the model'}"


def _iteration(path: Path) -> str | None:
    iteration = _iteration_above(path)
    if iteration is None:
        return None
    kind = "is one iteration of a checkpoint" if iteration == path else "is a part of one iteration of a checkpoint"
    return f"{kind}, not the checkpoint's folder: {_load(iteration)}"


def _without_tracker(path: Path) -> str | None:
    iterations = saved_iterations(path)
    if not iterations or (path / TRACKER).exists():
        return None
    return (
        f"holds the iterations {_numbers(iterations)}, but no {TRACKER}, which names the newest: its first save never "
        f"finished, or the file was not copied. --ckpt-step {iterations[0]} takes an iteration all the same"
    )


def _trainer_output(path: Path) -> str | None:
    folders = [
        folder for folder in path.glob("checkpoint-*") if any((folder / name).exists() for name in (CONFIG, ADAPTER))
    ]
    numbers = {int(folder.name.split("-")[-1]): folder for folder in folders if folder.name[11:].isdigit()}
    if not numbers:
        return None
    return (
        f"is the output folder of a Trainer, with the checkpoints {_numbers(sorted(numbers))}, and holds none itself: "
        f"give {numbers[max(numbers)]}"
    )


def _hub_cache(path: Path) -> str | None:
    if snapshot := _newest(path.glob("snapshots/*") if path.name != "snapshots" else path.iterdir()):
        return f"is a folder of the hub's cache; the model's files are in a folder inside it: give {snapshot}"
    models = sorted(folder.name for folder in (*path.glob("models--*"), *path.glob("hub/models--*")))
    if models:
        return f"is the hub's cache, with {_some(models)}: give the folder of one model, MODEL/snapshots/..."
    return None


def _adapter(path: Path) -> str | None:
    config = path / ADAPTER
    if not config.exists():
        return None
    base = _json(config).get("base_model_name_or_path")
    return (
        f"is a PEFT adapter of the model {base or '(not named)'}, which is no folder here: give the folder of that "
        f"model, and the adapter with --lora-load {path}"
    )


def _deepspeed(path: Path) -> str | None:
    parts = [*path.glob("*_model_states.pt"), *path.glob("global_step*/*_model_states.pt")]
    if not parts:
        return None
    script = path / "zero_to_fp32.py"
    where = path if script.exists() else path.parent
    return (
        f"holds DeepSpeed's files of single ranks, not a model: `python {where / 'zero_to_fp32.py'} {where} FOLDER` "
        f"makes weights of them. Copy {CONFIG} and the tokenizer's files to FOLDER"
    )


def _fully_sharded(path: Path) -> str | None:
    folders = [folder for folder in (path, *path.glob("pytorch_model_fsdp_*")) if any(folder.glob("*.distcp"))]
    if not folders:
        return None
    return (
        f"holds sharded files of PyTorch, not a model: `accelerate merge-weights {folders[0]} FOLDER` makes weights of "
        f"them. Copy {CONFIG} and the tokenizer's files to FOLDER"
    )


def _meta(path: Path) -> str | None:
    if not (path / "params.json").exists() or not any(path.glob("consolidated.*")):
        return None
    return (
        "holds a model in the form in which its makers distribute it (params.json, consolidated.*): give the same "
        "model in Hugging Face's form; transformers has scripts that convert it (convert_*_weights_to_hf.py)"
    )


def _without_weights(path: Path) -> str | None:
    if not (path / CONFIG).exists() or form_in(path):
        return None
    others = sorted(file.name for pattern in OTHER_WEIGHTS for file in path.glob(pattern))
    found = f"; there are {_some(others)}" if others else ""
    return f"holds no weights: expected model.safetensors, pytorch_model.bin, or an index of either{found}"


def _without_config(path: Path) -> str | None:
    if form_in(path) is None:
        return None
    return f"holds weights, but no {CONFIG}, which describes the model: copy it from the original model's folder"


def _parent(path: Path) -> str | None:
    models = sorted(folder for folder in path.iterdir() if folder.is_dir() and is_model_folder(folder))
    if not models:
        return None
    return f"holds no model itself; give one of the folders in it: {_some([str(folder) for folder in models])}"


def _git_clone(path: Path) -> str | None:
    pointers = sorted(file.name for pattern in OTHER_WEIGHTS for file in path.glob(pattern))
    if pointers:
        return f"holds no {CONFIG} and no {TRACKER}, but {_some(pointers)}: expected a Hugging Face folder"
    return None


def _nothing(path: Path) -> str | None:
    names = sorted(entry.name for entry in path.iterdir())
    there = f"it holds {_some(names)}" if names else "it is empty"
    return f"is neither a Hugging Face folder ({CONFIG}) nor a checkpoint folder ({TRACKER}): {there}"


Describe = Callable[[Path], str | None]
MISSING: tuple[Describe, ...] = (_hub_name, _absent)
FILES: tuple[Describe, ...] = (_weight_file, _single_file)
FOLDERS: tuple[Describe, ...] = (
    *(_iteration, _without_tracker, _adapter, _deepspeed, _fully_sharded, _trainer_output, _without_weights),
    *(_hub_cache, _meta, _without_config, _parent, _git_clone, _nothing),
)


def is_model_folder(path: Path) -> bool:
    """Whether a folder looks like a model in Hugging Face's form, or like a checkpoint folder."""
    return (path / TRACKER).exists() or ((path / CONFIG).exists() and form_in(path) is not None)


def _iteration_above(path: Path) -> Path | None:
    """The folder of the iteration that a path is, or lies in; None for other paths."""
    for folder in (path, *path.parents[:2]):
        is_named = iteration_of(folder) is not None or folder.name == RELEASE
        if is_named and any(any(folder.glob(pattern)) for pattern in ("mp_rank_*", COMPANIONS, "*.distcp")):
            return folder
    return None


def _load(iteration: Path) -> str:
    number = iteration_of(iteration)
    return f"give {iteration.parent}" + (f" and --ckpt-step {number}" if number is not None else "")


def _newest(folders: Iterable[Path]) -> Path | None:
    """Of the folders with a config, the one that was changed last."""
    models = [folder for folder in folders if (folder / CONFIG).exists()]
    return max(models, key=lambda folder: folder.stat().st_mtime, default=None)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _json(path: Path) -> dict[str, Any]:
    check_real(path)
    content = read_json(path)
    return content if isinstance(content, dict) else {}
