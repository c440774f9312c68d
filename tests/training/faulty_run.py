"""A `tandem` command in which something goes wrong, as told: python faulty_run.py FAULT.json COMMAND OPTIONS...

FAULT.json: {"rank": 1, "when": "step" | "evaluation" | "save", "at": 3, "what": "SIGTERM", "SIGKILL", "hang" or "nan"}:
at the start of the at-th step, validation batch or checkpoint of this process; "nan", for which "framework" is told,
spoils a gradient of that step. {"slow_save": 0.01} makes the writing of each tensor take so many seconds longer.
{"timeout": 0.1} makes collectives wait so many minutes on every rank. The exit code is left in FAULT.json.RANK.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from spoiled import spoiled
from tandem.__main__ import main
from tandem.checkpoints.native.rank_sink import NativeRankSink
from tandem.launch.member import exit_with
from tandem.launch.world import World
from tandem.training import run


def before(owner: Any, name: str, act: Any) -> None:
    """Call `act` before each call of a method."""
    method = getattr(owner, name)

    def wrapped(*args: Any, **values: Any) -> Any:
        act()
        return method(*args, **values)

    setattr(owner, name, wrapped)


def install(fault: dict[str, Any]) -> None:
    calls = 0
    engine: Any = None
    until_next = ExitStack()

    def act() -> None:
        nonlocal calls
        calls += 1
        until_next.close()
        if calls != fault["at"]:
            return
        if fault["what"] == "nan":
            until_next.enter_context(spoiled(fault["framework"], engine, "gradient"))
            return
        if fault["what"] == "hang":
            time.sleep(100_000)
        os.kill(os.getpid(), signal.Signals[fault["what"]])

    def create(*args: Any) -> Any:
        nonlocal engine
        engine = create_engine(*args)
        if fault.get("when") in METHODS:
            before(engine, METHODS[fault["when"]], act)
        return engine

    create_engine, run.create_engine = run.create_engine, create
    if fault.get("when") == "save":
        before(NativeRankSink, "finish", act)
    if "slow_save" in fault:
        before(NativeRankSink, "write_part", lambda: time.sleep(fault["slow_save"]))


METHODS = {"step": "train_step", "evaluation": "evaluate"}


def run_with_fault() -> int:
    fault = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank = World.from_environment().rank
    if fault.get("rank", rank) == rank:
        install(fault)
    if "timeout" in fault:
        connect = run.connect
        run.connect = lambda framework, world, device, _: connect(framework, world, device, fault["timeout"])
    code = main(sys.argv[2:])
    Path(f"{sys.argv[1]}.{rank}").write_text(str(code), encoding="utf-8")
    return code


if __name__ == "__main__":
    exit_with(run_with_fault)
