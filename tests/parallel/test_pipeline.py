"""The schedule never waits for itself, does everything once, and keeps few activations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tandem.errors import UserError
from tandem.parallel.pipeline import Action, Link, after, before, most_on_the_way, one_forward_one_backward

CASES = [(stages, 1, n) for stages in (1, 2, 3, 4, 8) for n in (1, 2, 3, 7, 16)]
CASES += [(stages, chunks, stages * n) for stages in (2, 3, 4) for chunks in (2, 3) for n in (1, 2, 4)]


@pytest.mark.parametrize(("stages", "chunks", "n"), CASES)
def test_every_pass_happens_once_and_none_waits_for_ever(stages: int, chunks: int, n: int) -> None:
    """Run all stages side by side; messages of one direction between two stages must arrive in the order taken."""
    plans = [one_forward_one_backward(stage, stages, chunks, n) for stage in range(stages)]
    everything = {Action(forward, chunk, k) for forward in (True, False) for chunk in range(chunks) for k in range(n)}
    for plan in plans:
        assert len(plan) == len(everything)
        assert set(plan) == everything
    channels: dict[tuple[int, int, bool], list[tuple[int, int]]] = {}
    done = [0] * stages
    moved = True
    while moved:
        moved = False
        for stage in range(stages):
            while done[stage] < len(plans[stage]):
                action = plans[stage][done[stage]]
                links = before(stage, action.chunk, stages), after(stage, action.chunk, stages, chunks)
                source, target = links if action.forward else links[::-1]
                if source is not None:
                    waiting = channels.setdefault((source.stage, stage, action.forward), [])
                    if not waiting:
                        break
                    assert waiting.pop(0) == (action.chunk, action.micro_batch)
                if target is not None:
                    channel = channels.setdefault((stage, target.stage, action.forward), [])
                    channel.append((target.chunk, action.micro_batch))
                done[stage] += 1
                moved = True
    assert done == [len(plan) for plan in plans]


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 1), (2, 2), (2, 3), (3, 2), (4, 3)])
def test_few_messages_are_on_the_way(stages: int, chunks: int) -> None:
    """Each stage in turn computes while the others do only what it waits for."""
    plans = [one_forward_one_backward(stage, stages, chunks, 6 * stages) for stage in range(stages)]
    places = [{action: place for place, action in enumerate(plan)} for plan in plans]

    def ends(stage: int, action: Action) -> tuple[Link | None, Link | None]:
        links = before(stage, action.chunk, stages), after(stage, action.chunk, stages, chunks)
        return links if action.forward else (links[1], links[0])

    def run(stage: int, count: int) -> None:
        while done[stage] < count:
            action = plans[stage][done[stage]]
            source, _ = ends(stage, action)
            if source is not None:
                run(source.stage, places[source.stage][replace(action, chunk=source.chunk)] + 1)
            done[stage] += 1

    most = 0
    for stage, plan in enumerate(plans):
        done, sent = [0] * stages, []
        for number, action in enumerate(plan, 1):
            run(stage, number)
            _, target = ends(stage, action)
            if target is not None:
                sent.append((target.stage, replace(action, chunk=target.chunk)))
            sent = [(to, message) for to, message in sent if places[to][message] >= done[to]]
            most = max(most, *(sum(message.forward == kind for _, message in sent) for kind in (True, False)))
    assert most == (stages if chunks == 1 else 2 * stages - 1)
    assert most <= most_on_the_way(stages)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_plain_stage_keeps_as_many_activations_as_stages_follow(stages: int) -> None:
    for stage in range(stages):
        alive = peak = 0
        for action in one_forward_one_backward(stage, stages, 1, 16):
            alive += 1 if action.forward else -1
            peak = max(peak, alive)
        assert peak == stages - stage


def test_interleaving_needs_whole_rounds() -> None:
    with pytest.raises(UserError, match="3 micro-batches, which is not a multiple of the 2 pipeline stages"):
        one_forward_one_backward(0, 2, 2, 3)
