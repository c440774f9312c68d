"""What the logs of a step cost: metrics.jsonl, TensorBoard and the live view, against a step of one second.

python benchmarks/bookkeeping.py
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from tandem.training.logs.live import LiveView
from tandem.training.logs.log import StepRecord
from tandem.training.logs.metrics import MetricsFile
from tandem.training.logs.tensorboard import TensorBoardWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from steps import step_record

STEPS = 2000


def milliseconds(on_step: Callable[[StepRecord], None]) -> tuple[float, float]:
    """Median and 99th percentile of a call."""
    taken = []
    for iteration in range(1, STEPS + 1):
        record = step_record(iteration, validation={"validation": 2.0} if iteration % 10 == 0 else {})
        start = time.perf_counter()
        on_step(record)
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken), statistics.quantiles(taken, n=100)[98]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        view = LiveView(Console(file=io.StringIO(), force_terminal=True, width=120))
        loggers = {
            "metrics.jsonl": MetricsFile(Path(folder) / "metrics.jsonl", 0),
            "TensorBoard": TensorBoardWriter(folder, 1, 0),
            "live view": view,
        }
        lines = []  # printed when the live view, which takes over the output, has gone
        for name, logger in loggers.items():
            median, worst = milliseconds(logger.on_step)
            lines.append(
                f"{name:14} median {median:.3f} ms, 99 % below {worst:.3f} ms: {median / 10:.4f} % of a step of 1 s"
            )
            logger.close()
        start = time.perf_counter()
        view.render()
        lines.append(f"{'a refresh':14} {1000 * (time.perf_counter() - start):.3f} ms, twice a second, in a thread")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
