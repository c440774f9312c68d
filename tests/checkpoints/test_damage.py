"""Conversions that cannot end well end in an error that says why, and leave nothing behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.conversion.convert import convert
from tandem.conversion.options import ConvertOptions
from tandem.errors import UserError
from tandem.files import publish
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from toys import toy_config


def write_hf(folder: Path, config: ModelConfig, **options: int) -> Path:
    copy(RandomSource(config, 3, "float32"), HFSink(folder, config, "float32", Companions(), **options))
    return folder


def options(load: Path, save: Path, **others: Any) -> ConvertOptions:
    return ConvertOptions(load_dir=str(load), save_dir=str(save), **others)


# --- sources


class Hostile:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def hostile_pickle(folder: Path) -> None:
    import torch

    remove_weights(folder)
    torch.save({"model.norm.weight": Hostile()}, folder / "pytorch_model.bin")


def pickle_of_numbers(folder: Path) -> None:
    import torch

    remove_weights(folder)
    torch.save({"model.norm.weight": [1.0]}, folder / "pytorch_model.bin")


def remove_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def truncate(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-9])


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_shard(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(shard(folder))
    change(tensors)
    save_file(tensors, shard(folder))


def bad_header(folder: Path) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}).encode()
    shard(folder).write_bytes(len(header).to_bytes(8, "little") + header + b"0000")


def not_a_number(folder: Path) -> None:
    edit_shard(folder, lambda tensors: next(iter(tensors.values())).fill(np.nan))


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model-00002-of-\d+\.safetensors: tensor .* truncated or damaged"),
    "missing shard": (lambda folder: shard(folder).unlink(), r"1 of them are missing: model-00002-of-"),
    "missing tensor": (
        lambda folder: edit_shard(folder, lambda tensors: tensors.pop(sorted(tensors)[0])),
        r"compared with model\.safetensors\.index\.json: .*missing: model\.",
    ),
    "extra tensor": (
        lambda folder: edit_shard(folder, lambda tensors: tensors.update(stray=np.zeros(3, np.float32))),
        "left over: stray",
    ),
    "wrong shape": (
        lambda folder: edit_shard(
            folder, lambda tensors: tensors.update({name: value[1:] for name, value in tensors.items()})
        ),
        r"tensor .* has shape \[\d+(, \d+)?\]; the config implies",
    ),
    "not finite": (not_a_number, "holds NaN or infinity"),
    "bad header": (bad_header, f"damaged: the header holds .* for tensor {NORM}"),
    "index outside": (
        lambda folder: edit_index(folder, lambda names: names.update({NORM: "../x.safetensors"})),
        "expected a file in the folder of the index",
    ),
    "index not JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        r"index\.json:1: not valid JSON",
    ),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "holds no weight_map",
    ),
    "no weights": (remove_weights, "holds no weights"),
    "hostile pickle": (hostile_pickle, "refused: the file asks for .*system.*No code was run"),
    "no tensors": (pickle_of_numbers, rf"{NORM} is a list; expected a tensor"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_hugging_face_folders(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_hf(tmp_path / "hf", toy_config(), shard_bytes=50_000)
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(UserError, match=message):
        convert(options(folder, tmp_path / "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# --- targets


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount(["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)])
    yield place
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=False, capture_output=True)
    subprocess.run(["umount", str(place)], check=True)


def mount(words: list[str]) -> None:
    try:
        subprocess.run(["mount", *words], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this process may not mount: {error}")


@pytest.fixture(scope="module")
def two_megabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("large") / "hf", toy_config(vocab_size=8000))


TARGETS: list[dict[str, Any]] = [{"ckpt_format": "native"}, {"ckpt_format": "torch"}]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_disk_too_small_is_known_before_writing(
    target: dict[str, Any], small_disk: Path, two_megabytes: Path
) -> None:
    with pytest.raises(UserError, match=r"disk/m(/iter_0000001)? needs 2 MB and the disk has 1 MB free"):
        convert(options(two_megabytes, small_disk / "m", **target))
    assert not any(small_disk.iterdir())


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_disk_that_fills_up_meanwhile(
    target: dict[str, Any], small_disk: Path, two_megabytes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("native", "megatron"):
        monkeypatch.setattr(f"tandem.checkpoints.{module}.sink.check_free_space", lambda *_: None)
    with pytest.raises(UserError, match=r"to .*/disk/m: .*No space left on device; nothing was kept"):
        convert(options(two_megabytes, small_disk / "m", **target))
    assert not any(small_disk.iterdir())


@pytest.mark.parametrize("target", [*TARGETS, {"save_model_type": "hf", "load_model_type": "random"}], ids=str)
def test_an_empty_mount_point_is_a_target(target: dict[str, Any], small_disk: Path, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", toy_config())
    convert(options(source, small_disk, **target))
    assert open_source(small_disk).config == toy_config()
    assert not list(small_disk.rglob(f"{publish.TEMPORARY}*"))
    with pytest.raises(UserError, match="is not an empty folder"):
        convert(options(source, small_disk, **{**target, "save_model_type": "mg"}))


def test_a_read_only_target(small_disk: Path, tmp_path: Path) -> None:
    mount(["-o", "remount,ro", str(small_disk)])
    with pytest.raises(UserError, match=r"cannot write to .*: Read-only file system"):
        convert(options(write_hf(tmp_path / "hf", toy_config()), small_disk / "m"))


def test_what_a_check_raises_keeps_the_result_from_appearing(tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise UserError("no")

    folder = write_hf(tmp_path / "hf", toy_config())
    for number, others in enumerate([*TARGETS, {"save_model_type": "hf", "load_model_type": "random"}]):
        with pytest.raises(UserError, match="no"):
            convert(options(folder, tmp_path / str(number), **others), check=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow("kills")
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_killed_at_any_moment(target: dict[str, Any], tmp_path: Path) -> None:
    """The target is absent or whole, and a second run needs no cleaning up."""
    folder = write_hf(tmp_path / "hf", toy_config(vocab_size=20_000))
    save = tmp_path / "m"
    script = (
        "from tandem.conversion.convert import convert\n"
        "from tandem.conversion.options import ConvertOptions\n"
        "print('ready', flush=True)\n"
        f"convert(ConvertOptions(load_dir={str(folder)!r}, save_dir={str(save)!r}, **{target!r}))"
    )
    moments = random.Random(5)
    survivors = 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if save.exists():
            survivors += 1
            assert_whole(save, folder)
            save.rename(tmp_path / f"m{survivors}")
    convert(options(folder, save, **target))
    assert_whole(save, folder)
    assert not list(tmp_path.glob(f"{publish.TEMPORARY}*"))


def assert_whole(save: Path, folder: Path) -> None:
    actual, expected = open_source(save), open_source(folder)
    for name in tensor_table(expected.config):
        assert actual.read(name).tobytes() == expected.read(name).tobytes()


# --- memory


STAGES = {"ckpt_format": "torch", "target_pipeline_parallel_size": 2}


@pytest.mark.slow("sizes")
@pytest.mark.parametrize("target", [*TARGETS, STAGES], ids=str)
def test_memory_is_bounded_by_the_largest_tensors(target: dict[str, Any], tmp_path: Path) -> None:
    """A model of many tensors in several files: the peak is a few of the largest, far below the model."""
    config = toy_config(
        num_layers=24, hidden_size=512, ffn_hidden_size=4096, vocab_size=4096, num_query_groups=6, kv_channels=32
    )
    folder = write_hf(tmp_path / "hf", config, shard_bytes=50_000_000)
    sizes = [4 * spec.numel for spec in tensor_table(config).values()]
    script = (
        "import resource; from tandem.conversion.convert import convert\n"
        "from tandem.conversion.options import ConvertOptions\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        f"convert(ConvertOptions(load_dir={str(folder)!r}, save_dir={str(tmp_path / 'm')!r}, **{target!r}))\n"
        "print(peak() - before)"
    )
    used = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)
    assert len(list(folder.glob("*.safetensors"))) > 8
    shutil.rmtree(tmp_path)  # pytest would keep it
    assert sum(sizes) > 20 * max(sizes)
    assert used < 5 * max(sizes), f"{used / 1e6:.0f} MB for tensors of {max(sizes) / 1e6:.0f} MB"
