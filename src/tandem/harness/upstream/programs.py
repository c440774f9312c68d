"""HumanEval: functions that the model writes, which are run. Only with `--allow-code`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.harness.upstream.files import Row, read_lines
from tandem.harness.upstream.spec import Spec

SECONDS = 10.0  # for a program with its tests
STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # what follows the function
FENCE = "```"


def human_eval(folder: Path) -> list[Spec]:
    """All problems of the folder's `.jsonl` files."""
    files = sorted(folder.glob("*.jsonl"))

    def read() -> list[Row]:
        return [row for path in files for row in read_lines(path, ("task_id", "prompt", "test", "entry_point"))]

    return [Spec("human_eval", {"test": read}, CHANGES)] if files else []


def _passes(doc: Row, results: Sequence[str]) -> dict[str, float]:
    return {"pass@1": float(runs(program_of(doc, results[0])))}


def program_of(doc: Row, answer: str) -> str:
    """A file that fails unless the function passes its tests. An answer goes on with the prompt, up to a fence."""
    return f"{doc['prompt']}{answer.split(FENCE)[0]}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"


def runs(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends without an error, in an empty folder and a process of its own."""
    with tempfile.TemporaryDirectory(prefix="tandem-code-") as folder:
        (Path(folder) / "program.py").write_text(program, encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-I", "program.py"],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


CHANGES: dict[str, Any] = {
    "test_split": "test",
    "output_type": "generate_until",
    "unsafe_code": True,
    "doc_to_text": "prompt",
    "doc_to_target": "entry_point",
    "process_results": _passes,
    "generation_kwargs": {"until": STOPS, "max_gen_toks": 1024, "do_sample": False},
    "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    "num_fewshot": 0,
    "metadata": {"version": 1.0},
}
