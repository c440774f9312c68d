"""`tandem evaluate` on two processes prints what it prints on one."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from frameworks import require_framework
from launchers import launcher
from tandem.__main__ import main
from workspace import Workspace

LAYOUTS = [
    ("--tensor-model-parallel-size 2", 2),
    pytest.param("--pipeline-model-parallel-size 2", 2, marks=pytest.mark.slow("answers")),
    pytest.param("--pipeline-model-parallel-size 3", 3, marks=pytest.mark.slow("answers")),  # of four layers
    ("", 2),
]


@pytest.mark.parametrize(("layout", "processes"), LAYOUTS)
def test_the_loss_is_the_same_at_every_layout(
    workspace: Workspace, layout: str, processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sets, whole, although two data ranks get different numbers of micro-batches."""
    require_framework("torch")
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"context": "123 is", "choices": [" 321", " 12 or more"], "answer": 0}')
    sets = [f"text={workspace.text}_text_document", f"chat={workspace.instructions}", f"ask={questions}"]
    words = ["evaluate", str(workspace.hf), *sets, "--seq-length", "32", "--micro-batch-size", "3"]
    assert main(words) == 0
    alone = table(capsys.readouterr().out)
    assert [name for name, *_ in alone] == ["text", "chat", "ask"]
    command = [*launcher("torch", processes, forked=True), "-m", "tandem", *words, *layout.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert table(done.stdout) == alone


def table(output: str) -> list[tuple[str, ...]]:
    """Rows of the printed tables: set, loss to 4 digits, perplexity, tokens; questions, their shares and number."""
    losses = re.findall(r"│ (\w+) +│ +([\d.]+)\d\d │ +([\d.]+)\d\d │ +([\d,]+) │", output)
    return losses + re.findall(r"│ (\w+) +│ +([\d.]+) │ +([\d.]+) │ +(-[\d.]+)\d\d │ +(\d+) │", output)
