"""A job of several processes that continues prompts in many layouts, and leaves what each rank was told.

Run by `supervised.py` under the framework's own launcher: python session_job.py FRAMEWORK CASES.json FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "backends")]

from jobs import Case, engine_settings, toy_source  # noqa: E402

from tandem.backends import connect, create_engine  # noqa: E402
from tandem.backends.interface import Engine  # noqa: E402
from tandem.inference.beams import beam_search  # noqa: E402
from tandem.inference.sampling import Sampling  # noqa: E402
from tandem.inference.scheduler import Scheduler  # noqa: E402
from tandem.launch.member import Member, exit_with  # noqa: E402
from tandem.launch.world import World  # noqa: E402
from tandem.machine import available_bytes  # noqa: E402
from tandem.parallel.grid import Grid  # noqa: E402

PROMPTS = [[5, 9, 3], [17], list(range(30)), [8] * 7, [*range(29), 4, 4]]  # the last shares a beginning


def answers(engine: Engine) -> dict[str, Any] | None:
    """What the rank that leads its copy of the model gets; None on other ranks."""
    drawn = Sampling(max_new_tokens=9, temperature=0.8, top_k=30, seed=3)
    with Scheduler(engine, max_batch_size=2, room=100) as scheduler:
        if not scheduler.leads:
            scheduler.follow()
        else:
            requests = [scheduler.submit(p, Sampling(max_new_tokens=9), (), prompt_logprobs=True) for p in PROMPTS]
            requests += [scheduler.submit(prompt, drawn, ()) for prompt in PROMPTS]
            scheduler.run()
    best = beam_search(engine, PROMPTS[0], Sampling(max_new_tokens=6), (), beams=2)
    if not scheduler.leads:
        return None
    logprobs = [request.prompt_logprobs[1:] + request.logprobs for request in requests]
    shared = [request.shared_tokens for request in requests]
    return {"tokens": [request.tokens for request in requests], "logprobs": logprobs, "best": best, "shared": shared}


def main(framework: str, cases: str, folder: str) -> None:
    world = World.from_environment()
    communicator = connect(framework, world, "cpu", 5)
    for values in json.loads(Path(cases).read_text(encoding="utf-8")):
        case = Case.from_dict(values)
        source = toy_source(case)
        engine = create_engine(
            framework, source.config, engine_settings(case, Grid(case.layout, world.size), world.rank)
        )
        engine.load_weights(source)
        found = answers(engine)
        assert engine.free_memory() <= 1.2 * available_bytes() / world.size, "all ranks take the same memory"
        (Path(folder) / f"{case.name}-{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
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
