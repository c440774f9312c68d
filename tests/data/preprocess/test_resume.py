"""A run that was killed goes on where it stopped, and the files are those of a run that was not."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from data_toys import byte_tokenizer, write_jsonl
from tandem.data.preprocess.chunks import ChunkTokenizer, TokenizedChunk
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.preprocess.workers import tokenize_blocks
from tandem.data.record import source_entries
from tandem.data.sources.readers import Block
from tandem.errors import UserError

RECORDS = [{"text": f"document {i} " * (i % 4)} if i % 9 else {"text": i} for i in range(60)]

KILLED = """
import os, signal, sys
from tandem.data.preprocess import spool
from tandem.data.sources import readers
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
readers._BLOCK_BYTES = 60
add = spool.Spool.add
def add_and_die(self, chunk):
    add(self, chunk)
    if self.blocks == 7:
        self.save()
        self._files["text.bin"].write(b"half a block")
        self._files["text.bin"].flush()
        os.kill(os.getpid(), signal.SIGKILL)
spool.Spool.add = add_and_die
preprocess(PreprocessOptions((sys.argv[1],), sys.argv[2], sys.argv[3], on_bad="skip"))
"""


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreprocessOptions:
    """The options of a run that died after seven blocks."""
    monkeypatch.setattr("tandem.data.sources.readers._BLOCK_BYTES", 60)
    source = write_jsonl(tmp_path / "x.jsonl", *RECORDS)
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    words = [str(source), str(tmp_path / "x"), str(tokenizer)]
    finished = subprocess.run([sys.executable, "-c", KILLED, *words], check=False, env={**os.environ})
    assert finished.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("x_text*"))
    return PreprocessOptions((words[0],), words[1], words[2], on_bad="skip")


def files(prefix: str) -> dict[str, bytes]:
    return {end: Path(prefix + end).read_bytes() for end in ("_text_document.bin", "_text_document.idx", ".json")}


def test_only_what_is_left_is_done(killed: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rejects = Path(f"{killed.output_prefix}.rejects.jsonl")
    chunks = []

    def counting(job: ChunkTokenizer, blocks: Iterable[Block], workers: int) -> Iterator[TokenizedChunk]:
        for chunk in tokenize_blocks(job, blocks, workers):
            chunks.append(chunk)
            yield chunk

    monkeypatch.setattr("tandem.data.preprocess.run.tokenize_blocks", counting)
    preprocess(killed)
    resumed = files(killed.output_prefix), rejects.read_bytes()
    assert not Path(f"{killed.output_prefix}.unfinished").exists()
    blocks_after_the_kill = len(chunks)
    chunks.clear()
    preprocess(killed)  # nothing is left of the first run: this one does everything
    assert (files(killed.output_prefix), rejects.read_bytes()) == resumed
    assert len(chunks) == blocks_after_the_kill + 7


def test_another_input_starts_over(killed: PreprocessOptions, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", {"text": "quite different"})
    assert preprocess(killed).documents == 1


@pytest.mark.parametrize("content", [b"", b'{"identity": "'])
def test_damaged_progress_starts_over(killed: PreprocessOptions, content: bytes) -> None:
    (Path(f"{killed.output_prefix}.unfinished") / "progress.json").write_bytes(content)
    over = preprocess(killed)
    assert over.documents == len(RECORDS)
    assert files(killed.output_prefix)


def test_two_runs_do_not_write_the_same_output(killed: PreprocessOptions) -> None:
    with (Path(f"{killed.output_prefix}.unfinished") / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing this output"):
            preprocess(killed)


def test_hashing_the_input_ends_with_the_context(tmp_path: Path) -> None:
    """What hashes a pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with source_entries([tmp_path / "pipe"]):
        pass
    small = tmp_path / "with\na line end"
    small.write_bytes(bytes(1000))
    with source_entries([small, small]) as entries:
        expected = {"file": str(small), "bytes": 1000, "sha256": hashlib.sha256(bytes(1000)).hexdigest()}
        assert entries() == [expected, expected]
    with source_entries([tmp_path / "none"]) as entries, pytest.raises(UserError, match=r"hashed.*No such file.*none"):
        entries()


ORPHANED = """
import sys, time
from tandem.data.preprocess import options, run as preprocess
def slow(*_):
    print("under way", flush=True)
    time.sleep(600)
if __name__ == "__main__":
    preprocess.choose_engine = lambda tokenizer, reference, *_: reference  # whose workers are processes
    source, prefix, tokenizer = sys.argv[1:]
    preprocess.preprocess(options.PreprocessOptions((source,), prefix, tokenizer, workers=2), slow)
"""


def test_workers_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", *({"text": "a" * 100} for _ in range(30_000)))
    (tmp_path / "run.py").write_text(ORPHANED)
    words = [str(source), str(tmp_path / "x"), str(byte_tokenizer(tmp_path / "tokenizer"))]
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), *words], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"under way\n"
    process.kill()
    process.communicate(timeout=30)  # whoever still has its output open would keep it from ending


INTERRUPTED = """
import os, signal, sys
from tandem.__main__ import main
from tandem.data.preprocess import spool
from tandem.data.sources import readers
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
readers._BLOCK_BYTES = 60
add = spool.Spool.add
def add_and_interrupt(self, chunk):
    add(self, chunk)
    if self.blocks == 7:
        os.kill(os.getpid(), signal.SIGINT)
spool.Spool.add = add_and_interrupt
source, prefix, tokenizer = sys.argv[1:]
words = ["--input", source, "--output-prefix", prefix, "--tokenizer-name-or-path", tokenizer, "--on-bad", "skip"]
sys.exit(main(["preprocess", *words]))
"""


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", *RECORDS)
    words = [str(source), str(tmp_path / "x"), str(byte_tokenizer(tmp_path / "tokenizer"))]
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, *words], capture_output=True, text=True)
    assert ended.returncode == 75
    assert ended.stderr.strip().endswith("interrupted; what is tokenised so far is kept: the same command goes on")
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "x.unfinished").is_dir()
    assert not list(tmp_path.glob("x_text*"))
