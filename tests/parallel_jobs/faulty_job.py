"""A command whose rank 1 meets with something: python faulty_job.py FAULT FOLDER [COMMAND WORDS...]

Without a command each rank only waits.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType, SimpleNamespace

from tandem import __main__ as tandem
from tandem.errors import UserError
from tandem.launch.member import JOINED, exit_with, placing, tell_stage
from tandem.launch.world import World
from tandem.training.trainer import Trainer

FAULT, FOLDER = sys.argv[1], Path(sys.argv[2])


def meet(iteration: int) -> None:
    """The fault, in iteration 2 of rank 1."""
    if FAULT == "user error":
        raise UserError("all ranks agree that this cannot be")
    rank = World.from_environment().rank
    if FAULT == "killed before the error":
        if rank == 0 and (FOLDER / "moment").exists():
            raise UserError("this cannot be")
        while rank == 1 and iteration == 2 and not (FOLDER / "rank_0").exists():  # on a busy machine it comes later
            time.sleep(0.01)
    if FAULT == "error, and SIGTERM for the others" and rank == 0 and (FOLDER / "moment").exists():
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
    if rank != 1 or iteration != 2:
        return
    (FOLDER / "moment").write_text(str(time.time()))
    if FAULT.startswith("error"):
        raise RuntimeError("rank 1 does not like iteration 2")
    if FAULT.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)


def wait(words: list[str]) -> int:
    """In place of a command: a loop that saves when it is asked to stop."""

    def save(number: int, frame: FrameType | None) -> None:
        time.sleep(0.5)
        (FOLDER / f"saved_{World.from_environment().rank}").write_text(signal.Signals(number).name)
        sys.exit(0)

    if FAULT == "error, and SIGTERM for the others":
        pass  # as while a run starts, or after its error
    elif FAULT != "deaf":
        signal.signal(signal.SIGTERM, save)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    atexit.register(print, "as frameworks do, it speaks while it leaves")
    if FAULT != "starting":
        tell_stage(JOINED)
    print("waiting", flush=True)
    for iteration in range(1, 600):
        with placing(lambda iteration=iteration: f"iteration {iteration}"):  # type: ignore[misc]
            meet(iteration)
        (FOLDER / f"rank_{World.from_environment().rank}").write_text(str(os.getpid()))
        time.sleep(0.1)
    return 0


def main(words: list[str]) -> int:
    step = Trainer.step

    def faulty_step(self: Trainer) -> object:
        meet(self.progress.iteration + 1)
        return step(self)

    Trainer.step = faulty_step  # type: ignore[assignment, method-assign]
    if not words:
        tandem.COMMANDS["wait"] = "Wait."
        sys.modules["tandem.cli.wait"] = SimpleNamespace(run=wait)  # type: ignore[assignment]
    return tandem.main(words or ["wait"])


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[3:]))
