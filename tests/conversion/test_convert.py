"""`convert`: every direction, both formats, every layout, the source's bytes or an error."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.folders import find_iteration
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions, TensorKind
from tandem.checkpoints.megatron.names import FILE
from tandem.checkpoints.native.sink import NativeSink
from tandem.checkpoints.native.source import NativeSource
from tandem.checkpoints.random_init import RandomSource
from tandem.conversion.convert import Converted, convert
from tandem.conversion.options import ConvertOptions
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.published import QWEN3_SIZES
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.parallel.layout import Layout
from toys import TOYS, qwen3_config, toy_config

SINGLE = "model.safetensors"


@pytest.fixture(autouse=True)
def emptied(tmp_path: Path) -> Iterator[None]:
    """pytest keeps the folders of its last runs, and these would be gigabytes."""
    yield
    shutil.rmtree(tmp_path)


class Biased(RandomSource):
    """Random weights whose norms and biases are random as well."""

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        tensor = super().read(name, kind)
        if tensor.ndim > 1:
            return tensor
        noise = np.random.default_rng(sum(name.encode())).standard_normal(tensor.shape)
        return (tensor + noise).astype(tensor.dtype)


def write_hf(folder: Path, config: ModelConfig, dtype: str = "bfloat16", **options: int) -> Path:
    copy(Biased(config, 3, dtype), HFSink(folder, config, dtype, Companions(), **options))
    return folder


def run(load: Path, save: Path, direction: str, **options: Any) -> Converted:
    source, target = direction.split("-")
    return convert(
        ConvertOptions(
            load_model_type=source,  # type: ignore[arg-type]
            save_model_type=target,  # type: ignore[arg-type]
            load_dir=str(load),
            save_dir=str(save),
            **options,
        )
    )


def assert_round_trip(tmp_path: Path, config: ModelConfig, **options: Any) -> None:
    hf = write_hf(tmp_path / "hf", config)
    run(hf, tmp_path / "m", "hf-mg", **options)
    run(tmp_path / "m", tmp_path / "back", "mg-hf")
    assert (tmp_path / "back" / SINGLE).read_bytes() == (hf / SINGLE).read_bytes()
    assert (tmp_path / "back/config.json").read_text() == (hf / "config.json").read_text()


# --- layouts


@pytest.mark.parametrize("ckpt_format", ["native", "torch"])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("size", QWEN3_SIZES)
def test_every_qwen3_shape_returns_bit_identical(size: str, tp: int, pp: int, ckpt_format: str, tmp_path: Path) -> None:
    """Heads and tying of every size; widths divided by 16."""
    config = qwen3_config(size, num_layers=4, vocab_size=1188, shrink=16)
    parallel = {"target_tensor_parallel_size": tp, "target_pipeline_parallel_size": pp}
    assert_round_trip(tmp_path, config, ckpt_format=ckpt_format, **parallel)


@pytest.mark.slow("sizes")
@pytest.mark.parametrize("ckpt_format", ["native", "torch"])
@pytest.mark.parametrize("size", QWEN3_SIZES)
def test_every_qwen3_shape_at_full_width(size: str, ckpt_format: str, tmp_path: Path) -> None:
    """Real widths and vocabulary up to 4B, real widths beyond."""
    vocab_size = 151936 if size in ("0.6B", "1.7B", "4B") else 1024
    config = qwen3_config(size, num_layers=2, vocab_size=vocab_size)
    parallel = {"target_tensor_parallel_size": 4, "target_pipeline_parallel_size": 2}
    assert_round_trip(tmp_path, config, ckpt_format=ckpt_format, **parallel)


LAYERS = [
    {"target_pipeline_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    {"target_pipeline_parallel_size": 2, "num_layer_list": "1,3"},
    {"target_pipeline_parallel_size": 3, "noop_layers": "0,5"},
    {"target_pipeline_parallel_size": 3, "num_layers_per_virtual_pipeline_stage": 1, "noop_layers": "2,3"},
]


@pytest.mark.parametrize("ckpt_format", ["native", "torch"])
@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_vpp_uneven_and_noop_return_bit_identical(
    layers: dict[str, Any], untie: bool, ckpt_format: str, tmp_path: Path
) -> None:
    config = toy_config(num_layers=4, vocab_size=212, untie_embeddings_and_output_weights=untie)
    assert_round_trip(tmp_path, config, ckpt_format=ckpt_format, target_tensor_parallel_size=2, **layers)


@pytest.mark.parametrize("ckpt_format", ["native", "torch"])
@pytest.mark.parametrize("name", TOYS)
def test_every_family_returns_bit_identical(name: str, ckpt_format: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TOYS[name], vocab_size=212)
    parallel = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 3}
    assert_round_trip(tmp_path, config, ckpt_format=ckpt_format, **parallel)


@pytest.mark.parametrize("first", ["native", "torch"])
@pytest.mark.parametrize("second", ["native", "torch"])
def test_re_sharding_equals_converting_at_once(first: str, second: str, tmp_path: Path) -> None:
    """Mg -> mg, between formats and layouts, gives the files that hf -> mg gives."""
    hf = write_hf(tmp_path / "hf", toy_config(num_layers=4, vocab_size=212))
    target: dict[str, Any] = {"target_pipeline_parallel_size": 2, "target_tensor_parallel_size": 2}
    run(hf, tmp_path / "a", "hf-mg", ckpt_format=first, num_layer_list="4")
    run(tmp_path / "a", tmp_path / "b", "mg-mg", ckpt_format=second, **target)
    run(hf, tmp_path / "c", "hf-mg", ckpt_format=second, **target)
    files = [path.relative_to(tmp_path / "c") for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes(), file


@st.composite
def jobs(draw: st.DrawFn) -> tuple[ModelConfig, dict[str, Any]]:
    """A model and a layout that it can have."""
    tp, groups = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (2, 4), (4, 4)]))
    pp, chunk, chunks = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    slots = pp * chunk * chunks
    noop = draw(st.sets(st.integers(0, slots - 1), max_size=slots - 1))
    config = toy_config(
        model_type=draw(st.sampled_from(["qwen3", "qwen2", "llama"])),
        num_layers=slots - len(noop),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=tp * draw(st.integers(1, 5)),
        num_query_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, 3)),
        kv_channels=2 * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(4, 40)),
        untie_embeddings_and_output_weights=draw(st.booleans()),
    )
    return config, {
        "target_tensor_parallel_size": tp,
        "target_pipeline_parallel_size": pp,
        "num_layers_per_virtual_pipeline_stage": chunk if chunks > 1 else None,
        "noop_layers": ",".join(map(str, sorted(noop))) or None,
        "ckpt_format": draw(st.sampled_from(["native", "torch"])),
        "make_vocab_size_divisible_by": draw(st.sampled_from([1, 4])),
    }


@given(job=jobs())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_model_at_any_layout_returns(job: tuple[ModelConfig, dict[str, Any]], tmp_path_factory: Any) -> None:
    config, options = job
    assert_round_trip(tmp_path_factory.mktemp("job"), config, **options)


# --- sources


@pytest.mark.parametrize("name", ["v4_tp1pp1", "v4_tp2pp2", "v4tied_tp1pp1", "v4tied_tp1pp2"])
def test_real_megatron_checkpoints_become_their_hf_models(shared_data: Path, name: str, tmp_path: Path) -> None:
    """Files that Megatron's trainer saved; the config is the original's, as upstream asks for it."""
    hf = shared_data / "golden/mcore" / ("hf_v4_tied" if "tied" in name else "hf_v4")
    run(shared_data / "golden/mcore" / name, tmp_path / "hf", "mg-hf", hf_cfg_dir=str(hf))
    converted, expected = open_source(tmp_path / "hf"), open_source(hf)
    for tensor in tensor_table(expected.config):
        assert converted.read(tensor).tobytes() == expected.read(tensor).tobytes(), tensor


def save_bin(folder: Path, shards: int) -> None:
    """Replace a folder's safetensors by torch's files."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    import json

    weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 3])
def test_torch_weights_of_hugging_face(shards: int, tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", TOYS["qwen2"])
    original = (hf / SINGLE).read_bytes()
    save_bin(hf, shards)
    run(hf, tmp_path / "m", "hf-mg")
    run(tmp_path / "m", tmp_path / "back", "mg-hf")
    assert (tmp_path / "back" / SINGLE).read_bytes() == original


def test_trainer_checkpoints_convert_without_their_optimizer(tmp_path: Path) -> None:
    """G: the weights alone travel, in the dtype that computes, not the optimizer's masters."""
    config = toy_config(num_layers=4, vocab_size=212)
    kinds: dict[TensorKind, str] = {
        "model": "bfloat16",
        "master": "float32",
        "exp_avg": "float32",
        "exp_avg_sq": "float32",
    }
    sink = NativeSink(tmp_path / "run", config, Layout(tensor_model_parallel_size=2), kinds, 30, Companions())
    for kind, dtype in kinds.items():
        source = Biased(config, 3, dtype)
        for name in tensor_table(config):
            sink.write(name, source.read(name), kind)
    sink.close()
    run(tmp_path / "run", tmp_path / "m", "mg-mg", ckpt_format="torch", target_pipeline_parallel_size=2)
    converted = open_source(tmp_path / "m")
    assert converted.kinds() == ("model",)
    assert converted.read(EMBEDDING).tobytes() == Biased(config, 3, "bfloat16").read(EMBEDDING).tobytes()


def test_layers_that_a_source_does_not_record(tmp_path: Path) -> None:
    """Upstream repeats --noop-layers for mg -> hf; between checkpoints the source's have a name of their own."""
    import torch

    hf = write_hf(tmp_path / "hf", toy_config(num_layers=4))
    run(hf, tmp_path / "m", "hf-mg", ckpt_format="torch", target_pipeline_parallel_size=3, noop_layers="0,5")
    for path in find_iteration(tmp_path / "m").glob(f"*/{FILE}"):
        content = torch.load(path, weights_only=False)
        assert isinstance(content["args"], argparse.Namespace)
        del content["args"].noop_layers
        torch.save(content, path)
    with pytest.raises(UserError, match="give slots without a layer with `tandem convert --source-noop-layers`"):
        run(tmp_path / "m", tmp_path / "back", "mg-hf")
    run(tmp_path / "m", tmp_path / "as_advised", "mg-hf", source_noop_layers="0,5")
    assert (tmp_path / "as_advised" / SINGLE).read_bytes() == (hf / SINGLE).read_bytes()
    run(tmp_path / "m", tmp_path / "back", "mg-hf", noop_layers="0,5")
    assert (tmp_path / "back" / SINGLE).read_bytes() == (hf / SINGLE).read_bytes()
    run(tmp_path / "m", tmp_path / "n", "mg-mg", source_noop_layers="0,5", target_pipeline_parallel_size=2)
    assert isinstance(source := open_source(tmp_path / "n"), NativeSource)
    assert source.layout == Layout(pipeline_model_parallel_size=2)


def test_a_config_that_a_source_does_not_record(tmp_path: Path) -> None:
    """The config is then taken from the folder that the error asks for."""
    import torch

    hf = write_hf(tmp_path / "hf", toy_config(num_layers=2))
    run(hf, tmp_path / "m", "hf-mg", ckpt_format="torch")
    iteration = find_iteration(tmp_path / "m")
    shutil.rmtree(iteration / "hf")
    (path,) = iteration.glob(f"*/{FILE}")
    content = torch.load(path, weights_only=False)
    del content["args"].hidden_size
    torch.save(content, path)
    with pytest.raises(UserError, match=r"do not say hidden_size: give the folder .* with --hf-cfg-dir"):
        run(tmp_path / "m", tmp_path / "back", "mg-hf")
    run(tmp_path / "m", tmp_path / "back", "mg-hf", hf_cfg_dir=str(hf))
    assert (tmp_path / "back" / SINGLE).read_bytes() == (hf / SINGLE).read_bytes()


@pytest.mark.parametrize("ckpt_format", ["native", "torch"])
def test_layers_that_contradict_the_record_are_refused(ckpt_format: str, tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", toy_config(num_layers=4))
    run(hf, tmp_path / "m", "hf-mg", ckpt_format=ckpt_format, target_pipeline_parallel_size=3, noop_layers="0,5")
    with pytest.raises(UserError, match=r"noop_layers \(1, 5\) contradicts .*records \(0, 5\)"):
        run(tmp_path / "m", tmp_path / "back", "mg-hf", noop_layers="1,5")


def test_first_layers_only(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", toy_config(num_layers=4))
    run(hf, tmp_path / "m", "hf-mg", num_layers=2)
    converted, expected = open_source(tmp_path / "m"), open_source(hf)
    assert converted.config == dataclasses.replace(expected.config, num_layers=2)
    for name in tensor_table(converted.config):
        assert converted.read(name).tobytes() == expected.read(name).tobytes()
    with pytest.raises(UserError, match=r"--num-layers 5: .* has 4 layers"):
        run(hf, tmp_path / "n", "hf-mg", num_layers=5)


def test_a_hugging_face_folder_is_changed_into_another(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", toy_config())
    run(hf, tmp_path / "out", "hf-hf", num_layers=2, params_dtype="fp32", no_verify=True)
    written, expected = open_source(tmp_path / "out"), open_source(hf)
    assert written.config == dataclasses.replace(expected.config, num_layers=2)
    for name in tensor_table(written.config):
        np.testing.assert_array_equal(written.read(name), expected.read(name).astype(np.float32), strict=True)


# --- dtypes


@pytest.mark.parametrize("written", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_dtypes(stored: str, written: str, tmp_path: Path) -> None:
    """Exact bytes when the dtype stays; otherwise NumPy's nearest, as Hugging Face's `.to` rounds."""
    config = toy_config()
    hf = write_hf(tmp_path / "hf", config, stored)
    run(hf, tmp_path / "m", "hf-mg", params_dtype=written)
    dtype = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}[written]
    source, converted = open_source(hf), open_source(tmp_path / "m")
    for name in tensor_table(config):
        assert converted.read(name).tobytes() == source.read(name).astype(dtype).tobytes()


def test_numbers_beyond_fp16_are_refused(tmp_path: Path) -> None:
    class Large(RandomSource):
        def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
            tensor = super().read(name, kind)
            if name == "decoder.final_layernorm.weight":
                tensor[5] = 1e5
            return tensor

    config = toy_config()
    copy(Large(config, 3), HFSink(tmp_path / "hf", config, "float32", Companions()))
    with pytest.raises(UserError, match=r"decoder\.final_layernorm\.weight holds numbers beyond the range of float16"):
        run(tmp_path / "hf", tmp_path / "m", "hf-mg", params_dtype="fp16")
    assert not (tmp_path / "m").exists()


def test_several_dtypes_need_a_choice(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    hf = write_hf(tmp_path / "hf", toy_config(), "float32")
    tensors = load_file(hf / SINGLE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    save_file(tensors, hf / SINGLE)
    with pytest.raises(UserError, match="holds float16 and float32: choose one with --params-dtype"):
        run(hf, tmp_path / "m", "hf-mg")
    run(hf, tmp_path / "m", "hf-mg", params_dtype="fp32")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, hf / SINGLE)
    with pytest.raises(UserError, match=r"self_attn\.k_proj\.weight, .* must have one dtype"):
        run(hf, tmp_path / "n", "hf-mg", params_dtype="fp32")
