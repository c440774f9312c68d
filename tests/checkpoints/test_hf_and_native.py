"""Hugging Face folders and native checkpoints: exact round trips at any layout, and damaged input named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.folders import iteration_folder
from tandem.checkpoints.formats.safetensors import SafetensorsFile
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions, TensorKind, TensorSource, kinds_to_load
from tandem.checkpoints.native.sink import NativeSink
from tandem.checkpoints.native.source import NativeSource
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.parallel.layout import Layout
from toys import TOYS, toy_config

LAYOUTS = [
    Layout(),
    Layout(tensor_model_parallel_size=2),
    Layout(pipeline_model_parallel_size=2),
    Layout(tensor_model_parallel_size=4, pipeline_model_parallel_size=4),
    Layout(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
    Layout(pipeline_model_parallel_size=2, num_layer_list=(1, 3)),
    Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, noop_layers=(0, 5)),
]


def divisible(tied: bool) -> ModelConfig:
    return toy_config(
        num_layers=4, num_attention_heads=8, num_query_groups=4, untie_embeddings_and_output_weights=not tied
    )


def same(left: TensorSource, right: TensorSource) -> None:
    assert left.config == right.config
    for name in tensor_table(left.config):
        a, b = left.read(name), right.read(name)
        assert a.dtype == b.dtype, name
        assert np.array_equal(a.view(np.uint8), b.view(np.uint8)), name


def hf_folder(folder: Path, config: ModelConfig, dtype: str = "bfloat16", **options: int) -> Path:
    copy(RandomSource(config, 3, dtype), HFSink(folder, config, dtype, Companions(), **options))
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_hf_to_native_to_hf_is_bit_identical(layout: Layout, tied: bool, tmp_path: Path) -> None:
    source = open_source(hf_folder(tmp_path / "hf", divisible(tied)))
    copy(source, NativeSink(tmp_path / "m", source.config, layout, {"model": "bfloat16"}, 1, source.companions))
    native = open_source(tmp_path / "m")
    assert isinstance(native, NativeSource)
    same(source, native)
    copy(native, HFSink(tmp_path / "back", native.config, "bfloat16", native.companions))
    before, after = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("hf", "back"))
    assert before == after


@pytest.mark.parametrize("name", TOYS)
def test_sharded_folder_loads_in_transformers(name: str, tmp_path: Path) -> None:
    """Several files and an index, no lm_head when tied."""
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    config = TOYS[name]
    hf_folder(tmp_path / "hf", config, "float32", shard_bytes=50_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    names = {key for file in (tmp_path / "hf").glob("*.safetensors") for key in load_file(file)}
    assert ("lm_head.weight" in names) is not config.tied
    same(open_source(tmp_path / "hf"), RandomSource(config, 3))


def test_a_tied_model_may_carry_an_equal_head_but_no_other(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    config = toy_config()
    folder = hf_folder(tmp_path / "hf", config, "float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    same(open_source(folder), RandomSource(config, 3))
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        open_source(folder).read(EMBEDDING)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.update(stray=np.zeros(3, np.float32)), "left over: stray"),
        (lambda t: t.update({"model.norm.weight": np.zeros(7, np.float32)}), r"model\.norm\.weight has shape \[7\]"),
        (lambda t: t.update({"model.norm.weight": np.zeros(48, np.int32)}), "dtype I32"),
    ],
)
def test_wrong_tensors_in_a_hf_folder_are_named(damage: object, named: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = hf_folder(tmp_path / "hf", toy_config(), "float32")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=named):
        open_source(folder)


def native(folder: Path) -> Path:
    config = divisible(tied=True)
    layout = Layout(tensor_model_parallel_size=2)
    copy(RandomSource(config, 3), NativeSink(folder, config, layout, {"model": "float32"}, 1, Companions()))
    return folder


def read_all(folder: Path) -> None:
    source = open_source(folder)
    for name in tensor_table(source.config):
        source.read(name)


def flip_a_byte(folder: Path) -> None:
    path = iteration_folder(folder, 1) / "mp_rank_01" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = iteration_folder(folder, 1) / "mp_rank_01" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit_index(folder: Path) -> None:
    path = iteration_folder(folder, 1) / "index.json"
    index = json.loads(path.read_text())
    del index["tensors"]["decoder.final_layernorm.weight"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_a_byte, "sha256"),
        (truncate, "truncated"),
        (edit_index, r"missing: decoder\.final_layernorm\.weight"),
        (lambda folder: shutil.rmtree(iteration_folder(folder, 1) / "mp_rank_01"), "mp_rank_01"),
        (lambda folder: (folder / "latest_checkpointed_iteration.txt").unlink(), "latest_checkpointed_iteration"),
        (lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("x"), "number of an iteration"),
        (lambda folder: shutil.rmtree(folder), "does not exist"),
    ],
)
def test_damaged_native_checkpoints_are_named(damage: object, named: str, tmp_path: Path) -> None:
    folder = native(tmp_path / "m")
    read_all(folder)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=named):
        read_all(folder)


def test_nothing_appears_when_a_copy_fails(tmp_path: Path) -> None:
    class Broken(RandomSource):
        def read(self, name: str, kind: str = "model") -> np.ndarray:  # type: ignore[override]
            tensor = super().read(name)
            if name == "decoder.final_layernorm.weight":
                tensor[0] = np.nan
            return tensor

    config = toy_config()
    targets = {
        "native": NativeSink(tmp_path / "m", config, Layout(), {"model": "float32"}, 1, Companions()),
        "hf": HFSink(tmp_path / "hf", config, "float32", Companions()),
    }
    for sink in targets.values():
        with pytest.raises(UserError, match=r"decoder\.final_layernorm\.weight holds NaN"):
            copy(Broken(config, 1), sink)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", toy_config())
    with pytest.raises(UserError, match="exists"):
        hf_folder(tmp_path / "hf", toy_config())


def test_files_are_safetensors_for_everyone(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = iteration_folder(native(tmp_path / "m"), 1) / "mp_rank_00"
    ours = SafetensorsFile(folder / "model.safetensors")
    theirs = load_file(folder / "model.safetensors")
    assert set(ours.entries) == set(theirs)
    assert all(np.array_equal(ours.read(name), theirs[name]) for name in theirs)


def test_random_weights_depend_on_seed_and_name_only() -> None:
    small, large = toy_config(num_layers=2), toy_config(num_layers=2, vocab_size=300)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    assert np.array_equal(RandomSource(small, 5).read(name), RandomSource(large, 5).read(name))
    assert not np.array_equal(RandomSource(small, 5).read(name), RandomSource(small, 6).read(name))


@pytest.mark.parametrize(
    ("kinds", "param_dtype", "expected"),
    [
        ({"model": "float32"}, "float32", ("model", "model")),
        ({"model": "bfloat16"}, "bfloat16", ("model", "model")),
        ({"model": "bfloat16", "master": "float32"}, "bfloat16", ("model", "master")),
        ({"model": "bfloat16", "master": "float32"}, "float32", ("master", "master")),
        ({"model": "bfloat16", "master": "float32"}, "float16", ("master", "master")),
    ],
)
def test_masters_are_taken_where_they_say_more(
    tmp_path: Path, kinds: dict[TensorKind, str], param_dtype: str, expected: tuple[TensorKind, TensorKind]
) -> None:
    config = toy_config()
    sink = NativeSink(tmp_path, config, Layout(), kinds, 1, Companions())
    for kind in kinds:
        for name in tensor_table(config):
            sink.write(name, RandomSource(config, 1).read(name), kind)
    sink.close()
    assert kinds_to_load(NativeSource(tmp_path), "decoder.final_layernorm.weight", param_dtype) == expected
