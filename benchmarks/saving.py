"""What a save costs: training's wait compared with a step, the speed of `dd`, and loading compared with reading.

    python benchmarks/saving.py --layers 4                # 0.2B parameters, 7 GB of memory, 6 GB of disk
    python benchmarks/saving.py --layers 28               # 0.6B, 18 GB and 17 GB

Weights are random and fp32, with Adam's moments: 12 bytes per parameter. Each round saves at once, then `dd` writes as
many zeros and flushes them; then a checkpoint is saved in the background while steps go on; then the files are read, by
`cat` and by loading, each after the files were dropped from the disk's cache.

Targets: in the background, training waits for less than a step; 70 % of dd's speed; loading takes 1.5x the time of
reading.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from weights import mean_weights

from tandem.backends import create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.checkpoints.folders import find_iteration
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.native.source import NativeSource
from tandem.checkpoints.random_init import RandomSource
from tandem.config.parsing import from_dict, to_yaml
from tandem.data.batch import MicroBatch
from tandem.launch.world import SingleProcess
from tandem.models.config import ModelConfig
from tandem.models.published import qwen3_config
from tandem.models.tensors import parameter_count
from tandem.parallel.grid import Grid
from tandem.training.logs.events import EventLog
from tandem.training.progress import Progress
from tandem.training.saving.writer import CheckpointWriter, RunDescription


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ai-framework", default="torch")
    parser.add_argument("--size", default="0.6B")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to be measured; default: the temporary folder's")
    arguments = parser.parse_args()
    config = dataclasses.replace(qwen3_config(arguments.size), num_layers=arguments.layers)
    engine = create_engine(arguments.ai_framework, config, EngineSettings(device="cpu"))
    engine.load_weights(RandomSource(config, 0))
    nbytes = 12 * parameter_count(config)
    print(f"{parameter_count(config):,} parameters, {nbytes / 1e9:.2f} GB a checkpoint")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(engine, batch(config, arguments.seq_length), Path(folder), nbytes, arguments.rounds)


def measure(engine: Engine, micro_batch: MicroBatch, folder: Path, nbytes: int, rounds: int) -> None:
    step = lambda: engine.train_step([micro_batch], mean_weights([micro_batch]), 1e-5, 0.1)  # noqa: E731
    step()
    figures: dict[str, list[float]] = {}

    def note(what: str, act: Callable[[], object]) -> float:
        figures.setdefault(what, []).append(seconds(act))
        return figures[what][-1]

    at_once, behind = writer(engine, folder / "once", False), writer(engine, folder / "behind", True)
    for number in range(1, rounds + 1):
        note("step", step)
        note("save", lambda n=number: at_once.save(Progress(n)))  # type: ignore[misc]
        note("dd", lambda: write_zeros(folder / "zeros", nbytes))
        waited = seconds(lambda n=number: behind.save(Progress(n)))  # type: ignore[misc]
        while not behind.is_written:
            note("step while saving", step)
        figures.setdefault("wait", []).append(waited + seconds(behind.publish))
        path = find_iteration(folder / "once")
        note("cat", lambda p=path: read(p))  # type: ignore[misc]
        note("load", lambda p=path: load(engine, p))  # type: ignore[misc]
        for kept in ("once", "behind"):
            shutil.rmtree(find_iteration(folder / kept))
    for case, timings in figures.items():
        print(f"{case:>20}: {', '.join(f'{second:.2f}' for second in timings)} s")
    middle = {case: statistics.median(timings) for case, timings in figures.items()}
    print(f"training waits {middle['wait'] / middle['step']:.2f}x a step (the first time {figures['wait'][0]:.2f} s)")
    print(f"saving at {middle['dd'] / middle['save']:.0%} of dd's {nbytes / middle['dd'] / 1e6:,.0f} MB/s")
    print(f"loading takes {middle['load'] / middle['cat']:.2f}x the time of cat")


def writer(engine: Engine, folder: Path, async_save: bool) -> CheckpointWriter:
    settings = from_dict({"async_save": async_save, "save": str(folder)}, "benchmark")
    description = RunDescription(
        settings=to_yaml(settings), seed=settings.training.seed, data={}, template=None, companions=Companions()
    )
    return CheckpointWriter(
        folder, settings.checkpoint, description, engine, Grid(), SingleProcess(), EventLog(None), by_rows=()
    )


def batch(config: ModelConfig, length: int) -> MicroBatch:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, length + 1).astype(np.int32)
    return MicroBatch(tokens[:-1], tokens[1:], np.arange(length, dtype=np.int32), np.array([0, length], np.int32))


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        act()
    return time.perf_counter() - start


def write_zeros(path: Path, nbytes: int) -> None:
    count = str(nbytes // (1 << 24))
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={count}", "conv=fsync"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    path.unlink()


def read(folder: Path) -> None:
    files = forgotten(folder)
    subprocess.run(["cat", *map(str, files)], check=True, stdout=subprocess.DEVNULL)


def load(engine: Engine, folder: Path) -> None:
    forgotten(folder)
    source = NativeSource(folder.parent)
    engine.load_weights(source)
    engine.load_optimizer(source, 1)


def forgotten(folder: Path) -> list[Path]:
    """The tensor files of a checkpoint, after their pages were dropped from memory."""
    files = sorted(folder.rglob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return files


if __name__ == "__main__":
    main()
