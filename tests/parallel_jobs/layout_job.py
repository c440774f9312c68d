"""A job of several processes that trains toys in many layouts, one after another, and leaves what each rank ends with.

Run by `supervised.py` under the framework's own launcher: python layout_job.py FRAMEWORK CASES.json FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "backends")]

from jobs import Case, engine_settings, leave, toy_source, train  # noqa: E402

from tandem.backends import connect, create_engine  # noqa: E402
from tandem.launch.member import Member, exit_with  # noqa: E402
from tandem.launch.world import World  # noqa: E402
from tandem.parallel.grid import Grid  # noqa: E402


def main(framework: str, cases: str, folder: str) -> None:
    world = World.from_environment()
    communicator = connect(framework, world, "cpu", 5)
    for values in json.loads(Path(cases).read_text(encoding="utf-8")):
        case = Case.from_dict(values)
        grid = Grid(case.layout, world.size)
        engine = create_engine(framework, toy_source(case).config, engine_settings(case, grid, world.rank))
        data = slice(grid.place(world.rank).data, None, grid.data_size)
        leave(train(framework, engine, case, world.rank, data), engine, case, world.rank, Path(folder))
        communicator.barrier()
    communicator.close()


def run() -> int:
    member = Member.join()
    try:
        main(*sys.argv[1:])
        return member.ended(0)
    except Exception as error:
        member.crashed(error)
        raise


if __name__ == "__main__":
    exit_with(run)
