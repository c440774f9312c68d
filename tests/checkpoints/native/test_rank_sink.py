"""Many ranks save one iteration: each its own slices, all of it or none; any layout reads it back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ranks import Room
from tandem.checkpoints.interface import Companions, TensorKind
from tandem.checkpoints.native.rank_sink import NativeRankSink
from tandem.checkpoints.native.source import NativeSource
from tandem.checkpoints.random_init import RandomSource
from tandem.conversion.convert import with_one_dtype
from tandem.errors import UserError
from tandem.models.tensors import tensor_table
from tandem.parallel.grid import Grid, held_shards, saved_shards
from tandem.parallel.layout import Layout, even_rows
from tandem.parallel.slices import cut
from toys import toy_config

KINDS: dict[TensorKind, str] = {"model": "float32", "exp_avg": "float32", "exp_avg_sq": "float32"}
OPTIMIZER: tuple[TensorKind, ...] = ("exp_avg", "exp_avg_sq")
CONFIG = toy_config(num_layers=4)
GRID = Grid(Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), size=8)


def value_of(kind: TensorKind, name: str) -> np.ndarray:
    return RandomSource(CONFIG, {"model": 1, "master": 2, "exp_avg": 3, "exp_avg_sq": 4}[kind]).read(name)


def save(
    folder: Callable[[int], Path],
    *,
    by_rows: Collection[TensorKind],
    per_machine: int = 8,
    break_rank: int | None = None,
) -> list[BaseException | None]:
    """All ranks save; the error that each ended with."""
    room = Room(GRID.size)

    def rank_saves(rank: int) -> BaseException | None:
        communicator = room.communicator(rank, per_machine)
        try:
            sink = NativeRankSink(
                folder(rank),
                CONFIG,
                GRID,
                KINDS,
                7,
                Companions(),
                {"note.json": "{}"},
                communicator,
                by_rows=by_rows,
                shared_storage=per_machine == GRID.size,
            )
            failure: Exception | None = None
            try:
                for kind in KINDS:
                    first = rank - rank % per_machine
                    for shard in saved_shards(CONFIG, GRID, rank, by_rows=kind in by_rows, first_rank=first):
                        if rank == break_rank and kind == "exp_avg":
                            raise OSError(28, "No space left on device")
                        sink.write_part(kind, shard, cut(value_of(kind, shard.spec.name), shard.part))
                sink.finish()
            except OSError as error:
                failure = error
            sink.publish(failure)
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(GRID.size) as pool:
        return list(pool.map(rank_saves, range(GRID.size)))


@pytest.mark.parametrize("by_rows", [(), OPTIMIZER, KINDS], ids=["nothing", "optimizer", "everything"])
def test_what_ranks_save_is_read_whole(tmp_path: Path, by_rows: Collection[TensorKind]) -> None:
    assert save(lambda rank: tmp_path, by_rows=by_rows) == [None] * GRID.size
    source = NativeSource(tmp_path)
    assert source.layout == GRID.layout
    for kind in KINDS:
        for name in tensor_table(CONFIG):
            np.testing.assert_array_equal(source.read(name, kind), value_of(kind, name), err_msg=f"{kind} {name}")
    files = {path.name for path in (tmp_path / "iter_0000007/mp_rank_01_001").iterdir()}
    beyond_the_first = {"model_001.safetensors" for kind in by_rows if kind == "model"}
    beyond_the_first |= {"optimizer_001.safetensors" for kind in by_rows if kind != "model"}
    assert files == {"model.safetensors", "optimizer.safetensors"} | beyond_the_first


def test_a_trainers_weights_alone_are_converted(tmp_path: Path) -> None:
    """Also in the dtype they have: an engine prefers masters where it finds them, and a conversion writes none."""
    save(lambda rank: tmp_path, by_rows=())
    source = NativeSource(tmp_path)
    assert len(source.kinds()) == 3
    assert with_one_dtype(source, None).kinds() == with_one_dtype(source, "fp32").kinds() == ("model",)


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    errors = save(lambda rank: tmp_path, by_rows=OPTIMIZER, break_rank=5)
    assert all("rank 5: OSError: [Errno 28] No space left on device" in str(error) for error in errors)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_fails_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    errors = save(lambda rank: tmp_path / "file", by_rows=())
    assert all("rank 0: cannot write to" in str(error) for error in errors)


@pytest.mark.parametrize("by_rows", [(), OPTIMIZER], ids=["nothing", "optimizer"])
@pytest.mark.parametrize("per_machine", [1, 2, 4])
def test_without_shared_storage_a_machine_keeps_all_that_its_ranks_hold(
    tmp_path: Path, per_machine: int, by_rows: Collection[TensorKind]
) -> None:
    """Whatever axis of the grid lies between machines: replicated weights, the tied head, and other data ranks' weights
    are on each machine that needs them, and each can resume with what it has."""
    machines = [tmp_path / str(number) for number in range(GRID.size // per_machine)]
    errors = save(lambda rank: machines[rank // per_machine], by_rows=by_rows, per_machine=per_machine)
    assert errors == [None] * GRID.size
    for rank in range(GRID.size):
        source, place = NativeSource(machines[rank // per_machine]), GRID.place(rank)
        for kind in KINDS:
            for shard in held_shards(CONFIG, GRID, place):
                name, part = shard.spec.name, shard.part
                if kind in by_rows:
                    part = part.rows(*even_rows(part.shape[0], GRID.data_size, place.data))
                values = source.read_part(name, part, kind)
                np.testing.assert_array_equal(values, cut(value_of(kind, name), part), err_msg=name)
    with pytest.raises(UserError, match="another machine holds"):
        NativeSource(machines[0]).read("decoder.final_layernorm.weight")
