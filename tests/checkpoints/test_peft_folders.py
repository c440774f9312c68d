"""PEFT folders of others: fields that are not known here, values of other types, and what is no adapter at all."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tandem.__main__ import main
from tandem.checkpoints.adapters.fresh import FreshAdapters
from tandem.checkpoints.adapters.peft import write_peft
from tandem.checkpoints.adapters.views import Adapted
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_adapters, open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.models.adapters import adapters
from tandem.models.lora import Lora
from toys import TOYS, toy_config

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `hf`, a model, and `lora`, adapters of its q_proj and v_proj."""
    root = tmp_path_factory.mktemp("peft")
    copy(RandomSource(TOYS["qwen3-tied"], 5), HFSink(root / "hf", TOYS["qwen3-tied"], "float32", Companions()))
    base = open_source(root / "hf")
    config = dataclasses.replace(base.config, lora=Lora(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj")))
    write_peft(root / "lora", Adapted(FreshAdapters(base, config, 1), base, base), str(root / "hf"))
    return root


def changed(toy: Path, folder: Path, **fields: Any) -> Path:
    """A copy of the adapters whose config has other values."""
    shutil.copytree(toy / "lora", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"init_lora_weights": "loftq"},
            r"init_lora_weights 'loftq': merge the adapter with peft \(merge_and_unload\)",
        ),
        ({"modules_to_save": ["lm_head"]}, r"not supported: modules_to_save \['lm_head'\]: merge"),
        ({"kasa_config": {"beta": 1e-4}}, "not supported: kasa_config"),
        ({"arrow_config": {"top_k": 3}}, "not supported: arrow_config"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern \['q_proj'\]: expected an object"),
        ({"rank_pattern": {"q_proj(": 2}}, r"rank_pattern 'q_proj\(' is no regular expression"),
        ({"target_modules": "(q|v_proj"}, r"target_modules '\(q\|v_proj' is no regular expression"),
        ({"target_modules": [1]}, r"target_modules \[1\]: expected a text, or a list of texts"),
        ({"layers_to_transform": "1"}, "layers_to_transform '1': expected a whole number"),
        ({"lora_dropout": "0.1"}, "lora_dropout '0.1': expected at least 0 and below 1"),
        ({"use_rslora": "false"}, "use_rslora 'false': expected true or false"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(toy: Path, tmp_path: Path, fields: Any, words: str) -> None:
    folder = changed(toy, tmp_path / "lora", **fields)
    with pytest.raises(UserError, match=words) as raised:
        open_adapters(folder, open_source(toy / "hf"))
    assert str(raised.value).startswith(str(folder / "adapter_config.json"))


def test_what_is_left_out_is_said(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = open_source(toy / "hf")
    assert open_adapters(toy / "lora", base).notices == ()
    settings = {"use_frobnicate": True, "new_config": None, "peft_version": "9.0", "eva_config": {"rho": 2.0}}
    folder = changed(toy, tmp_path / "lora", base_model_name_or_path="Qwen/Qwen3-0.6B-Base", **settings)
    torch = pytest.importorskip("torch")
    doubled = {name: torch.from_numpy(2 * values) for name, values in load_file(folder / WEIGHTS).items()}
    torch.save(doubled, folder / "adapter_model.bin")
    field, files, model = open_adapters(folder, base).notices
    assert field.endswith("adapter_config.json: not known here, and left out: use_frobnicate")
    assert f"{WEIGHTS} is read; adapter_model.bin is there, too" in files
    assert f"names Qwen/Qwen3-0.6B-Base as its model, and is put on {toy / 'hf'}" in model
    assert main(["inspect", "checkpoint", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert field in shown
    assert files in shown


@pytest.mark.parametrize("place", ["Qwen3-0.6B", "models--Qwen--Qwen3-0.6B/snapshots/c1899de"])
def test_a_model_of_the_same_name_is_the_same(toy: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(toy / "hf", tmp_path / place)
    folder = changed(toy, tmp_path / "lora", base_model_name_or_path="Qwen/Qwen3-0.6B")
    assert open_adapters(folder, open_source(tmp_path / place)).notices == ()


def test_saved_embeddings_are_refused_by_name(toy: Path, tmp_path: Path) -> None:
    folder = changed(toy, tmp_path / "lora")
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**tensors, name: open_source(toy / "hf").read("embedding.word_embeddings.weight")}, folder / WEIGHTS)
    with pytest.raises(UserError, match=rf"embeddings or the head: {re.escape(name)}: merge the adapter with peft"):
        open_adapters(folder, open_source(toy / "hf"))


def test_a_spoiled_adapter_is_named(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The merged weight holds NaN, too, and the base does not."""
    folder = changed(toy, tmp_path / "lora")
    tensors = load_file(folder / WEIGHTS)
    next(values for name, values in tensors.items() if "layers.1.self_attn.v_proj.lora_B" in name)[0, 0] = np.nan
    save_file(tensors, folder / WEIGHTS)
    assert main(["export", str(toy / "hf"), str(tmp_path / "merged"), "--lora-load", str(folder)]) == 2
    assert (
        "its adapter decoder.layers.1.self_attention.linear_qkv.lora_B.v_proj.weight holds NaN"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "merged").exists()


def test_a_regular_expression_is_of_hugging_faces_paths() -> None:
    """`.*proj` also matches Megatron's linear_proj, which would be the same rows once more."""
    for expression in (".*proj", r".*\.(self_attn|mlp)\..*"):
        lora = Lora(target_modules=expression, exclude_modules="model.*(gate|up|down)_proj")
        config = dataclasses.replace(TOYS["qwen3-tied"], lora=lora)
        assert [adapter.module for adapter in adapters(config, 0)] == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("hf", "holds a whole model: give it with --load"),
        (f"lora/{WEIGHTS}", r"is a file: give the folder, \S*lora$"),
        ("nowhere", "does not exist: expected a PEFT folder, or a run that trained adapters"),
        (".", "expected a PEFT folder, or a run that trained adapters"),
    ],
)
def test_what_is_no_adapter_is_described(toy: Path, path: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        open_adapters(toy / path, open_source(toy / "hf"))
    assert str(raised.value).startswith(f"--lora-load {toy / path}")


def test_modules_ranks_and_zeros_are_shown(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = changed(toy, tmp_path / "lora", alpha_pattern={"v_proj": 2})
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = 1
    save_file(tensors, folder / WEIGHTS)
    assert main(["inspect", "checkpoint", str(folder)]) == 0
    rows = [line.strip("│ ").split() for line in capsys.readouterr().out.splitlines()]
    layers = TOYS["qwen3-tied"].num_layers
    assert ["q_proj", "│", str(layers), "│", "4", "│", "8", "│", str(layers - 1), "layers"] in rows
    assert ["v_proj", "│", str(layers), "│", "4", "│", "2", "│", str(layers), "layers"] in rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"ffn_hidden_size": 160},
            r"decoder.layers.0.mlp.linear_fc1.weight is \[160, 48\] in theirs and \[320, 48\] here",
        ),
        ({"num_layers": 4}, r"decoder.layers.3.input_layernorm.weight is absent in theirs and \[48\] here"),
        ({"rotary_base": 5e5}, "rotary_base is 1000000.0 in theirs and 500000.0 here"),
    ],
)
def test_adapters_of_another_model_are_refused_with_what_differs(changes: dict[str, Any], words: str) -> None:
    config = toy_config()
    base, other = RandomSource(config, 1), RandomSource(toy_config(**changes), 1)
    own = FreshAdapters(base, dataclasses.replace(config, lora=Lora()), 1)
    with pytest.raises(UserError, match=rf"{words}. Give the model that they were trained on with --load"):
        Adapted(own, other, other)


def test_a_peft_folder_of_another_model_names_both(toy: Path, tmp_path: Path) -> None:
    other = toy_config(num_query_groups=1, num_layers=TOYS["qwen3-tied"].num_layers)
    copy(RandomSource(other, 5), HFSink(tmp_path / "other", other, "float32", Companions()))
    words = (
        rf"v_proj.lora_B.weight has shape .* The adapters name {toy / 'hf'} as their model, and the weights are "
        rf"{tmp_path / 'other'}: give theirs with --load"
    )
    with pytest.raises(UserError, match=words):
        open_adapters(toy / "lora", open_source(tmp_path / "other"))
