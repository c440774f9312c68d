"""One process of a stage: `python -m tandem.bench.worker FILE`. The file says which stage, and gets the result."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tandem.backends import serve_as_scheduler
from tandem.bench.options import BenchOptions
from tandem.bench.stages import Stage, stages
from tandem.bench.team import Team, joined
from tandem.errors import UserError
from tandem.launch.member import JOB, Member, exit_with
from tandem.launch.world import is_scheduler
from tandem.options import build


def main(path: str) -> int:
    member = Member.join()
    if is_scheduler() and JOB in os.environ:
        try:
            serve_as_scheduler()
        except UserError as error:
            return member.ended(2, str(error))
    file = Path(path)
    asked = json.loads(file.read_text(encoding="utf-8"))
    options = build(BenchOptions, asked["options"])
    (stage,) = (stage for stage in stages(options) if stage.name == asked["stage"])
    if stage.spread.processes == 1:
        return _alone(stage, options, file)
    try:
        with joined(options, stage.spread) as team:
            result = _figures(stage, options, team)
        if team.rank == 0:
            _write(file, result)
        return member.ended(0)
    except UserError as error:
        return member.ended(2, str(error))
    except KeyboardInterrupt:
        return member.ended(130)
    except Exception as error:
        member.crashed(error)
        raise


def _alone(stage: Stage, options: BenchOptions, file: Path) -> int:
    start = time.perf_counter()
    try:
        with joined(options, stage.spread) as team:
            result = _figures(stage, options, team)
    except Exception as error:  # noqa: BLE001 - whatever a device does is a result
        result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        result["wall_seconds"] = time.perf_counter() - start
    _write(file, result)
    return 0


def _figures(stage: Stage, options: BenchOptions, team: Team) -> dict[str, Any]:
    start = time.perf_counter()
    figures = stage.run(options, team)
    return {"figures": figures, "wall_seconds": time.perf_counter() - start}


def _write(file: Path, result: dict[str, Any]) -> None:
    file.write_text(json.dumps(result, default=float), encoding="utf-8")


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1]))
