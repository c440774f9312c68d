"""The small files next to a model's weights: config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tandem.checkpoints.folders import COMPANIONS
from tandem.checkpoints.hf.weights import INDEX, TORCH_INDEX
from tandem.checkpoints.interface import Companions
from tandem.models.config import ModelConfig
from tandem.models.hf_config import load_hf_config, to_hf

COMPANION_PATTERNS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def companion_files(folder: str | Path) -> list[Path]:
    """The small files of a Hugging Face folder, except its config: tokenizer, template, generation settings."""
    files = {path for pattern in COMPANION_PATTERNS for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(path for path in files if path.name not in ("config.json", INDEX, TORCH_INDEX))


def companions_of(folder: str | Path) -> Companions:
    """The config and the companion files of a Hugging Face folder."""
    return Companions(load_hf_config(folder), companion_files(folder))


def companions_in(iteration: Path) -> Companions:
    """Those that were stored with an iteration of a checkpoint; none where a trainer of others wrote it."""
    return companions_of(iteration / COMPANIONS) if (iteration / COMPANIONS).is_dir() else Companions()


def write_companions(folder: Path, companions: Companions, config: ModelConfig, dtype: str) -> None:
    """Write `config.json` and copy the tokenizer files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = to_hf(config, companions.hf_config, dtype)
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    for path in companions.files:
        shutil.copyfile(path, folder / path.name)
    for name, text in companions.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
