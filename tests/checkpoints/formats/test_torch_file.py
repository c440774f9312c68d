"""torch's files without torch: what either side writes, the other reads; hostile and damaged files are refused."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import os
import signal
import subprocess
import sys
import tracemalloc
import types
import uuid
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tandem.checkpoints.formats.torch_names import STORAGES
from tandem.checkpoints.formats.torch_reader import LazyTensor, load
from tandem.checkpoints.formats.torch_writer import ALIGNMENT, PendingTensor, TorchFileWriter
from tandem.checkpoints.formats.unpickler import Inert
from tandem.errors import UserError

torch = pytest.importorskip("torch")

BF16 = np.dtype(ml_dtypes.bfloat16)
SCALARS = {
    "small": 5,
    "negative": -7,
    "large": 1 << 40,
    "huge": -(10**30),
    "float": 0.1,
    "none": None,
    "flags": [True, False],
    "tuple": (1, "ü", ()),
    "nested": {"empty": {}, "list": [[], [1.5]]},
    3: "an integer key",
}


def as_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor's bits."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy() if tensor.dim() else tensor.numpy()


def archive_with(path: Path, data: bytes, **entries: bytes) -> Path:
    """A torch file around a given pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        for name, value in entries.items():
            archive.writestr(f"m/{name.replace('__', '/')}", value)
    return path


def write_example(path: Path) -> dict[str, np.ndarray]:
    """A file with a tensor of every supported dtype and odd shapes, written in reverse order."""
    random = np.random.default_rng(0)
    tensors = {name: (10 * random.standard_normal((3, 5))).astype(dtype) for name, dtype in STORAGES.items()}
    tensors["scalar"] = np.array(7, np.int64)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    pending = OrderedDict((name, PendingTensor(t.dtype, t.shape)) for name, t in tensors.items())
    with TorchFileWriter(path, {"args": argparse.Namespace(x=1, y="z"), "model": pending, **SCALARS}) as writer:
        for name in reversed(tensors):
            writer.write(pending[name], tensors[name])
    return tensors


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_torch_reads_what_is_written(tmp_path: Path, weights_only: bool, mmap: bool) -> None:
    tensors = write_example(tmp_path / "model_optim_rng.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "model_optim_rng.pt", weights_only=weights_only, mmap=mmap)
    assert vars(content["args"]) == {"x": 1, "y": "z"}
    assert type(content["model"]) is OrderedDict
    assert {key: content[key] for key in SCALARS} == SCALARS
    assert list(content["model"]) == list(tensors)
    for name, expected in tensors.items():
        tensor = content["model"][name]
        assert tensor.shape == expected.shape
        assert STORAGES.get(name) is None or str(tensor.dtype).removeprefix("torch.") == expected.dtype.name
        assert as_numpy(tensor).tobytes() == expected.tobytes()


def test_a_file_without_args_needs_no_allowed_globals(tmp_path: Path) -> None:
    pending = PendingTensor(np.dtype(np.float32), (2,))
    with TorchFileWriter(tmp_path / "m.pt", {"model": OrderedDict(w=pending)}) as writer:
        writer.write(pending, np.array([1, 2], np.float32))
    assert torch.load(tmp_path / "m.pt", weights_only=True)["model"]["w"].tolist() == [1, 2]


def test_entries_are_stored_aligned_and_with_their_crc(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    write_example(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        entries = archive.infolist()
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
    for tensor in load(path)["model"].values():
        assert tensor.storage.start % ALIGNMENT == 0


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_example(tmp_path / folder / "m.pt")
    assert (tmp_path / "a" / "m.pt").read_bytes() == (tmp_path / "b" / "m.pt").read_bytes()


def test_it_reads_what_it_writes(tmp_path: Path) -> None:
    tensors = write_example(tmp_path / "m.pt")
    content = load(tmp_path / "m.pt")
    assert {key: content[key] for key in SCALARS} == SCALARS
    for name, expected in tensors.items():
        tensor = content["model"][name].read(name)
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert tensor.tobytes() == expected.tobytes()


def test_several_writers_are_open_at_once(tmp_path: Path) -> None:
    pending = [PendingTensor(BF16, (4,)) for _ in range(3)]
    writers = [TorchFileWriter(tmp_path / f"{rank}.pt", [pending[rank]]) for rank in range(3)]
    for rank in (2, 0, 1):
        writers[rank].write(pending[rank], np.full(4, rank, BF16))
    for writer in writers:
        writer.close()
    for rank in range(3):
        assert torch.load(tmp_path / f"{rank}.pt")[0].tolist() == [rank] * 4


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_it_reads_what_torch_writes(tmp_path: Path, protocol: int) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with attributes
    tensors = {
        "contiguous": base,
        "transposed": base.T,
        "rows": base[1:3],  # shares the storage of the others
        "columns": base[:, 1::2],
        "expanded": base[0:1].expand(3, 6),
        "bfloat16": base.bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base * 2),
        "bools": base > 5,
        "weight": state["weight"],
    }
    model: dict[str, Any] = defaultdict(dict)
    model.update(tensors)
    content = {
        "model": model,
        "state": state,
        "args": argparse.Namespace(noop={0, 7}, dtype=torch.bfloat16, stop=signal.SIGTERM, path=Path("/x")),
        "simple": types.SimpleNamespace(a=1),
        "rng_state": [{"np_rng_state": np.random.default_rng(0).bytes(3), "torch": torch.get_rng_state()}],
        "numpy": (np.random.RandomState(0).get_state(), np.float64(2.5)),
        "device": torch.device("cpu"),
        "size": base.shape,
    }
    torch.save(content, tmp_path / "m.pt", pickle_protocol=protocol)
    loaded = load(tmp_path / "m.pt")
    assert list(loaded["model"]) == list(tensors)
    for name, expected in tensors.items():
        array = loaded["model"][name].read(name)
        assert array.shape == tuple(expected.shape)
        assert array.tobytes() == as_numpy(expected.detach()).tobytes()
    assert (loaded["args"].noop, loaded["args"].dtype) == ({0, 7}, "torch.bfloat16")
    assert loaded["simple"].a == 1
    assert loaded["size"] == (4, 6)
    assert isinstance(loaded["rng_state"][0]["torch"], LazyTensor)


def test_files_without_crc_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load(tmp_path / "m.pt")["w"].read("w").tolist() == [1, 1, 1]


class Options(dict):
    """A class of a trainer's own."""

    def __init__(self, **values: object) -> None:
        super().__init__(values)
        self.more = [1]

    def method(self) -> None: ...


@pytest.mark.parametrize("protocol", [2, 4])
def test_harmless_objects_of_trainers_are_stood_in_for(tmp_path: Path, protocol: int) -> None:
    """Functions, partials, ranges, classes and objects of the trainer's own: nothing of them is imported or called."""
    args = argparse.Namespace(
        num_layers=4,
        activation=torch.nn.functional.silu,
        approximated=functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        init_method=torch.nn.init.xavier_uniform_,
        builtin=torch._C._nn.gelu,
        module=torch.nn.Linear(2, 3),
        steps=range(3),
        part=slice(1, 2),
        started=datetime.datetime(2026, 1, 1),
        waits=datetime.timedelta(1),
        queue=collections.deque([1, 2]),
        counts=collections.Counter("aab"),
        own=Options(a=1),
        own_class=Options,
        own_function=as_numpy,
        kind=int,
        stop=signal.Signals.SIGUSR1,
        identity=uuid.UUID(int=3),
    )
    torch.save({"args": args, "model": {"w": torch.ones(2)}}, tmp_path / "m.pt", pickle_protocol=protocol)
    loaded = load(tmp_path / "m.pt")
    assert loaded["args"].num_layers == 4
    assert loaded["model"]["w"].read("w").tolist() == [1, 1]
    for name, value in vars(loaded["args"]).items():
        kind = value if isinstance(value, type) else type(value)
        assert name == "num_layers" or issubclass(kind, Inert), name


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    write_example(whole)
    data = whole.read_bytes()
    for length in [*range(0, len(data), 97), len(data) - 1]:
        (tmp_path / "m.pt").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"m\.pt"):
            load(tmp_path / "m.pt")


def test_random_damage_in_the_pickle_raises_nothing_but_user_errors(tmp_path: Path) -> None:
    """Behind a CRC that fits, as a hostile writer would have it."""
    write_example(tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        entries = {name.removeprefix("m/").replace("/", "__"): archive.read(name) for name in archive.namelist()}
    data = entries.pop("data.pkl")
    random, refused = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in random.integers(len(data), size=3):
            damaged[place] = random.integers(256)
        try:
            load(archive_with(tmp_path / "damaged.pt", bytes(damaged), **entries))
        except UserError:
            refused += 1
    assert refused > 200  # the others changed a string or a number


def test_random_damage_in_the_directory_raises_nothing_but_user_errors(tmp_path: Path) -> None:
    tensors = write_example(tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    directory = zipfile.ZipFile(tmp_path / "m.pt").start_dir
    random, refused = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in random.integers(directory, len(data), size=3):
            damaged[place] = random.integers(256)
        (tmp_path / "m.pt").write_bytes(damaged)
        try:
            for name, tensor in load(tmp_path / "m.pt")["model"].items():
                assert tensor.read(name).tobytes() == tensors[name].tobytes()
        except UserError:
            refused += 1
    assert refused > 200  # the others changed a time stamp or a permission


def test_a_flipped_bit_is_noticed_and_the_tensor_named(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    write_example(path)
    start = load(path)["model"]["HalfStorage"].storage.start
    data = bytearray(path.read_bytes())
    data[start + 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"m\.pt: tensor decoder\.w is damaged: its CRC"):
        load(path)["model"]["HalfStorage"].read("decoder.w")
    data[data.index(b"FloatStorage")] ^= 1  # in data.pkl
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"m\.pt: tensor data\.pkl is damaged"):
        load(path)


def test_rows_in_any_order_are_those_of_the_file_and_checked(tmp_path: Path) -> None:
    array = np.arange(40, dtype=np.float32).reshape(8, 5)
    pending = PendingTensor(array.dtype, array.shape)
    with TorchFileWriter(tmp_path / "x.pt", {"w": pending}) as writer:
        writer.write(pending, array)
    stored = load(tmp_path / "x.pt")["w"]

    def read(*places: tuple[int, int]) -> None:
        rows = stored.rows("w")
        for first, last in places:
            np.testing.assert_array_equal(rows.read(first, last), array[first:last])
        rows.close()

    for places in ([(0, 8)], [(2, 3), (6, 7)], [(5, 8), (0, 1)], []):
        read(*places)
    damaged = (tmp_path / "x.pt").read_bytes().replace(array[3].tobytes(), array[4].tobytes())
    (tmp_path / "x.pt").write_bytes(damaged)
    for places in ([(0, 2)], [(6, 7)], [(5, 8), (0, 1)], []):
        with pytest.raises(UserError, match="tensor w is damaged: its CRC"):
            read(*places)


def test_a_file_cut_after_loading_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    write_example(path)
    tensor = load(path)["model"]["FloatStorage"]
    os.truncate(path, tensor.storage.start + 8)
    with pytest.raises(UserError, match=r"m\.pt: tensor w is cut short"):
        tensor.read("w")


def test_other_formats_are_named(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old\.pt: .*before version 1\.6.*Save it again"):
        load(tmp_path / "old.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pt: not a file that torch\.save wrote"):
        load(tmp_path / "text.pt")
    with pytest.raises(UserError, match=r"absent\.pt: cannot be read: No such file"):
        load(tmp_path / "absent.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(UserError, match=r"other\.pt: a zip file, but not one that torch\.save wrote"):
        load(tmp_path / "other.pt")
    with pytest.raises(UserError, match="big"):
        load(archive_with(tmp_path / "big.pt", b"\x80\x02N.", byteorder=b"big"))
    with zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02N.")
    with pytest.raises(UserError, match=r"m/data\.pkl is compressed"):
        load(tmp_path / "deflated.pt")


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Writing and reading a file hold no more than the tensor at hand."""
    numel, count = 1 << 20, 8
    pending = {str(i): PendingTensor(np.dtype(np.float32), (numel // 16, 16)) for i in range(count)}
    tracemalloc.start()
    try:
        with TorchFileWriter(tmp_path / "m.pt", pending) as writer:
            for i, item in enumerate(pending.values()):
                writer.write(item, np.full(item.shape, i, np.float32))
        for i, tensor in enumerate(load(tmp_path / "m.pt").values()):
            assert tensor.read("w")[0, 0] == i
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * 4 * numel  # two while the next one is made before the last is let go


def test_reading_and_writing_import_no_framework() -> None:
    code = "import sys, tandem.checkpoints.megatron.source; sys.exit(bool({'torch', 'mindspore'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
