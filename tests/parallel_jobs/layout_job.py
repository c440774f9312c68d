"""A job of several processes that trains toys in many layouts, one after another, and leaves what each rank ends with.

Run by `supervised.py` under the framework's own launcher: python layout_job.py FRAMEWORK CASES.json FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "backends")]

from jobs import Case, engine_settings, micro_batches, toy_source  # noqa: E402

from tandem.backends import connect, create_engine  # noqa: E402
from tandem.parallel.grid import Grid  # noqa: E402
from tandem.parallel.job import Member  # noqa: E402
from tandem.parallel.world import World  # noqa: E402


def main(framework: str, cases: str, folder: str) -> None:
    world = World.from_environment()
    communicator = connect(framework, world, "cpu", 5)
    for values in json.loads(Path(cases).read_text(encoding="utf-8")):
        case = Case.from_dict(values)
        grid = Grid(case.layout, world.size)
        source = toy_source(case)
        engine = create_engine(framework, source.config, engine_settings(case, grid, world.rank))
        engine.load_weights(source)
        share = micro_batches(case, source.config)
        own = [step[grid.place(world.rank).data :: grid.data_size] for step in share]
        # Data ranks may bring different numbers of micro-batches.
        evaluated = engine.evaluate(share[0][:-1][grid.place(world.rank).data :: grid.data_size])
        first_loss, _ = engine.loss_and_gradients(own[0])
        results = [engine.train_step(batches, lr=case.lr, weight_decay=0.1) for batches in own]
        arrays, parts = {}, []
        for number, (kind, shard, array) in enumerate(engine.tensors()):
            arrays[str(number)] = array.copy()
            parts.append([kind, shard.spec.name, shard.part.boxes, shard.part.dim])
        np.savez(Path(folder) / f"{case.name}-{world.rank}.npz", **arrays)
        outcome = {
            "evaluated": evaluated,
            "first_loss": first_loss,
            "losses": [result.loss for result in results],
            "norms": [result.grad_norm for result in results],
            "trained": [result.trained_tokens for result in results],
            "parts": parts,
        }
        (Path(folder) / f"{case.name}-{world.rank}.json").write_text(json.dumps(outcome), encoding="utf-8")
        communicator.barrier()
    communicator.close()


if __name__ == "__main__":
    member = Member.join()
    try:
        main(*sys.argv[1:])
        member.ended(0)
    except Exception as error:
        member.crashed(error)
        raise
