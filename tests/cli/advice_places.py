"""What the tables of advice name in braces: models and data that lack something, or have too much."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from advice import CONVERT, EPOCH, PREPROCESS, RUN, changed
from advice_benchmarks import make_gsm8k, make_tasks
from safetensors.numpy import load_file, save_file

from tandem.__main__ import main
from tandem.quickstart.tasks import make_world
from tandem.quickstart.toy_model import write_toy_model
from workspace import Workspace, make_mixture

EMBEDDING, MATRIX = "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"
ROWS: dict[str, list[dict[str, Any]]] = {
    "bad_rows": [{"instruction": "Reverse 1.", "output": "1"}, {"instruction": 5}],
    "messages": [{"messages": [{"role": "user", "content": "hello"}]}],
    "alpaca": [{"instruction": "Reverse 1.", "output": "1"}] * 40,
    "variables": [{"instruction": "Reverse 1.", "output": "1", "chat_template_kwargs": {"mood": "good"}}],
    "split_texts": [{"chosen": "Sort 1909. 0199", "rejected": "Sort 1909. 1909"}],
    "pairs": [{"prompt": "Sort 1909.", "chosen": "0199", "rejected": "1909"}] * 8,
    "asked_pairs": [{"asked": "Sort 1909.", "chosen": "0199", "rejected": "1909"}],
    "own_fields": [{"q": "Reverse 1.", "a": "1"}],
    "taken.rejects": [{"instruction": "Reverse 1.", "output": "1"}],
}
MADE = (
    *("full", "no_record", "other_text", "no_optimizer", "fewer_rows", "counted", "lora", "base", "moved", "packed"),
    *(
        "bare",
        "large",
        "no_end",
        "neat",
        "chat_template",
        "stateless",
        "cut",
        "beyond",
        "mixture",
        "listed",
        "occupied",
    ),
    *(
        "no_data",
        "taken",
        "renamed",
        "untemplated",
        "other",
        "other_end",
        "compared",
        "two_models",
        "two_dtypes",
        "argless",
        "tasks",
        "gsm8k",
        "elsewhere",
    ),
)


def make_places(workspace: Workspace, root: Path) -> dict[str, Path | str]:
    """All of them, by name."""
    make_data(workspace, root)
    make_models(workspace, root)
    make_tasks(root / "tasks")
    make_gsm8k(root / "gsm8k")
    (root / "elsewhere").mkdir()
    names: dict[str, Path | str] = {
        "hf": workspace.hf,
        "text": f"{workspace.text}_text_document",
        "text_prefix": workspace.text,
        "chat": workspace.instructions,
        "corpus": workspace.corpus,
        "questions": workspace.questions,
        "adapters": root / "adapters" / "peft",
        **{name: root / f"{name}.jsonl" for name in ROWS},
        **{name: root / name for name in MADE},
    }
    for line in (
        f"{changed(RUN, '--save', '{no_optimizer}')} --no-save-optim --exit-interval 1",
        changed(changed(RUN, "--load", "{base}"), "--save", "{lora}") + " --lora-r 4 --lora-target-modules linear_qkv",
        "export {lora} {adapters} --save-lora-to-hf",
        f"{EPOCH} --exit-interval 1",
        changed(PREPROCESS, "--output-prefix", "{packed}") + " --seq-length 128 --over-long drop --pack",
        changed(PREPROCESS, "--output-prefix", "{neat}") + " --seq-length 128 --over-long drop --pack --neat-pack",
        changed(changed(PREPROCESS, "--output-prefix", "{chat_template}"), "--prompt-type", "chat_template"),
        changed(changed(PREPROCESS, "--input", "{pairs}"), "--output-prefix", "{compared}"),
        changed(CONVERT, "--save-dir", "{argless}") + " --ckpt-format torch",
    ):
        assert main(shlex.split(line.format(**names))) == 0
    (root / "base").rename(root / "moved")
    take_away(root)
    return names


def make_data(workspace: Workspace, root: Path) -> None:
    for name, rows in ROWS.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder in ("full", "listed", "occupied.unfinished"):
        (root / folder).mkdir()
        (root / folder / "file").write_text("")
    for end in ("bin", "idx"):
        for name in ("no_record", "other_text"):
            shutil.copy(f"{workspace.text}_text_document.{end}", root / f"{name}.{end}")
        shutil.copy(f"{workspace.text}_text_document.{end}", root / f"renamed_text_document.{end}")
    record = Path(f"{workspace.text}.json").read_text().replace(str(workspace.hf), str(root / "other_end"))
    (root / "renamed.json").write_text(record.replace('"text_text_document"', '"renamed_text_document"'))
    (root / "no_data.json").write_text("[]")
    shutil.copy(root / "alpaca.jsonl", root / "listed")
    (root / "listed" / "dataset_info.json").write_text(json.dumps({"alpaca": {"file_name": "alpaca.jsonl"}}))


def make_models(workspace: Workspace, root: Path) -> None:
    shutil.copytree(workspace.hf, root / "base")
    shutil.copytree(workspace.hf, root / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    for name in ("no_end", "untemplated", "other_end"):
        shutil.copytree(workspace.hf, root / name)
    change(root / "no_end" / "tokenizer_config.json", eos_token=None)
    change(root / "no_end" / "config.json", eos_token_id=None)
    for path in (root / "other_end").glob("token*.json"):
        path.write_text(path.read_text().replace("<|im_end|>", "<|the_end|>"))
    change(root / "untemplated" / "tokenizer_config.json", chat_template=None)
    with_tensor(workspace.hf, root / "large", MATRIX, lambda tensor: tensor * np.float32(1e7))
    with_tensor(workspace.hf, root / "beyond", MATRIX, lambda tensor: np.full_like(tensor, 3e38))
    with_tensor(workspace.hf, root / "two_dtypes", MATRIX, lambda tensor: tensor.astype(ml_dtypes.bfloat16))
    with_tensor(workspace.hf, root / "fewer_rows", EMBEDDING, lambda tensor: tensor[:200].copy())
    change(root / "fewer_rows" / "config.json", vocab_size=200)
    make_mixture(workspace.hf, root / "mixture")
    write_toy_model(root / "other", make_world(seed=8, lists=30, held_out_lists=5).text, seed=8, num_layers=2)


def with_tensor(source: Path, target: Path, name: str, other: Callable[[np.ndarray], np.ndarray]) -> None:
    """The same model with another tensor in place of one."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file({**tensors, name: other(tensors[name])}, target / "model.safetensors", {"format": "pt"})


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def take_away(root: Path) -> None:
    """A record, a run's state, and Megatron's args; and a run gets a model as well."""
    import torch

    (root / "neat.json").unlink()
    for name in ("stateless", "cut"):
        shutil.copytree(root / "counted", root / name)
    for state in (root / "stateless").rglob("trainer_state.json"):
        state.unlink()
    for state in (root / "cut").rglob("trainer_state.json"):
        state.write_text(state.read_text()[:99])
    shutil.copytree(root / "counted", root / "two_models")
    shutil.copytree(root / "moved", root / "two_models", dirs_exist_ok=True)
    for folder in (root / "argless").glob("*/hf"):
        shutil.rmtree(folder)
    for file in (root / "argless").rglob("*.pt"):
        stored = torch.load(file, weights_only=False)
        torch.save({name: value for name, value in stored.items() if name != "args"}, file)
