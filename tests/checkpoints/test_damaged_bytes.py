"""Whatever bytes a checkpoint is damaged in, reading it ends in a UserError or in the right tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distributed_toys
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.hf.weights import TORCH_SINGLE
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.checkpoints.megatron.sink import MegatronSink
from tandem.checkpoints.native.sink import NativeSink
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.models.tensors import tensor_table
from tandem.parallel.layout import Layout
from toys import toy_config

CONFIG = toy_config(num_layers=2, hidden_size=16, ffn_hidden_size=24, vocab_size=32, kv_channels=8)
LAYOUT = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def write_hf(folder: Path) -> None:
    copy(RandomSource(CONFIG, 3), HFSink(folder, CONFIG, "float32", Companions(), shard_bytes=8_000))


def write_bin(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    write_hf(folder)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(tensors, folder / TORCH_SINGLE)


def write_native(folder: Path) -> None:
    copy(RandomSource(CONFIG, 3), NativeSink(folder, CONFIG, LAYOUT, {"model": "float32"}, 7, Companions()))


def write_megatron(folder: Path) -> None:
    copy(RandomSource(CONFIG, 3), MegatronSink(folder, CONFIG, LAYOUT, "float32"))


def write_torch_dist(folder: Path) -> None:
    distributed_toys.write(folder, distributed_toys.stacked(RandomSource(CONFIG, 3)), RandomSource(CONFIG, 3))


FORMATS: dict[str, Callable[[Path], None]] = {
    "hf": write_hf,
    "bin": write_bin,
    "native": write_native,
    "torch": write_megatron,
    "torch_dist": write_torch_dist,
}


def recorded(kind: str, path: Path) -> int:
    """How many of a file's bytes something else in the checkpoint contradicts when they change.

    Hugging Face's safetensors have no checksums: a number that becomes another is not noticed."""
    if kind == "hf" and path.suffix == ".safetensors":
        return 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size


@st.composite
def damage(draw: st.DrawFn, content: bytes, size: int) -> bytes:
    """A few bytes exchanged or taken out among the first `size`, or the end cut off."""
    if draw(st.integers(0, 4)) == 0:
        return content[: draw(st.integers(0, size - 1))]
    changed = bytearray(content)
    likely = st.one_of(st.binary(min_size=1, max_size=2), st.sampled_from([b"0", b"-", b"9", b'"', b"e", b" ", b""]))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, size - 1))
        changed[place : place + 1] = draw(likely)
    return bytes(changed)


@pytest.fixture(scope="module", params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("damage") / request.param
    FORMATS[request.param](folder)
    return request.param, folder


def assert_read(source: TensorSource) -> None:
    for name in tensor_table(CONFIG):
        expected = RandomSource(CONFIG, 3).read(name)
        actual = source.read(name)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.tobytes() == expected.tobytes(), name


@settings(deadline=None, max_examples=150, derandomize=True)
@given(data=st.data())
def test_damage_is_found_or_does_not_matter(checkpoint: tuple[str, Path], data: st.DataObject) -> None:
    kind, folder = checkpoint
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    content = path.read_bytes()
    path.write_bytes(data.draw(damage(content, recorded(kind, path))))
    try:
        assert_read(open_source(folder))
    except UserError:
        pass
    finally:
        path.write_bytes(content)
