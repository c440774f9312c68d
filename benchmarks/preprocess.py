"""Preprocessing, compared with Megatron's per-document loop and with bare gigatoken, in one run.

    python benchmarks/preprocess.py --tokenizer FOLDER --text free.jsonl --instructions gsm8k_train_alpaca.json

The loop is written here from the description of Megatron's `tools/preprocess_data.py`: a pool of two processes, one
document at a time through `json` and `tokenizers`, and one process that writes. It is timed on a part of the input, for
its rate does not depend on the size. Each program runs in a process of its own, from start to exit, in turns.

Next to the clock's time stands the processors', of all its threads and processes, which tells more on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", required=True, help="JSON lines with a field `text`")
    parser.add_argument("--instructions", required=True, help="a JSON array in alpaca form")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the text, reached by repeating it")
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--loop-documents", type=int, default=6_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # set when this file starts itself
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        STAGES[options.stage](options)
        return
    with tempfile.TemporaryDirectory() as folder:
        pretraining(options, Path(folder))
        instructions(options, Path(folder))
    packing()
    first_batch()


def pretraining(options: argparse.Namespace, folder: Path) -> None:
    source = folder / "text.jsonl"
    content = Path(options.text).read_bytes()
    copies = max(1, round(options.gigabytes * 1e9 / len(content)))
    with source.open("wb") as file:
        for _ in range(copies):
            file.write(content)
    documents = copies * content.count(b"\n")
    common = ["--tokenizer", options.tokenizer, "--text", str(source), "--instructions", options.instructions]
    loop, bare, written, ours = rounds(
        options.rounds,
        [
            ("loop-text", [*common, "--loop-documents", str(options.loop_documents)], options.loop_documents),
            ("bare", common, documents),
            ("bare-written", [*common, "--output", str(folder / "bare")], documents),
            ("tandem-text", [*common, "--output", str(folder / "text")], documents),
        ],
        folder,
    )
    print(f"pretraining: {source.stat().st_size / 1e9:.2f} GB, {documents:,} documents, {copies} copies of the text")
    show(f"per-document loop, {WORKERS} workers", loop)
    show("bare gigatoken", bare)
    show("bare gigatoken, ids written", written)
    show("tandem preprocess", ours)
    print(f"  tandem / loop: {loop.clock / ours.clock:.1f} by the clock, {loop.cpu / ours.cpu:.1f} by the processors")
    for name, peer in (("bare's", bare), ("bare's with writing", written)):
        print(f"  tandem's time / {name}: {ours.clock / peer.clock:.2f}, {ours.cpu / peer.cpu:.2f}", flush=True)


def instructions(options: argparse.Namespace, folder: Path) -> None:
    records = json.loads(Path(options.instructions).read_text(encoding="utf-8"))
    source = folder / "instructions.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for number in range(options.conversations):
            file.write(json.dumps(records[number % len(records)]) + "\n")
    common = ["--tokenizer", options.tokenizer, "--text", options.text, "--instructions", str(source)]
    loop, ours = rounds(
        options.rounds,
        [
            ("loop-instructions", [*common, "--loop-documents", str(options.loop_documents)], options.loop_documents),
            ("tandem-instructions", [*common, "--output", str(folder / "sft")], options.conversations),
        ],
        folder,
    )
    print(f"instructions: {options.conversations:,} conversations")
    show(f"per-document loop, {WORKERS} workers", loop)
    show("tandem preprocess", ours)
    print(
        f"  tandem / loop: {loop.clock / ours.clock:.1f} by the clock, {loop.cpu / ours.cpu:.1f} by the processors",
        flush=True,
    )


def packing(samples: int = 100_000, capacity: int = 4096) -> None:
    from tandem.data.packing import greedy_knapsack

    lengths = np.random.default_rng(0).lognormal(5.5, 0.9, samples).clip(8, capacity).astype(int).tolist()
    start = time.perf_counter()
    rows = greedy_knapsack(lengths, capacity)
    seconds = time.perf_counter() - start
    assert sum(map(len, rows)) == samples
    print(f"packing: {samples:,} log-normal samples in {seconds:.2f} s, fill {sum(lengths) / capacity / len(rows):.2%}")


def first_batch(documents: int = 1_000_000) -> None:
    from tandem.data.datasets.text import GPTDataset
    from tandem.data.indexed import IndexedWriter

    with tempfile.TemporaryDirectory() as folder:
        lengths = np.random.default_rng(0).integers(50, 500, documents)
        with IndexedWriter(f"{folder}/x") as writer:
            writer.add_documents(np.ones(int(lengths.sum()), np.int32), lengths)
        start = time.perf_counter()
        dataset = GPTDataset(f"{folder}/x", "train", "1", None, 4096, seed=1)
        assert len(dataset[0].tokens) == 4096
        print(f"first batch of {documents:,} documents: {time.perf_counter() - start:.2f} s")


class Taken(NamedTuple):
    """Microseconds per document by the clock and by the processors; peak memory in GB."""

    clock: float
    cpu: float
    memory: float


def show(name: str, taken: Taken) -> None:
    print(f"  {name:32}{1e6 / taken.clock:12,.0f} documents/s, {taken.cpu:7.1f} us each, {taken.memory:.2f} GB")


def rounds(count: int, stages: Sequence[tuple[str, list[str], int]], folder: Path) -> list[Taken]:
    """The median over some rounds of what each stage took for so many documents."""
    results = [[stage(name, words, documents, folder) for name, words, documents in stages] for _ in range(count)]
    return [Taken(*(statistics.median(values) for values in zip(*taken))) for taken in zip(*results)]


def stage(name: str, words: list[str], documents: int, folder: Path) -> Taken:
    """A loop prints what it took without its start; other stages are measured from start to exit."""
    before = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, *words, "--stage", name], stdout=subprocess.PIPE, text=True, cwd=folder
    )
    assert process.stdout is not None
    printed = process.stdout.read().split()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, name
    clock, cpu = time.perf_counter() - before, usage.ru_utime + usage.ru_stime
    if name.startswith("loop"):
        clock, cpu = map(float, printed)
    return Taken(clock / documents * 1e6, cpu / documents * 1e6, usage.ru_maxrss / 1e6)


def loop_text(options: argparse.Namespace) -> None:
    with Path(options.text).open(encoding="utf-8") as file:
        loop(islice(file, options.loop_documents), options, encode_text)


def loop_instructions(options: argparse.Namespace) -> None:
    with Path(options.instructions).open(encoding="utf-8") as file:
        loop(islice(file, options.loop_documents), options, encode_instruction)


def loop(lines: Iterator[str], options: argparse.Namespace, encode: Callable[[str], list[list[int]]]) -> None:
    """Print seconds by the clock and by the processors, once the workers have started."""
    documents = list(lines)
    with multiprocessing.Pool(WORKERS, start, (options.tokenizer,)) as pool, tempfile.TemporaryFile() as output:
        started = sum(pool.map(processor_seconds, range(WORKERS), 1))  # idle but for loading the tokenizer
        begin, before = time.perf_counter(), processor_seconds(None)
        for columns in pool.imap(encode, documents, 25):
            for ids in columns:
                output.write(np.array(ids, np.int32).tobytes(order="C"))
        clock, processor = time.perf_counter() - begin, processor_seconds(None) - before
        pool.close()
        pool.join()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(clock, processor + children.ru_utime + children.ru_stime - started)


def processor_seconds(_: Any) -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(0.2)  # so that each worker is asked once
    return usage.ru_utime + usage.ru_stime


tokenizer: Any  # of a worker of the loop


def start(folder: str) -> None:
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global tokenizer
    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")


def encode_text(line: str) -> list[list[int]]:
    return [tokenizer.encode(json.loads(line)["text"]).ids]


def encode_instruction(line: str) -> list[list[int]]:
    record = json.loads(line)
    question = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
    source = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"]
    source_ids = [i for text in source for i in tokenizer.encode(text, add_special_tokens=False).ids]
    target_ids = tokenizer.encode(f"{record['output']}<|im_end|>\n", add_special_tokens=False).ids
    ids = source_ids + target_ids
    return [ids, [1] * len(ids), [-100] * len(source_ids) + target_ids]


def bare(options: argparse.Namespace) -> Any:
    import gigatoken

    fast = gigatoken.Tokenizer(f"{options.tokenizer}/tokenizer.json")
    return fast.encode_files(gigatoken.JsonlFileSource([options.text], field="text"))


def bare_written(options: argparse.Namespace) -> None:
    """The ids of all texts end to end, brought to the disk; nothing says where a text ends."""
    with open(options.output, "wb") as file:
        np.asarray(bare(options).layout.content.data).tofile(file)
        os.fsync(file.fileno())


def tandem_text(options: argparse.Namespace) -> None:
    run_tandem(options, options.text, "--append-eod")


def tandem_instructions(options: argparse.Namespace) -> None:
    run_tandem(options, options.instructions, "--prompt-type", "qwen3")


def run_tandem(options: argparse.Namespace, source: str, *flags: str) -> None:
    from tandem.cli import preprocess

    sys.stdout = sys.stderr
    words = ["--input", source, "--output-prefix", options.output, "--tokenizer-name-or-path", options.tokenizer]
    preprocess.run([*words, "--workers", str(WORKERS), *flags])
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"largest worker process: {children / 1e6:.2f} GB")


STAGES = {
    "loop-text": loop_text,
    "loop-instructions": loop_instructions,
    "bare": bare,
    "bare-written": bare_written,
    "tandem-text": tandem_text,
    "tandem-instructions": tandem_instructions,
}

if __name__ == "__main__":
    main()
