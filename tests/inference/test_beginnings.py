"""What prompts have in common is computed once, and changes no answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import require_framework
from tandem.backends import create_engine
from tandem.backends.interface import Engine, EngineSettings, Piece
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import Request, Scheduler
from toys import TOYS

SYSTEM = [1 + 7 * number % 200 for number in range(40)]
PROMPTS = [[*SYSTEM, *rest] for rest in ([5, 9, 3], [17], [8, 8, 8, 8], [5, 9, 4])]
GREEDY = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, place = TOYS["qwen3-tied"], tmp_path_factory.mktemp("toy") / "model"
    copy(RandomSource(config, 3), HFSink(place, config, "float32", Companions()))
    return place


@pytest.fixture(scope="module", params=["torch", "mindspore"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    source = open_source(folder)
    engine = create_engine(
        require_framework(request.param), source.config, EngineSettings(training=False, device="cpu")
    )
    engine.load_weights(source)
    return engine


class Counted(Scheduler):
    """Counts the tokens that are computed."""

    computed = 0

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__(*values, **named)
        step = self._session.step

        def counting(pieces: Sequence[Piece]) -> Any:
            self.computed += sum(len(piece.tokens) for piece in pieces)
            return step(pieces)

        self._session.step = counting  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[tuple[int, ...], list[int]]:
    """What transformers goes on with."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None

    class Answers(dict[tuple[int, ...], list[int]]):
        def __missing__(self, prompt: tuple[int, ...]) -> list[int]:
            made = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
            self[prompt] = made[0, len(prompt) :].tolist()
            return self[prompt]

    return Answers()


def assert_theirs(requests: Sequence[Request], theirs: dict[tuple[int, ...], list[int]]) -> None:
    assert [request.tokens for request in requests] == [theirs[tuple(request.prompt)] for request in requests]


def submitted(scheduler: Scheduler, prompts: Sequence[list[int]] = PROMPTS, **more: Any) -> list[Request]:
    return [scheduler.submit(prompt, GREEDY, (), **more) for prompt in prompts]


def test_prompts_that_come_together_share_their_beginning(engine: Engine, theirs: Any) -> None:
    """The others wait while the first one is read, and one that shares nothing does not."""
    with Counted(engine, 5, room=400) as scheduler:
        requests = submitted(scheduler, [*PROMPTS, [3, 2, 1]])
        scheduler.step()
        assert [bool(request.tokens) for request in requests] == [True, False, False, False, True]
        scheduler.run()
        rests = sum(len(prompt) - len(SYSTEM) for prompt in PROMPTS)
        assert scheduler.computed == len(SYSTEM) + rests - 2 + 3 + 5 * 5  # [.., 5, 9, 4] shares two tokens more
    assert [request.shared_tokens for request in requests] == [0, 40, 40, 42, 0]
    assert_theirs(requests, theirs)


def test_the_next_turn_goes_on_where_the_last_one_ended(engine: Engine, theirs: Any) -> None:
    with Counted(engine, 2, room=200) as scheduler:
        (first,) = submitted(scheduler, PROMPTS[:1])
        scheduler.run()
        before = scheduler.computed
        (second,) = submitted(scheduler, [[*first.prompt, *first.tokens, 11, 12]])
        scheduler.run()
        # the last token of an answer is chosen, and not computed
        assert second.shared_tokens == len(first.prompt) + 5
        assert scheduler.computed - before == 3 + 5
    assert_theirs([first, second], theirs)


@pytest.mark.parametrize("room", [50, 90, 98])
def test_memory_that_is_needed_is_given_up(engine: Engine, theirs: Any, room: int) -> None:
    """With room for one text, the next one takes the place of the one before it, or begins again."""
    with Scheduler(engine, 2, room) as scheduler:
        requests = submitted(scheduler, [*PROMPTS, [3] * 40, *PROMPTS])
        scheduler.run()
    assert_theirs(requests, theirs)
    shared = [request.shared_tokens for request in requests]
    assert shared[:2] == [0, 40]
    assert (shared[2] == 0) == (room < 98)
    assert shared[4] == 0


def test_nothing_is_shared_where_it_would_change_what_is_told(engine: Engine) -> None:
    """Log-probabilities of a prompt need all of it. Short beginnings are not worth a copy."""
    with Scheduler(engine, 4, room=400) as scheduler:
        scored = submitted(scheduler, prompt_logprobs=True)
        short = submitted(scheduler, [[*SYSTEM[:15], 1], [*SYSTEM[:15], 2]])
        scheduler.run()
    assert [request.shared_tokens for request in [*scored, *short]] == [0] * 6
    for request in scored:
        assert len(request.prompt_logprobs) == len(request.prompt)
    alone = [scored[0].prompt_logprobs[1:41], scored[1].prompt_logprobs[1:41]]
    np.testing.assert_allclose(alone[0][:39], alone[1][:39], atol=1e-6)


def test_random_answers_are_those_without_sharing(engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=5)
    alone = []
    for prompt in PROMPTS:
        with Scheduler(engine, 1, room=100) as scheduler:
            alone.append(scheduler.submit(prompt, sampling, ()))
            scheduler.run()
    with Scheduler(engine, 4, room=400) as scheduler:
        together = [scheduler.submit(prompt, sampling, ()) for prompt in PROMPTS]
        scheduler.run()
    assert [request.tokens for request in together] == [request.tokens for request in alone]
    assert all(request.shared_tokens for request in together[1:])
