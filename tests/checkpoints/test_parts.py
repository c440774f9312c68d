"""Every rank reads only what it needs of any format."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions, TensorSink, TensorSource
from tandem.checkpoints.megatron.sink import MegatronSink
from tandem.checkpoints.native.sink import NativeSink
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.tensors import EMBEDDING, parameter_count, tensor_table
from tandem.parallel.grid import Grid, held_shards
from tandem.parallel.layout import Layout
from tandem.parallel.slices import Part, cut
from toys import toy_config

CONFIG = toy_config(num_layers=4, num_query_groups=4, num_attention_heads=8, vocab_size=208)
UNTIED = replace(CONFIG, untie_embeddings_and_output_weights=True)
WRITTEN = Layout(tensor_model_parallel_size=4, pipeline_model_parallel_size=2)

FORMATS: dict[str, Callable[[Path, ModelConfig], TensorSink]] = {
    "hf": lambda folder, config: HFSink(folder, config, "float32", Companions(), shard_bytes=50_000),
    "native": lambda folder, config: NativeSink(folder, config, WRITTEN, {"model": "float32"}, 1, Companions()),
    "torch": lambda folder, config: MegatronSink(folder, config, WRITTEN, "float32"),
    "torch padded": lambda folder, config: MegatronSink(
        folder, config, Layout(), "float32", padded_vocab_size=config.vocab_size + 24
    ),
}


def write(kind: str, folder: Path, config: ModelConfig) -> Path:
    copy(RandomSource(config, 3), FORMATS[kind](folder, config))
    return folder


@dataclass
class Counter:
    bytes: int = 0


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts the bytes of tensors that are read from files."""
    counter, preadv = Counter(), os.preadv

    def counting(*arguments: object) -> int:
        done: int = preadv(*arguments)  # type: ignore[arg-type]
        counter.bytes += done
        return done

    monkeypatch.setattr(os, "preadv", counting)
    return counter


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", FORMATS)
def test_parts_are_those_of_the_whole(kind: str, config: ModelConfig, tmp_path: Path) -> None:
    source, expected = open_source(write(kind, tmp_path / "m", config)), RandomSource(config, 3)
    for tensor, pipeline in ((1, 2), (2, 1), (4, 4)):
        layout = Layout(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
        grid = Grid(layout, tensor * pipeline)
        for rank in range(grid.size):
            for shard in held_shards(config, grid, grid.place(rank)):
                values = source.read_part(shard.spec.name, shard.part)
                np.testing.assert_array_equal(values, cut(expected.read(shard.spec.name), shard.part))


@pytest.mark.parametrize("kind", ["hf", "native", "torch"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_reads_its_share_of_the_bytes(kind: str, world: int, tmp_path: Path, read_bytes: Counter) -> None:
    source = open_source(write(kind, tmp_path / "m", UNTIED))
    grid = Grid(Layout(tensor_model_parallel_size=world), world)
    total = 4 * parameter_count(UNTIED)
    for rank in range(world):
        read_bytes.bytes = 0
        held = held_shards(UNTIED, grid, grid.place(rank))
        for shard in held:
            source.read_part(shard.spec.name, shard.part)
        needed = 4 * sum(int(np.prod(shard.shape)) for shard in held)
        copies = 3 * 4 * sum(spec.numel for spec in tensor_table(UNTIED).values() if spec.split.dim is None)
        assert read_bytes.bytes == needed + (copies if kind == "torch" else 0)  # those are compared with each other
        assert total / world < needed < total / world * 1.1


def test_each_rank_checks_its_part_of_a_tied_head(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy(RandomSource(CONFIG, 3), HFSink(tmp_path / "m", CONFIG, "float32", Companions()))
    tensors = load_file(tmp_path / "m/model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "m/model.safetensors")
    source = open_source(tmp_path / "m")
    rows, columns = head.shape
    first, last = (Part(((at, (0, columns)),)) for at in ((0, rows // 2), (rows // 2, rows)))
    np.testing.assert_array_equal(source.read_part(EMBEDDING, first), head[: rows // 2])
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        source.read_part(EMBEDDING, last)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TensorSource]:
    folder = tmp_path_factory.mktemp("parts")
    return {kind: open_source(write(kind, folder / kind, CONFIG)) for kind in FORMATS}


@settings(deadline=None)
@given(st.data())
def test_any_box_of_any_tensor(sources: dict[str, TensorSource], data: st.DataObject) -> None:
    name, spec = data.draw(st.sampled_from(sorted(tensor_table(CONFIG).items())))
    box = tuple(tuple(sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in spec.shape)
    part = Part((box,))
    expected = cut(RandomSource(CONFIG, 3).read(name), part)
    for kind, source in sources.items():
        np.testing.assert_array_equal(source.read_part(name, part), expected, err_msg=kind)
