"""Conversion with another folder's config, other vocabularies, and options that contradict."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_convert import SINGLE, assert_round_trip, run, write_hf

from tandem.checkpoints.detect import open_source
from tandem.checkpoints.folders import find_iteration
from tandem.checkpoints.formats.torch_reader import load
from tandem.checkpoints.megatron.names import FILE
from tandem.checkpoints.megatron.sink import pad_vocab_size
from tandem.checkpoints.megatron.source import MegatronSource
from tandem.conversion.as_trained import export
from tandem.conversion.convert import convert
from tandem.conversion.options import ConvertOptions, ExportOptions, StatedModel
from tandem.errors import UserError
from tandem.models.tensors import EMBEDDING, tensor_table
from toys import toy_config

# --- the config of another folder


def trained_by_megatron(hf: Path, folder: Path) -> Path:
    """A `torch` checkpoint as a trainer saves it: without config, with its length, and with the padded vocabulary."""
    import torch

    run(hf, folder, "hf-mg", ckpt_format="torch", padded_vocab_size=256)
    iteration = find_iteration(folder)
    shutil.rmtree(iteration / "hf")
    for path in iteration.glob(f"*/{FILE}"):
        content = torch.load(path, weights_only=False)
        content["args"].max_position_embeddings = 32
        del content["args"].true_vocab_size
        torch.save(content, path)
    return folder


def test_convert_and_export_take_the_same_config(tmp_path: Path) -> None:
    """`--hf-cfg-dir` states the vocabulary before padding, and the positions, which a trainer overwrites."""
    hf = write_hf(tmp_path / "hf", toy_config(vocab_size=211))
    checkpoint = trained_by_megatron(hf, tmp_path / "m")
    run(checkpoint, tmp_path / "converted", "mg-hf", hf_cfg_dir=str(hf))
    export(ExportOptions(load=str(checkpoint), save_dir=str(tmp_path / "exported"), hf_cfg_dir=str(hf)))
    for name in ("config.json", SINGLE):
        expected = (hf / name).read_bytes()
        assert (tmp_path / "converted" / name).read_bytes() == expected == (tmp_path / "exported" / name).read_bytes()


def test_padding_of_a_native_checkpoint_is_left_out_and_said(tmp_path: Path) -> None:
    """What came from Megatron's files without their model's config has the padded vocabulary."""
    hf = write_hf(tmp_path / "hf", toy_config(vocab_size=211, untie_embeddings_and_output_weights=True))
    run(trained_by_megatron(hf, tmp_path / "m"), tmp_path / "native", "mg-mg")
    assert open_source(tmp_path / "native").config.vocab_size == 256
    options = ExportOptions(load=str(tmp_path / "native"), save_dir=str(tmp_path / "out"), hf_cfg_dir=str(hf))
    (said,) = (notice for notice in export(options).notices if "rows" in notice)
    assert said.startswith("the last 45 rows of the embedding are left out: ")
    run(tmp_path / "native", tmp_path / "converted", "mg-hf", hf_cfg_dir=str(hf))
    for folder in ("out", "converted"):
        assert (tmp_path / folder / SINGLE).read_bytes() == (hf / SINGLE).read_bytes()


def test_other_positions_of_a_native_checkpoint_are_taken_and_said(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", toy_config(vocab_size=256))
    run(trained_by_megatron(hf, tmp_path / "m"), tmp_path / "native", "mg-mg")
    assert open_source(tmp_path / "native").config.max_position_embeddings == 32
    options = ExportOptions(load=str(tmp_path / "native"), save_dir=str(tmp_path / "out"), hf_cfg_dir=str(hf))
    notices = export(options).notices
    assert (tmp_path / "out/config.json").read_bytes() == (hf / "config.json").read_bytes()
    assert [notice for notice in notices if "max_position_embeddings is 512" in notice]
    other = write_hf(tmp_path / "other", toy_config(vocab_size=256, rotary_base=1e4))
    with pytest.raises(
        UserError, match=r"other/config\.json contradicts .*: rotary_base is 10000\.0 there, 1000000\.0"
    ):
        run(tmp_path / "native", tmp_path / "n", "mg-hf", hf_cfg_dir=str(other))


# --- vocabulary


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize(("tp", "divisor", "rows"), [(1, 128, 256), (2, 128, 256), (4, 64, 256), (2, 1, 212)])
def test_padding_is_recorded_and_removed(tp: int, divisor: int, rows: int, untie: bool, tmp_path: Path) -> None:
    """A prime vocabulary, padded as Megatron does, comes back with its own rows."""
    config = toy_config(
        num_layers=2,
        num_query_groups=4,
        num_attention_heads=4,
        vocab_size=211,
        untie_embeddings_and_output_weights=untie,
    )
    options = {"target_tensor_parallel_size": tp, "make_vocab_size_divisible_by": divisor}
    assert pad_vocab_size(211, divisor, tp) == rows
    assert_round_trip(tmp_path, config, ckpt_format="torch", **options)
    for path in find_iteration(tmp_path / "m").glob(f"*/{FILE}"):
        content = load(path)
        assert content["model"][EMBEDDING].shape[0] == rows // tp
        assert (content["args"].padded_vocab_size, content["args"].true_vocab_size) == (rows, 211)


def test_padding_is_chosen_outright(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", toy_config(vocab_size=211))
    run(hf, tmp_path / "m", "hf-mg", ckpt_format="torch", target_tensor_parallel_size=2, padded_vocab_size=300)
    assert isinstance(source := open_source(tmp_path / "m"), MegatronSource)
    assert source.config.vocab_size == 211
    with pytest.raises(UserError, match="exclude each other"):
        run(hf, tmp_path / "n", "hf-mg", ckpt_format="torch", padded_vocab_size=300, make_vocab_size_divisible_by=8)


def test_transformer_engines_names(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", toy_config(num_layers=2))
    run(hf, tmp_path / "m", "hf-mg", ckpt_format="torch", transformer_impl="transformer_engine")
    names = set(load(find_iteration(tmp_path / "m") / "mp_rank_00" / FILE)["model"])
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names
    assert not [name for name in names if "input_layernorm" in name or "pre_mlp_layernorm" in name]
    run(tmp_path / "m", tmp_path / "back", "mg-hf")
    assert (tmp_path / "back" / SINGLE).read_bytes() == (hf / SINGLE).read_bytes()


# --- options


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"rotary_base": 12345.0}, r"--rotary-base 12345 contradicts the config of .*, which has 1000000\.0"),
        ({"hidden_size": 64}, "--hidden-size 64 contradicts .* which has 48"),
        ({"true_vocab_size": 212}, "--true-vocab-size 212 contradicts .* which has 211"),
        ({"add_qkv_bias": True}, "--add-qkv-bias contradicts .* which has False"),
        ({"untie_embeddings_and_output_weights": True}, "--untie-embeddings-and-output-weights contradicts"),
        ({"qk_layernorm": False}, "--no-qk-layernorm contradicts .* which has True"),
    ],
)
def test_flags_that_contradict_the_config_stop(stated: dict[str, Any], message: str, tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", toy_config())
    with pytest.raises(UserError, match=message):
        run(hf, tmp_path / "m", "hf-mg", stated=StatedModel(**stated))
    agreeing = StatedModel(rotary_base=1e6, hidden_size=48, true_vocab_size=211, qk_layernorm=True)
    run(hf, tmp_path / "m", "hf-mg", stated=agreeing)


@pytest.mark.parametrize(
    ("direction", "options", "message"),
    [
        ("hf-hf", {}, "nothing to convert"),
        ("mg-hf", {}, "--load-model-type mg: .* holds a Hugging Face folder: give --load-model-type hf"),
        ("hf-hf", {"lora_r": 4}, "--lora-r: .* has no adapters: give theirs with --lora-load"),
        ("hf-mg", {"model_type_hf": "llama"}, "--model-type-hf llama: .* holds qwen3"),
        ("hf-mg", {"noop_layers": "x"}, "--noop-layers 'x': expected numbers"),
        ("hf-mg", {"target_pipeline_parallel_size": 2}, "3 layers .* do not divide"),
        (
            "hf-mg",
            {"target_tensor_parallel_size": 4},
            "--target-tensor-parallel-size 4: the model's num_query_groups 2 and num_attention_heads 6 .*: give 1 or 2",
        ),
        ("hf-mg", {"num_layers": 2, "noop_layers": "0"}, "--num-layers and --noop-layers exclude"),
        (
            "hf-mg",
            {"num_layers_per_virtual_pipeline_stage": 0},
            "--num-layers-per-virtual-pipeline-stage 0: expected a number that divides the 3 layers",
        ),
        ("hf-mg", {"make_vocab_size_divisible_by": 0}, "--make-vocab-size-divisible-by 0: expected 1 or more"),
    ],
)
def test_options_that_cannot_be(direction: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", toy_config())
    with pytest.raises(UserError, match=message):
        run(hf, tmp_path / "m", direction, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_two_conversions_into_one_folder(tmp_path: Path, there: bool) -> None:
    """The second one is refused, and says by whom. The first one's result is whole."""
    hf, target = write_hf(tmp_path / "hf", toy_config()), tmp_path / "target"
    if there:
        target.mkdir()
    options, refused = ConvertOptions(load_dir=str(hf), save_dir=str(target)), list[str]()

    def convert_again(*_: object) -> None:
        with pytest.raises(UserError, match=f"target is in use by process {os.getpid()} on .*remove .*lock") as caught:
            convert(options)
        refused.extend(caught.value.problems)

    convert(options, check=convert_again)
    assert len(refused) == 1
    source, result = open_source(hf), open_source(target)
    for name in tensor_table(source.config):
        np.testing.assert_array_equal(result.read(name), source.read(name), err_msg=name)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "target"}
