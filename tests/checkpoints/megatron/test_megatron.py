"""Megatron `torch` checkpoints: equal to real ones, invertible at every layout, and refused when anything is amiss."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.folders import find_iteration
from tandem.checkpoints.formats.torch_reader import load
from tandem.checkpoints.hf.source import HFSource
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.checkpoints.megatron.names import FILE
from tandem.checkpoints.megatron.rotary_args import scaling_from_args
from tandem.checkpoints.megatron.sink import MegatronSink, pad_vocab_size
from tandem.checkpoints.megatron.source import MegatronSource
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.models.config import ModelConfig, RotaryScaling
from tandem.models.hf_config import to_hf
from tandem.models.tensors import EMBEDDING, OUTPUT, tensor_table
from tandem.parallel.layout import Layout
from toys import toy_config

torch = pytest.importorskip("torch")

TIED, UNTIED = False, True
GOLDEN = [
    ("v4_tp1pp1", "hf_v4", Layout()),
    ("v4_tp2pp2", "hf_v4", Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    ("v4tied_tp1pp1", "hf_v4_tied", Layout()),
    ("v4tied_tp1pp2", "hf_v4_tied", Layout(pipeline_model_parallel_size=2)),
]


def divisible_config(untie: bool = UNTIED, **changes: object) -> ModelConfig:
    """A toy that divides by four tensor ranks and by two stages of two chunks."""
    sizes = {"num_layers": 8, "num_attention_heads": 8, "num_query_groups": 4, "vocab_size": 212}
    return toy_config(**{**sizes, "untie_embeddings_and_output_weights": untie, **changes})


def layout(tp: int = 1, pp: int = 1, vpp: int | None = None, **changes: Any) -> Layout:
    return Layout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=vpp,
        **changes,
    )


def write(folder: Path, config: ModelConfig, target: Layout, **options: Any) -> TensorSource:
    """A checkpoint of random weights; returns what it was copied from."""
    source = RandomSource(config, seed=1, dtype=options.pop("dtype", "bfloat16"))
    copy(source, MegatronSink(folder, config, target, options.pop("stored", "bfloat16"), **options))
    return source


def assert_equal(actual: TensorSource, expected: TensorSource) -> None:
    for name in tensor_table(expected.config):
        tensor, other = actual.read(name), expected.read(name)
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
        assert tensor.tobytes() == other.tobytes(), name


def edit(path: Path, change: Callable[[dict], None]) -> None:
    """Change a file as a program with torch would."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


# --- against real checkpoints


@pytest.mark.parametrize(("name", "hf", "expected"), GOLDEN)
def test_real_megatron_checkpoints_equal_their_hf_models(
    shared_data: Path, name: str, hf: str, expected: Layout
) -> None:
    """Tied and untied, over TP and PP; the config comes from the trainer's args."""
    reference = HFSource(shared_data / "golden/mcore" / hf)
    source = MegatronSource(shared_data / "golden/mcore" / name)
    assert source.layout == expected
    assert source.kinds() == ("model",)
    assert source.trainer_state() == ("num_floating_point_operations_so_far", "rerun_state_machine")
    # a trainer sets max_position_embeddings to its own sequence length
    assert dataclasses.replace(source.config, max_position_embeddings=40960) == reference.config
    assert_equal(source, reference)
    assert_equal(MegatronSource(shared_data / "golden/mcore" / name, config=reference.config), reference)


@pytest.mark.parametrize(("name", "hf", "target"), GOLDEN)
def test_files_equal_real_megatron_files_key_by_key(
    shared_data: Path, tmp_path: Path, name: str, hf: str, target: Layout
) -> None:
    """What Megatron 0.12.1's own save_checkpoint wrote, key by key, apart from empty `_extra_state`."""
    reference = HFSource(shared_data / "golden/mcore" / hf)
    copy(reference, MegatronSink(tmp_path, reference.config, target, "float32", companions=reference.companions))
    real_folder = find_iteration(shared_data / "golden/mcore" / name)
    real_files = sorted(real_folder.glob(f"*/{FILE}"))
    assert sorted(find_iteration(tmp_path).glob(f"*/{FILE}")) == [
        find_iteration(tmp_path) / path.relative_to(real_folder) for path in real_files
    ]
    for path in real_files:
        real = load(path)
        ours = torch.load(find_iteration(tmp_path) / path.relative_to(real_folder), weights_only=False)
        expected = {key: value for key, value in real["model"].items() if not key.endswith("_extra_state")}
        assert set(ours["model"]) == set(expected)
        for key, value in expected.items():
            assert np.array_equal(ours["model"][key].numpy(), value.read(key)), key
        assert (ours["checkpoint_version"], ours["iteration"]) == (3.0, real["iteration"])
        stated = {key: value for key, value in vars(ours["args"]).items() if hasattr(real["args"], key)}
        differing = {key for key, value in stated.items() if getattr(real["args"], key) != value}
        # NullTokenizer's size, and the sequence length trained on
        assert differing <= {"vocab_size", "max_position_embeddings"}


# --- every layout


LAYOUTS = [
    *(layout(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)),
    layout(pp=4),
    layout(pp=2, vpp=2),
    layout(tp=2, pp=2, vpp=1),
    layout(pp=2, num_layer_list=(3, 5)),
    layout(tp=2, pp=2, noop_layers=(0, 9)),
    layout(pp=2, noop_layers=(8, 9)),
    layout(pp=2, vpp=3, noop_layers=(0, 4, 10, 11)),
]


@pytest.mark.parametrize("untie", [TIED, UNTIED])
@pytest.mark.parametrize("target", LAYOUTS)
def test_round_trip_is_bit_identical(tmp_path: Path, target: Layout, untie: bool) -> None:
    """Any layout is read back without naming it, and written in another one."""
    config = divisible_config(untie)
    source = write(tmp_path / "a", config, target)
    written = MegatronSource(tmp_path / "a")
    assert (written.layout, written.config) == (target, config)
    assert_equal(written, source)
    copy(written, MegatronSink(tmp_path / "b", config, layout(tp=2, pp=2, vpp=2), "bfloat16"))
    assert_equal(MegatronSource(tmp_path / "b"), source)


YARN = RotaryScaling("yarn", 4.0, original_max_position_embeddings=128)
SCALINGS = [
    *(None, RotaryScaling("linear", 4.0), RotaryScaling("llama3", 8.0), YARN),
    dataclasses.replace(YARN, beta_fast=24.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.7, truncate=False),
    dataclasses.replace(YARN, attention_factor=1.0 + 0.05 * math.log(4)),
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_args_alone_tell_the_model(tmp_path: Path, model_type: str, scaling: RotaryScaling | None) -> None:
    """Without hf/config.json the model is read from args."""
    config = divisible_config(model_type=model_type, rotary_scaling=scaling, rotary_base=5e5)
    source = write(tmp_path, config, layout(tp=2, pp=2, noop_layers=(3, 7)))
    shutil.rmtree(find_iteration(tmp_path) / "hf")
    written = MegatronSource(tmp_path)
    assert written.config == config
    assert_equal(written, source)


@pytest.mark.parametrize(
    ("args", "amplitude"),
    [
        ({"rope_scaling_mscale": 1.0, "rope_scaling_mscale_all_dim": 0.0}, 1 + 0.1 * math.log(40)),  # its defaults
        ({"rope_scaling_mscale": 0.7, "rope_scaling_mscale_all_dim": 0.0}, 1 + 0.07 * math.log(40)),
        ({"rope_scaling_mscale": 1.0, "rope_scaling_mscale_all_dim": 1.0}, 1.0),
        ({}, 1 + 0.1 * math.log(40)),
    ],
)
def test_yarn_as_mindspeed_llm_stores_it(args: dict[str, float], amplitude: float) -> None:
    original = {"rope_scaling_original_max_position_embeddings": 4096, "rope_scaling_factor": 40}
    scaling = scaling_from_args({"rope_scaling_type": "yarn", "beta_fast": 24, **original, **args}, "it")
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.beta_fast, scaling.beta_slow) == ("yarn", 40, 24, 1)
    assert scaling.original_max_position_embeddings == 4096
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-15)
    with pytest.raises(UserError, match="it: args ask for YaRN and do not say yarn_original_max_position"):
        scaling_from_args({"rope_scaling_type": "yarn", "rope_scaling_factor": 40}, "it")


def test_args_under_their_newer_names(tmp_path: Path) -> None:
    """Megatron-LM calls `norm_epsilon` `layernorm_epsilon` since 0.16."""
    config = divisible_config()
    write(tmp_path, config, layout())
    path = find_iteration(tmp_path) / "mp_rank_00" / FILE
    edit(
        path, lambda content: vars(content["args"]).update(layernorm_epsilon=vars(content["args"]).pop("norm_epsilon"))
    )
    hf = find_iteration(tmp_path) / "hf"
    hf.rename(tmp_path / "hf")
    assert MegatronSource(tmp_path).config == config
    (tmp_path / "hf").rename(hf)
    edit(path, lambda content: vars(content["args"]).update(layernorm_epsilon=1e-5))
    with pytest.raises(UserError, match="args say norm_epsilon = 1e-05, the model's config says 1e-06"):
        MegatronSource(tmp_path)
    edit(path, lambda content: vars(content["args"]).update(layernorm_zero_centered_gamma=True))
    hf.rename(tmp_path / "hf")
    with pytest.raises(UserError, match="args say layernorm_zero_centered_gamma = True; supported: False"):
        MegatronSource(tmp_path)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_every_rank(tmp_path: Path, weights_only: bool, mmap: bool) -> None:
    config = divisible_config(num_layers=4)
    source = write(tmp_path, config, layout(tp=2, pp=2, vpp=1), iteration=12)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "12"
    folder = tmp_path / "iter_0000012"
    assert sorted(path.parent.name for path in folder.glob(f"*/{FILE}")) == [
        f"mp_rank_{tp}_{pp}" for tp in ("00", "01") for pp in ("000", "001")
    ]
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(folder / "mp_rank_01_000" / FILE, weights_only=weights_only, mmap=mmap)
    assert list(content) == ["args", "checkpoint_version", "iteration", "model0", "model1"]
    args = content["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert (args.virtual_pipeline_model_parallel_size, args.num_layers_per_virtual_pipeline_stage) == (2, 1)
    assert (args.num_query_groups, args.num_key_value_heads, args.group_query_attention) == (4, 4, True)
    assert args.params_dtype == "torch.bfloat16"
    # local layer 0 of chunk 1 on stage 0 is global layer 2; gate and up are cut apart
    gate, up = torch.from_numpy(source.read("decoder.layers.2.mlp.linear_fc1.weight").view(np.int16)).chunk(2)
    expected = torch.cat([gate.chunk(2)[1], up.chunk(2)[1]])
    tensor = content["model1"]["decoder.layers.0.mlp.linear_fc1.weight"]
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor.view(torch.int16), expected)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_dtype_of_the_file(tmp_path: Path, stored: str) -> None:
    source = write(tmp_path, divisible_config(), layout(), dtype="float32", stored=stored)
    written = MegatronSource(tmp_path)
    assert written.dtype(EMBEDDING).name == stored
    assert np.array_equal(written.read(EMBEDDING), source.read(EMBEDDING).astype(written.dtype(EMBEDDING)))


def test_companions_travel_with_the_weights(tmp_path: Path) -> None:
    """A checkpoint can be exported without anything else."""
    config = divisible_config()
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    hf = {**to_hf(config), "eos_token_id": 17}
    write(tmp_path / "c", config, layout(tp=2), companions=Companions(hf, [tokenizer]))
    companions = MegatronSource(tmp_path / "c").companions
    assert companions.hf_config is not None
    assert companions.hf_config["eos_token_id"] == 17
    assert [path.read_text() for path in companions.files if path.name == "tokenizer.json"] == ["{}"]


# --- vocabulary


@pytest.mark.parametrize(("size", "tp", "expected"), [(151936, 2, 152064), (151936, 1, 151936), (1009, 4, 1024)])
def test_padded_size_is_megatrons(size: int, tp: int, expected: int) -> None:
    assert pad_vocab_size(size, 128, tp) == expected


@pytest.mark.parametrize("untie", [TIED, UNTIED])
@pytest.mark.parametrize("with_hf", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_vocabulary_is_padded_and_the_padding_removed(tmp_path: Path, tp: int, with_hf: bool, untie: bool) -> None:
    """A prime vocabulary comes back with its own rows."""
    config = divisible_config(untie, vocab_size=211)
    rows = pad_vocab_size(211, 32, tp)
    source = write(tmp_path, config, layout(tp=tp, pp=2), padded_vocab_size=rows)
    last = torch.load(find_iteration(tmp_path) / f"mp_rank_{tp - 1:02d}_001" / FILE, weights_only=False)
    assert last["model"][OUTPUT].shape[0] == rows // tp
    assert not last["model"][OUTPUT][211 - rows :].any()
    assert (last["args"].vocab_size, last["args"].padded_vocab_size) == (211, rows)
    if not with_hf:
        shutil.rmtree(find_iteration(tmp_path) / "hf")
    written = MegatronSource(tmp_path)
    assert written.config.vocab_size == 211
    assert_equal(written, source)


def test_padding_may_cover_whole_ranks(tmp_path: Path) -> None:
    source = write(tmp_path, divisible_config(), layout(tp=4), padded_vocab_size=1024)
    assert_equal(MegatronSource(tmp_path), source)


def test_a_vocabulary_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    """Upstream writes ranks of unequal size, which no trainer loads."""
    config = divisible_config(vocab_size=211)
    with pytest.raises(UserError, match=r"vocabulary of 211 does not divide over 2 .*--padded-vocab-size 212"):
        MegatronSink(tmp_path, config, layout(tp=2), "float32")
    with pytest.raises(UserError, match="--padded-vocab-size 100: expected at least the"):
        MegatronSink(tmp_path, config, layout(), "float32", padded_vocab_size=100)
    assert not any(tmp_path.iterdir())


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    config = divisible_config()
    write(tmp_path, config, layout(tp=2))
    with pytest.raises(UserError, match=f"{EMBEDDING} has 212 rows; the config implies 999"):
        MegatronSource(tmp_path, config=dataclasses.replace(config, vocab_size=999))


# --- files of other writers


def as_mindspeed(folder: Path, config: ModelConfig) -> None:
    """Rewrite a checkpoint as MindSpeed-LLM's converter v2 does: protocol 4, defaultdict, Hugging Face's names."""
    hf = {key: value for key, value in to_hf(config).items() if isinstance(value, bool | int | float | str)}
    for path in find_iteration(folder).glob(f"*/{FILE}"):
        content = torch.load(path, weights_only=False)
        args = content["args"]
        kept = ("num_layers", "kv_channels", "ffn_hidden_size", "norm_epsilon", "untie_embeddings_and_output_weights")
        kept += ("qk_layernorm", "tensor_model_parallel_size", "pipeline_model_parallel_size")
        content["args"] = argparse.Namespace(
            **hf, **{key: getattr(args, key) for key in kept}, group_query_attention=False, seq_length=4096
        )
        model: dict[str, Any] = defaultdict(dict)
        model.update(content["model"])
        content["model"] = model
        torch.save(content, path, pickle_protocol=4)
    shutil.rmtree(find_iteration(folder) / "hf")


def test_mindspeed_converter_files(tmp_path: Path) -> None:
    config = divisible_config()
    source = write(tmp_path, config, layout(tp=2, pp=2))
    as_mindspeed(tmp_path, config)
    written = MegatronSource(tmp_path)
    assert written.config == config
    assert_equal(written, source)


def test_noop_layers_that_the_converter_did_not_record_must_be_given(tmp_path: Path) -> None:
    config = divisible_config(num_layers=6)
    source = write(tmp_path, config, layout(pp=2, noop_layers=(0, 7)))
    as_mindspeed(tmp_path, config)
    with pytest.raises(
        UserError, match=r"holds 6 decoder layers \(by stage: \[3, 3\]\).* implies 8.*--source-noop-layers"
    ):
        MegatronSource(tmp_path)
    with pytest.raises(UserError, match=r"num_layers = 8, the model's config says 6; .*--source-noop-layers"):
        MegatronSource(tmp_path, config=config)
    with pytest.raises(UserError, match=r"missing: .*decoder\.layers\.0\."):
        MegatronSource(tmp_path, noop_layers=(1, 7))
    assert_equal(MegatronSource(tmp_path, noop_layers=(0, 7)), source)


def test_transformer_engine_names(tmp_path: Path) -> None:
    source = write(tmp_path, divisible_config(), layout(tp=2))

    def fuse(content: dict) -> None:
        model = content["model"]
        for key in list(model):
            for norm, fused in (
                ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
                ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            ):
                if key.endswith(norm):
                    model[key.replace(norm, fused)] = model.pop(key)
        model["decoder.layers.0.mlp.linear_fc1._extra_state"] = None

    for path in find_iteration(tmp_path).glob(f"*/{FILE}"):
        edit(path, fuse)
    assert_equal(MegatronSource(tmp_path), source)


def test_release_tracker_and_expert_suffix(tmp_path: Path) -> None:
    source = write(tmp_path, divisible_config(), layout(tp=2, pp=2))
    find_iteration(tmp_path).rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    for path in list((tmp_path / "release").glob("mp_rank_*")):
        path.rename(f"{path}_000")
    written = open_source(tmp_path)
    assert isinstance(written, MegatronSource)
    assert_equal(written, source)
    (tmp_path / "release" / "mp_rank_00_000_000").rename(tmp_path / "release" / "mp_rank_00_000_001")
    with pytest.raises(UserError, match="mp_rank_00_000_001: not a rank of a model without expert ranks"):
        MegatronSource(tmp_path)


def test_iterations_are_chosen(tmp_path: Path) -> None:
    config = divisible_config(num_layers=2)
    write(tmp_path, config, layout(), iteration=3)
    write(tmp_path, config, layout(tp=2), iteration=5)
    assert MegatronSource(tmp_path).layout.tensor_model_parallel_size == 2
    assert MegatronSource(tmp_path, 3).layout.tensor_model_parallel_size == 1
    with pytest.raises(UserError, match="iter_0000004 does not exist"):
        MegatronSource(tmp_path, 4)


# --- whole or not at all


def test_nothing_appears_before_close_or_after_abort(tmp_path: Path) -> None:
    config = divisible_config()
    sink = MegatronSink(tmp_path, config, layout(tp=2), "float32")
    sink.write(EMBEDDING, np.zeros((212, 48), np.float32))
    assert not find_iteration(tmp_path, 1).exists()
    with pytest.raises(UserError, match=r"not every tensor was written\. Missing: decoder"):
        sink.close()
    sink.abort()
    assert not any(tmp_path.iterdir())


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    sink = MegatronSink(tmp_path, divisible_config(), layout(tp=2), "float32")
    with pytest.raises(UserError, match=r"word_embeddings.weight has shape \[1, 2\]"):
        sink.write(EMBEDDING, np.zeros((1, 2), np.float32))
    sink.abort()


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Re-sharding holds one tensor and the slices of one rank, not the model."""
    config = divisible_config(vocab_size=4096, hidden_size=256, num_layers=8, ffn_hidden_size=1024)
    largest = 4096 * 256 * 4
    source = write(tmp_path / "a", config, layout(tp=2, pp=2), dtype="float32", stored="float32")
    total = sum(source.read(name).nbytes for name in tensor_table(config))
    assert total > 8 * largest
    tracemalloc.start()
    try:
        copy(MegatronSource(tmp_path / "a"), MegatronSink(tmp_path / "b", config, layout(tp=4), "float32"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * largest
