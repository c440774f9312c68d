"""A toy job on disk: model folder, preprocessed text and instructions, settings to train on them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.checkpoints.copy import copy
from tandem.checkpoints.hf.companions import companions_of
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.random_init import RandomSource
from tandem.config.parsing import from_dict
from tandem.config.settings import Settings
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.models.experts import Experts
from tandem.models.hf_config import from_hf
from tandem.quickstart.tasks import make_world, write_world
from tandem.quickstart.toy_model import write_toy_model


@dataclass(frozen=True)
class Workspace:
    """Folders of a toy job: `hf` (random weights, tokenizer), `text` and `instructions` (prefixes)."""

    root: Path
    hf: Path
    corpus: Path
    questions: Path
    text: Path
    instructions: Path

    def settings(self, framework: str, **values: Any) -> Settings:
        """A short run on text; `instructions=True` makes it a fine-tuning run."""
        instructions = values.pop("instructions", False)
        defaults = {
            "ai_framework": framework,
            "data_path": str(self.instructions if instructions else f"{self.text}_text_document"),
            "is_instruction_dataset": instructions,
            "seq_length": 32,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": 20,
            "lr": 3e-3,
            "lr_decay_style": "cosine",
            "lr_warmup_iters": 3,
            "log_interval": 1,
            "eval_iters": 0,
            "split": "100,0,0",
        }
        if "init" not in values:
            defaults["load"] = str(self.hf)
        return from_dict({**defaults, **values}, "test")


def make_workspace(root: Path, num_layers: int = 4) -> Workspace:
    world = make_world(seed=7, lists=30, held_out_lists=5)
    corpus, questions = write_world(world, root)
    write_toy_model(root / "hf", world.text, seed=7, num_layers=num_layers)
    tokenizer = str(root / "hf")
    preprocess(PreprocessOptions((str(corpus),), str(root / "text"), tokenizer, append_eod=True))
    preprocess(PreprocessOptions((str(questions),), str(root / "chat"), tokenizer, prompt_type="qwen3"))
    return Workspace(root, root / "hf", corpus, questions, root / "text", root / "chat")


def make_mixture(hf: Path, folder: Path) -> Path:
    """A toy's folder with 4 experts a layer, two for each token, and random weights."""
    config = from_hf(json.loads((hf / "config.json").read_text()), "test")
    experts = Experts(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=16, norm_topk_prob=True)
    mixture = dataclasses.replace(config, model_type="qwen3_moe", experts=experts)
    companions = dataclasses.replace(companions_of(hf), hf_config=None)
    copy(RandomSource(mixture, 5), HFSink(folder, mixture, "float32", companions))
    return folder
