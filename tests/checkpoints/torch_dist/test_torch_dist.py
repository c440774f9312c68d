"""`torch_dist` checkpoints: every form of names is read, nothing is executed, and what is amiss is named.

tests/peers reads those that Megatron-core itself writes, of several ranks.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_toys import as_torch, by_layer, stacked, write
from runs import run
from tandem.__main__ import main
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.source import HFSource
from tandem.checkpoints.interface import TORCH_DIST, TensorSource
from tandem.checkpoints.random_init import RandomSource
from tandem.checkpoints.torch_dist.source import TorchDistSource
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.parallel.grid import Grid, held_shards
from tandem.parallel.layout import Layout
from tandem.parallel.slices import cut
from toys import DENSE_TOYS, toy_config
from workspace import Workspace

torch = pytest.importorskip("torch")

CONFIG = toy_config(num_layers=4, num_query_groups=4, num_attention_heads=8, vocab_size=212)


def weights(config: ModelConfig = CONFIG, dtype: str = "float32") -> RandomSource:
    return RandomSource(config, 3, dtype)


def assert_equal(actual: TensorSource, expected: TensorSource) -> None:
    for name in tensor_table(expected.config):
        tensor, other = actual.read(name), expected.read(name)
        assert (tensor.dtype.name, tensor.shape) == (other.dtype.name, other.shape)
        assert tensor.tobytes() == other.tobytes(), name


def halves(state: dict[str, Any]) -> dict[str, Any]:
    """Gate and up under names of their own."""
    result = {}
    for name, tensor in state.items():
        if name.endswith("linear_fc1.weight"):
            result[f"{name}_w"], result[f"{name}_v"] = tensor.chunk(2)
        else:
            result[name] = tensor
    return result


@pytest.mark.parametrize("model", DENSE_TOYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked_layers_are_read(model: str, dtype: str, tmp_path: Path) -> None:
    source = weights(DENSE_TOYS[model], dtype)
    write(tmp_path, stacked(source), source)
    read = open_source(tmp_path)
    assert isinstance(read, TorchDistSource)
    assert (read.format, read.iteration, read.layout, read.kinds()) == (TORCH_DIST, 1, None, ("model",))
    assert read.config == source.config
    assert (read.unread_optimizer(), read.trainer_state(), read.document("trainer_state.json")) == ((), (), None)
    assert_equal(read, source)


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_layers_with_names_of_their_own_are_read(prefix: str, tmp_path: Path) -> None:
    source = weights()
    write(tmp_path, halves(by_layer(source, prefix)), source)
    assert_equal(open_source(tmp_path), source)


def test_a_plain_checkpoint_of_torch_keeps_args_among_its_objects(tmp_path: Path) -> None:
    source = weights()
    args = argparse.Namespace(**{**vars(torch_args(source)), "stop": range(3)})
    write(tmp_path, {**by_layer(source, "model."), "args": args, "rng": {"a": [1]}, "iteration": 1})
    read = open_source(tmp_path)
    assert read.config == CONFIG
    assert_equal(read, source)


def torch_args(source: TensorSource) -> argparse.Namespace:
    from tandem.checkpoints.megatron.args import to_args

    return to_args(source.config, Layout(), "float32", source.config.vocab_size)


def test_padded_rows_are_left_out(tmp_path: Path) -> None:
    """A trainer of Megatron records the padded vocabulary; config.json says which rows are tokens."""
    source = weights()
    write(tmp_path, stacked(source, padding=44), source, true_vocab_size=None)
    assert open_source(tmp_path).config.vocab_size == 256
    assert_equal(open_source(tmp_path, config=CONFIG), source)


def test_noop_layers_count_in_the_stack(tmp_path: Path) -> None:
    source, layout = weights(), Layout(noop_layers=(0, 5))
    write(tmp_path, stacked(source, layout.noop_layers), source, layout)
    assert_equal(open_source(tmp_path), source)
    with pytest.raises(UserError, match="contradicts"):
        open_source(tmp_path, noop_layers=(1, 5))
    write(tmp_path / "b", stacked(source, layout.noop_layers), source, layout, noop_layers=None)
    assert open_source(tmp_path / "b").config.num_layers == 6
    assert_equal(open_source(tmp_path / "b", noop_layers=(0, 5)), source)


def test_each_rank_gets_its_parts(tmp_path: Path) -> None:
    source = weights()
    write(tmp_path, halves(by_layer(source)), source)
    read = open_source(tmp_path)
    grid = Grid(Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 4)
    for rank in range(grid.size):
        for shard in held_shards(CONFIG, grid, grid.place(rank)):
            values = read.read_part(shard.spec.name, shard.part)
            np.testing.assert_array_equal(values, cut(source.read(shard.spec.name), shard.part))


def test_the_optimizer_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = weights()
    state = stacked(source)
    moments = {f"optimizer.state.{kind}.{name}": tensor + 1 for kind in ("exp_avg",) for name, tensor in state.items()}
    write(tmp_path / "mg", {**state, **moments}, source)
    read = open_source(tmp_path / "mg")
    assert read.unread_optimizer() == (".distcp files",)
    assert_equal(read, source)
    assert main(["inspect", "checkpoint", str(tmp_path / "mg")]) == 0
    assert "Megatron torch_dist" in (out := capsys.readouterr().out)
    assert ".distcp files; it is not read here" in out
    words = ["--load-dir", str(tmp_path / "mg"), "--load-model-type", "mg", "--save-model-type", "hf"]
    assert main(["convert", *words, "--save-dir", str(tmp_path / "hf"), "--ckpt-format", "torch_dist"]) == 0
    assert "the optimizer" in capsys.readouterr().out
    assert_equal(HFSource(tmp_path / "hf"), source)


def test_it_is_no_format_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--load-dir", str(tmp_path), "--save-dir", str(tmp_path / "b"), "--ckpt-format", "torch_dist"]
    assert main(["convert", *words]) == 2
    assert "--ckpt-format torch" in capsys.readouterr().err


def test_training_starts_from_it(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    """From the same weights, the same losses. A checkpoint without `args` takes its model from --hf-cfg-dir."""
    values: dict[str, Any] = {"train_iters": 2, "lr_warmup_iters": 0, "tokenizer_name_or_path": str(workspace.hf)}
    expected = run(workspace, framework, **values)
    source = open_source(workspace.hf)
    write(tmp_path / "a", stacked(source), source)
    write(tmp_path / "b", stacked(source))
    assert run(workspace, framework, load=str(tmp_path / "a"), ckpt_format="torch_dist", **values) == expected
    with pytest.raises(UserError, match=r"no args.*--hf-cfg-dir"):
        run(workspace, framework, load=str(tmp_path / "b"), **values)
    assert run(workspace, framework, load=str(tmp_path / "b"), hf_cfg_dir=str(workspace.hf), **values) == expected


# --- what is amiss is named


@pytest.fixture
def iteration(tmp_path: Path) -> Path:
    return write(tmp_path, stacked(weights()), weights())


def test_a_missing_and_a_short_file_are_named(iteration: Path) -> None:
    path = next(iteration.glob("*.distcp"))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match=f"{path.name}: cut short"):
        open_source(iteration.parent)
    path.unlink()
    with pytest.raises(UserError, match=f"files are missing: {path.name}.*each machine"):
        open_source(iteration.parent)
    (iteration / ".metadata").unlink()
    with pytest.raises(UserError, match=r"\.metadata: cannot be read"):
        open_source(iteration.parent)


def test_a_flipped_bit_is_noticed(iteration: Path) -> None:
    path = next(iteration.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    place = data.index(weights().read(EMBEDDING).tobytes())
    data[place + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path.name}: tensor {EMBEDDING} is damaged: its CRC"):
        open_source(iteration.parent).read(EMBEDDING)


def test_metadata_that_asks_for_a_command_is_refused(iteration: Path) -> None:
    marker = iteration / "executed"

    class Hostile:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {marker}",)

    (iteration / ".metadata").write_bytes(pickle.dumps({"x": Hostile()}))
    with pytest.raises(UserError, match=rf"\.metadata: refused: the file asks for {os.system.__module__}\.system"):
        open_source(iteration.parent)
    assert not marker.exists()


@pytest.mark.parametrize("value", [None, {}, [1], {"state_dict_metadata": {}}])
def test_metadata_of_something_else_is_refused(iteration: Path, value: object) -> None:
    (iteration / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match=r"\.metadata: damaged"):
        open_source(iteration.parent)


def test_a_file_outside_the_folder_is_refused(iteration: Path) -> None:
    path = iteration / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../x.distcp"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"damaged.*\.\./x\.distcp"):
        open_source(iteration.parent)


def without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if name not in names}


FC2 = "decoder.layers.mlp.linear_fc2.weight"


def test_tensors_that_do_not_fit_the_model_are_named(tmp_path: Path) -> None:
    source = weights()
    state = stacked(source)
    cases = {
        r"missing: decoder\.layers\.0-3\.mlp\.linear_fc2": without(state, FC2),
        r"left over: decoder\.layers\.mlp\.router\.weight$": {
            **state,
            "decoder.layers.mlp.router.weight": torch.ones(2),
        },
        r"linear_fc2\.weight has shape \[3, 48, 80\]; the config implies \[4, 48, 80\]": {**state, FC2: state[FC2][1:]},
        r"linear_fc2\.weight is float64": {**state, FC2: state[FC2].double()},
        r"no tensor is named embedding.*such as model\.layers": {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)},
    }
    for number, (message, changed) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        write(folder, changed)
        with pytest.raises(UserError, match=message):
            open_source(folder, config=CONFIG)


def test_chunks_that_are_missing_are_noticed(iteration: Path) -> None:
    path = iteration / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata[FC2].chunks = []
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=rf"chunks of {FC2} do not make up decoder\.layers\.0\.mlp"):
        open_source(iteration.parent)


def test_other_distributed_formats_are_named(iteration: Path) -> None:
    (iteration / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(UserError, match=r"format zarr.*--ckpt-format torch_dist"):
        open_source(iteration.parent)
    (iteration / "metadata.json").write_text("{")
    with pytest.raises(UserError, match=r"metadata\.json: damaged"):
        open_source(iteration.parent)


def test_iterations_are_chosen(tmp_path: Path) -> None:
    write(tmp_path, stacked(weights()), weights()).rename(tmp_path / "iter_0000007")
    with pytest.raises(UserError, match="iter_0000001"):
        open_source(tmp_path)
    assert open_source(tmp_path, 7).iteration == 7


def test_a_chunk_that_is_another_tensor_is_refused(iteration: Path) -> None:
    path = next(iteration.glob("*.distcp"))
    buffer = io.BytesIO()
    torch.save(as_torch(np.zeros((1, 2), np.float32)), buffer)
    path.write_bytes(buffer.getvalue() + bytes(path.stat().st_size))
    metadata = pickle.loads((iteration / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == EMBEDDING:
            info.offset, info.length = 0, len(buffer.getvalue())
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=rf"byte 0: tensor {EMBEDDING} has shape \[1, 2\]"):
        open_source(iteration.parent).read(EMBEDDING)
