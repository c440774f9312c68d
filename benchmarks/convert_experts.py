"""Converting a mixture of experts in Qwen3-30B-A3B's shape, there and back, compared with `cp -r` of the same bytes.

The weights are random, no two tensors alike, and written one block after the other. Each turn converts the folder to a
layout of Megatron's, and that back to Hugging Face's. It prints

- the time of both, each against a flushed `cp -r` of what it reads, in the same turn; in brackets the processor's. All
  begin without a page of these files in memory,
- their peak memory: what is private (RssAnon and RssShmem, seen every 10 ms), which holds no page of a file; and all
  that was resident, with the pages of libraries,
- whether every byte of the weights came back.

    python benchmarks/convert_experts.py --layers 1
    python benchmarks/convert_experts.py --layers 4 --grids 2x4 --folder /data      # needs 19 GB of disk
    python benchmarks/convert_experts.py --layers 1 --verify --only grouped         # logits, too: 12 GB of memory

Target: at most 1.5x the copy's time, and memory for a few experts: of 9 MiB each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from tandem.checkpoints.copy import copy
from tandem.checkpoints.formats.arrays import row_blocks
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions, TensorKind
from tandem.models.config import ModelConfig
from tandem.models.published import QWEN3_MOE_SIZES, qwen3_config
from tandem.models.tensors import parameter_count, tensor_table
from tandem.parallel.slices import Part

FORMS = {
    "sequential": ["--ckpt-format", "torch"],
    "grouped": ["--ckpt-format", "torch", "--moe-grouped-gemm"],
    "te": ["--ckpt-format", "torch", "--moe-grouped-gemm", "--transformer-impl", "transformer_engine"],
    "native": [],
}
GRIDS = ["1x1", "2x1", "1x4", "2x4"]  # tensor ranks x expert ranks


class Noise:
    """Normal numbers in bfloat16, from random bytes: each pair of bytes chooses one of 65,536 numbers."""

    location = "noise"

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.companions = config, Companions()
        self._table, self._random = tensor_table(config), np.random.default_rng(0)
        numbers = 0.02 * self._random.standard_normal(1 << 16, np.float32)
        self._numbers = numbers.astype(ml_dtypes.bfloat16).view(np.uint16)

    def dtype(self, name: str, kind: TensorKind = "model") -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        for first, last in row_blocks(part.shape, self.dtype(name)):
            shape = (last - first, *part.shape[1:])
            chosen = self._numbers[self._random.integers(0, 1 << 16, shape, np.uint16)].view(ml_dtypes.bfloat16)
            yield chosen if len(shape) > 1 else (1 + chosen.astype(np.float32)).astype(ml_dtypes.bfloat16)


def write_source(config: ModelConfig, folder: Path) -> None:
    copy(Noise(config), HFSink(folder, config, "bfloat16", Companions()))


@dataclass(frozen=True)
class Turn:
    """Seconds of a command, and its peak memory in bytes: all that was resident, and what was private."""

    seconds: float
    processor: float
    resident: int
    private: int

    def __str__(self) -> str:
        return f"{self.seconds:5.1f} s ({self.processor:.1f} s)"

    @property
    def memory(self) -> str:
        return f"{self.private / 1e6:.0f} MB private, {self.resident / 1e6:.0f} MB resident"


def measure(command: list[str]) -> Turn:
    """Run a command that must succeed."""
    start, private = time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            private = max(private, private_bytes(process.pid))
            time.sleep(0.01)
        if ended[1]:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{errors.read().decode()}")
    seconds, usage = time.perf_counter() - start, ended[2]
    return Turn(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, private)


def private_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    fields = (line.split() for line in status.splitlines())
    return sum(int(words[1]) * 1024 for words in fields if words[0] in ("RssAnon:", "RssShmem:"))


def same_files(left: Path, right: Path) -> bool:
    """Whether two folders have the same weights, byte for byte, and the same config."""
    names = sorted(path.name for path in left.glob("*.safetensors*"))
    if names != sorted(path.name for path in right.glob("*.safetensors*")):
        return False
    same = all(subprocess.run(["cmp", "-s", left / name, right / name]).returncode == 0 for name in names)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (left, right)]
    return same and configs[0] == configs[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=QWEN3_MOE_SIZES, default="30B-A3B")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--only", choices=FORMS, nargs="+", default=list(FORMS), help="layouts of experts")
    parser.add_argument("--grids", choices=GRIDS, nargs="+", default=GRIDS, help="tensor ranks x expert ranks")
    parser.add_argument("--verify", action="store_true", help="compare logits, in both directions")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    arguments = parser.parse_args()
    config = replace(qwen3_config(arguments.size), num_layers=arguments.layers)
    print(f"{2 * parameter_count(config) / 1e9:.2f} GB, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        writer = multiprocessing.Process(target=write_source, args=(config, Path(folder, "hf")))
        writer.start()  # its memory is not measured
        writer.join()
        for form in arguments.only:
            for ranks in arguments.grids:
                tensor, expert = ranks.split("x")
                grid = ["--target-tensor-parallel-size", tensor, "--target-expert-parallel-size", expert]
                print(f"{form} TP{tensor} EP{expert}", flush=True)
                turn(Path(folder), [*FORMS[form], *grid], "--verify" if arguments.verify else "--no-verify")


def turn(folder: Path, options: list[str], verify: str) -> None:
    """A conversion and the way back, each after a copy of what it reads."""
    source, there, back, copy_of = folder / "hf", folder / "there", folder / "back", folder / "copy"
    convert = [sys.executable, "-m", "tandem", "convert", verify]
    for name, read, command in (
        ("there", source, [*convert, str(source), str(there), *options]),
        ("back", there, [*convert, str(there), str(back), "--load-model-type", "mg", "--save-model-type", "hf"]),
    ):
        forget(read)
        copied = measure(["sh", "-c", f"cp -r {read} {copy_of} && sync -f {copy_of}"])
        shutil.rmtree(copy_of)
        forget(read)
        measured = measure(command)
        ratio = f"{measured.seconds / copied.seconds:.2f}x the copy's {copied}"
        print(f"  {name:5} {measured}, {ratio}; {measured.memory}", flush=True)
    print(f"  {'every byte came back' if same_files(source, back) else 'DIFFERENT'}, load {os.getloadavg()[0]:.1f}")
    shutil.rmtree(there)
    shutil.rmtree(back)


def forget(folder: Path) -> None:
    """Drop the pages of a folder's files from memory."""
    for path in folder.rglob("*.*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
