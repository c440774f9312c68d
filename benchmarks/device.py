"""Everything that a few minutes of one accelerator can show, in the order of its worth: `device_stages.py`.

    python benchmarks/device.py FOLDER                                    # on a device, within 14 minutes
    python benchmarks/device.py FOLDER --device cpu --tiny --seconds 240  # a rehearsal

Each stage is a process of its own with a time limit. What a stage finds is written at once: a line of JSON in
FOLDER/results.jsonl, and a table in FOLDER/summary.md. So nothing is lost when the time ends, and a stage that fails
does not stop the next. It needs the framework, NumPy and ml_dtypes; transformers for what is compared with it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import device_stages

SHORTEST = 20  # seconds; with less left, no stage begins
TAIL = 1500  # characters of a failed stage's output


def note(folder: Path, stage: str, values: dict[str, Any]) -> None:
    """Append what is known, so that it stays."""
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, **values}, default=float) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_stage(stage: device_stages.Stage, arguments: argparse.Namespace, seconds: float) -> None:
    """Run a stage in a process group of its own, and end it when its time is over."""
    start = time.monotonic()
    log = arguments.folder / f"{stage.name}.log"
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *sys.argv, "--stage", stage.name],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            ended = "done" if code == 0 else f"ended with code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    values: dict[str, Any] = {"ended": ended, "wall seconds": round(time.monotonic() - start, 1)}
    if ended != "done":
        values["output"] = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
    note(arguments.folder, stage.name, values)
    print(f"{stage.name}: {ended}, {values['wall seconds']} s", flush=True)


def summarise(folder: Path) -> None:
    """Write the results as tables that can be copied into a page."""
    lines = ["# Results of benchmarks/device.py", ""]
    last = None
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        stage = values.pop("stage")
        if stage != last:
            lines += ["", f"## {stage}", ""]
            last = stage
        lines.append("- " + "; ".join(f"{name}: {shown(value)}" for name, value in values.items()))
    (folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return str(value).replace("\n", " | ")


def main() -> None:
    names = [stage.name for stage in device_stages.STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="takes results.jsonl, summary.md, a log of each stage, and the trace")
    parser.add_argument("--seconds", type=float, default=840, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--device", default="cuda", choices=("cuda", "npu", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="models of no size, to rehearse")
    parser.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    by_name = {stage.name: stage for stage in device_stages.STAGES}
    if arguments.stage:
        told = device_stages.Run(
            arguments.device,
            arguments.folder,
            tiny=arguments.tiny,
            note=lambda v: note(arguments.folder, arguments.stage, v),
        )
        by_name[arguments.stage].run(told)
        return
    last_moment = time.monotonic() + arguments.seconds
    for name in arguments.stages:
        left = last_moment - time.monotonic()
        if left < SHORTEST:
            note(arguments.folder, name, {"ended": "not begun: the time was over"})
        else:
            # A rehearsal shows that stages work, on a processor of any speed.
            most = left if arguments.tiny else by_name[name].seconds
            run_stage(by_name[name], arguments, min(most, left - 2))
        summarise(arguments.folder)


if __name__ == "__main__":
    main()
