"""Hugging Face folders as people have them: old files next to new ones, prefixed names, files that are not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tandem.backends import transformers_logits
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.hf.source import HFSource
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.checkpoints.random_init import RandomSource
from tandem.conversion.verify import fixed_batch, verify
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.hf_config import to_hf
from tandem.models.tensors import tensor_table
from toys import TOYS, toy_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TIED, UNTIED = TOYS["qwen3-tied"], TOYS["qwen3-untied"]


def write(folder: Path, config: ModelConfig = TIED, seed: int = 3, **options: int) -> Path:
    copy(RandomSource(config, seed), HFSink(folder, config, "float32", Companions(), **options))
    return folder


def same(left: TensorSource, right: TensorSource) -> None:
    for name in tensor_table(left.config):
        assert np.array_equal(left.read(name), right.read(name)), name


def rename(folder: Path, new_name: Callable[[str], str], **more: np.ndarray) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({new_name(name): tensor for name, tensor in tensors.items()} | more, folder / SINGLE)


def test_experts_that_transformers_saved_are_read(tmp_path: Path) -> None:
    """In memory it stacks them in three dimensions. In files each has a tensor of its own."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = TOYS["qwen3-moe"]
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**to_hf(config, dtype="float32"))).float()
    model.save_pretrained(tmp_path / "hf")
    source = open_source(tmp_path / "hf")
    assert source.config == config
    mlp = model.model.layers[1].mlp
    for name, parameter in (
        ("router.weight", mlp.gate.weight),
        ("experts.linear_fc1.weight", mlp.experts.gate_up_proj.flatten(0, 1)),
        ("experts.linear_fc2.weight", mlp.experts.down_proj.flatten(0, 1)),
    ):
        assert np.array_equal(source.read(f"decoder.layers.1.mlp.{name}"), parameter.detach().numpy()), name


# --- two sets of weights


def two_sets(folder: Path) -> Path:
    """New weights in one file, next to the shards of old ones and their index."""
    write(folder, seed=3, shard_bytes=50_000)
    shutil.copy(write(folder.with_name("new"), seed=4) / SINGLE, folder)
    return folder


def test_a_folder_with_two_sets_of_weights_is_refused_with_both(tmp_path: Path) -> None:
    folder = two_sets(tmp_path / "hf")
    with pytest.raises(UserError, match=rf"two models: {SINGLE}, .* and {INDEX} with \d+ of its"):
        open_source(folder)
    for file in folder.glob("model-*.safetensors"):
        file.unlink()
    same(open_source(folder), RandomSource(TIED, 4))  # of the old set only the index is left


def test_a_single_file_that_the_index_names_is_one_set(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf")
    names = dict.fromkeys(load_file(folder / SINGLE), SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    same(open_source(folder), RandomSource(TIED, 3))


def test_files_that_are_not_read_are_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"old")
    (folder / "adapter_config.json").write_text("{}")
    source = open_source(folder)
    assert "model-00003-of-00003.safetensors, pytorch_model.bin" in source.notices[0]
    assert "adapter_config.json is not read" in source.notices[1]
    assert len(source.notices) == 2
    assert source.hf_folder is None  # with PEFT, transformers would load another model


def test_the_check_does_not_trust_our_order_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were we to read the old shards, the comparison would say so."""
    from tandem.checkpoints.hf import weights

    folder = two_sets(tmp_path / "hf")

    def shards_first(form: Any, place: Path) -> dict[str, weights.StoredTensor]:
        return weights._open_sharded(place / form.index, form.opener)

    monkeypatch.setattr(weights.Form, "open", shards_first)
    with pytest.raises(UserError, match="does not compute what"):
        verify(open_source(folder), RandomSource(TIED, 3), "torch")


# --- names of tensors


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-untied", "qwen2"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model."])
def test_a_common_prefix_is_left_out(prefix: str, name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", TOYS[name])
    rename(folder, lambda tensor: prefix + tensor)
    source = open_source(folder)
    same(source, RandomSource(TOYS[name], 3))
    assert f"begin with '{prefix}model.' in place of 'model.'" in source.notices[0]


def test_names_of_a_bare_model_are_read_as_transformers_does(tmp_path: Path) -> None:
    """Of `AutoModel`, without `model.`. Its head cannot be made up."""
    folder = write(tmp_path / "tied")
    rename(folder, lambda name: name.removeprefix("model."))
    source = open_source(folder)
    same(source, RandomSource(TIED, 3))
    assert source.hf_folder == folder
    batch = fixed_batch(TIED)
    other = transformers_logits(write(tmp_path / "plain"), "float32", batch)
    assert np.array_equal(transformers_logits(folder, "float32", batch), other)

    untied = write(tmp_path / "untied", UNTIED)
    rename(untied, lambda name: name.removeprefix("model."))
    same(open_source(untied), RandomSource(UNTIED, 3))
    tensors = load_file(untied / SINGLE)
    del tensors["lm_head.weight"]
    save_file(tensors, untied / SINGLE)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight$"):
        open_source(untied)


def index_of(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return index


def test_an_index_may_name_a_tied_head_that_no_file_holds(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", shard_bytes=50_000)
    index = index_of(folder)
    index["weight_map"]["lm_head.weight"] = min(index["weight_map"].values())
    (folder / INDEX).write_text(json.dumps(index))
    same(open_source(folder), RandomSource(TIED, 3))

    untied = write(tmp_path / "untied", UNTIED, shard_bytes=50_000)
    file = untied / index_of(untied)["weight_map"]["lm_head.weight"]
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        open_source(untied)


def test_a_tied_head_that_the_index_does_not_name_is_compared(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", shard_bytes=50_000)
    file = folder / index_of(folder)["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, file)
    same(open_source(folder), RandomSource(TIED, 3))
    save_file({**tensors, "lm_head.weight": head + 1}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        open_source(folder).read("embedding.word_embeddings.weight")


def test_hundreds_of_wrong_names_are_one_line(tmp_path: Path) -> None:
    config = toy_config(num_layers=64, hidden_size=2, ffn_hidden_size=2, kv_channels=2, vocab_size=4)
    folder = write(tmp_path / "hf", config)
    rename(folder, lambda name: name.replace("self_attn", "attention"))
    with pytest.raises(UserError) as raised:
        open_source(folder)
    message = str(raised.value)
    assert "model.layers.0-63.self_attn.k_norm.weight" in message
    assert "model.layers.0-63.attention.k_norm.weight" in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    rename(folder, lambda name: f"transformer.h.{name.replace('embed_tokens', 'wte')}")
    with pytest.raises(UserError, match="none of the 706 tensors that the config implies is there, such as") as raised:
        open_source(folder)
    assert len(str(raised.value)) < 1000


# --- files that are there by name only


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", shard_bytes=30_000)
    files = sorted(folder.glob("model-*.safetensors"))
    for file in files[1:]:
        file.unlink()
    expected = f"names {len(files)} files, and {len(files) - 1} of them are missing: {files[1].name}, {files[2].name}"
    with pytest.raises(UserError, match=expected):
        open_source(folder)


def point(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1503300328\n")


def dangle(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("../../blobs/6a8f")


@pytest.mark.parametrize("name", [SINGLE, "pytorch_model.bin", INDEX])
@pytest.mark.parametrize(("spoil", "named"), [(point, "git lfs pull"), (dangle, r"a link to \.\./\.\./blobs/6a8f")])
def test_pointers_and_dangling_links_are_named(
    spoil: Callable[[Path], None], named: str, name: str, tmp_path: Path
) -> None:
    """A dangling `model.safetensors` does not make an old `pytorch_model.bin` the model."""
    folder = write(tmp_path / "hf")
    (folder / SINGLE).rename(folder / "other")
    spoil(folder / name)
    if name != "pytorch_model.bin":
        (folder / "pytorch_model.bin").write_bytes(b"old")
    with pytest.raises(UserError, match=named) as raised:
        HFSource(folder)
    assert str(folder / name) in str(raised.value)
