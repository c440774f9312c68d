"""Converting a Hugging Face folder, compared with `cp -r` of the same folder on the same disk: time, and peak memory.

The model is random bytes in a published shape, in files of at most 5 GB. Each turn writes a folder and removes it.
Both sides end when the bytes are on the disk: a conversion flushes what it publishes, so the copy is flushed too
(`sync -f`). Times are of whole commands, imports included.

    python benchmarks/convert.py --size 0.6B --rounds 3
    python benchmarks/convert.py --size 8B --rounds 1      # needs 33 GB of disk

Targets: at most 1.5x the copy's time to the native format, 2x to Megatron's `torch` format; peak memory at most
1.3x the largest tensor + 1 GB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from tandem.checkpoints.copy import copy
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions, TensorKind
from tandem.models.config import ModelConfig
from tandem.models.published import QWEN3_SIZES, qwen3_config
from tandem.models.tensors import tensor_table
from tandem.parallel.slices import Part


class Noise:
    """Random weights in bfloat16, quickly: every tensor repeats the same random numbers."""

    location = "noise"

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.companions = config, Companions()
        self._table = tensor_table(config)
        self._numbers = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(ml_dtypes.bfloat16)

    def kinds(self) -> tuple[TensorKind, ...]:
        return ("model",)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return self._numbers.dtype

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        return np.resize(self._numbers, self._table[name].shape)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        yield self.read(name, kind)


def write_source(config: ModelConfig, folder: Path) -> None:
    copy(Noise(config), HFSink(folder, config, "bfloat16", Companions()))


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds, and peak memory in bytes, of a command that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{errors}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=QWEN3_SIZES, default="0.6B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    arguments = parser.parse_args()
    config = qwen3_config(arguments.size)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, target = Path(folder, "hf"), Path(folder, "target")
        writer = multiprocessing.Process(target=write_source, args=(config, source))  # its memory is not measured
        writer.start()
        writer.join()
        convert = [sys.executable, "-m", "tandem", "convert", "--no-verify"]
        convert += ["--load-dir", str(source), "--save-dir", str(target)]
        grid = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
        commands = {
            "cp -r": ["sh", "-c", f"cp -r {source} {target} && sync -f {target}"],
            "native": convert,
            "native TP2 PP2": [*convert, *grid],
            "torch": [*convert, "--ckpt-format", "torch"],
            "torch TP2 PP2": [*convert, "--ckpt-format", "torch", *grid],
        }
        turns: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                turns[name].append(measure(command))
                shutil.rmtree(target)
                print(f"{name:>16}: {turns[name][-1][0]:.2f} s, peak {turns[name][-1][1] / 1e9:.2f} GB", flush=True)
    report(config, turns)


def report(config: ModelConfig, turns: dict[str, list[tuple[float, int]]]) -> None:
    table = tensor_table(config)
    largest = 2 * max(spec.numel for spec in table.values())
    print(f"{2 * sum(spec.numel for spec in table.values()) / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
    bound = 1.3 * largest + 1e9
    copied = [seconds for seconds, _ in turns["cp -r"]]
    for name, measured in turns.items():
        seconds, peak = [seconds for seconds, _ in measured], max(peak for _, peak in measured)
        ratios = (f"{choose(seconds) / choose(copied):.2f}x" for choose in (statistics.median, min))
        print(
            f"{name:>16}: median {next(ratios)}, best {next(ratios)} the copy's; "
            f"peak {peak / 1e9:.2f} GB, {peak / bound:.2f} of the bound"
        )


if __name__ == "__main__":
    main()
