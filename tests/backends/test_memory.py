"""Training takes no more memory step after step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A toy's steps, and the bytes of the process between them.
SOAK = """
import sys
import numpy as np
from toy_work import mean_weights, toy_batch, toy_weights
from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from toys import toy_config

source = toy_weights(toy_config())
engine = create_engine(sys.argv[1], source.config, EngineSettings())
engine.load_weights(source)
batches = [toy_batch(source.config, [9, 30, 17])]
weights = mean_weights(batches)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
for step in range(160):
    if step == 80:  # by now allocators and caches have what they need
        before = resident()
    engine.train_step(batches, weights, 1e-3, 0.1)
print((resident() - before) // 80)
"""


@pytest.mark.slow("jobs")
def test_steps_take_no_more_memory(framework: str) -> None:
    """MindSpore's own products lost 170 kB in each of these steps."""
    tests = Path(__file__).resolve().parents[1]
    code = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests / 'backends')!r}]\n{SOAK}"
    done = subprocess.run([sys.executable, "-c", code, framework], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 20_000
