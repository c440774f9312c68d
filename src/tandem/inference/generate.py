"""Continue several token sequences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from tandem.backends.interface import Engine
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import Request, Scheduler


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Collection[int],
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop id (not included) or `max_new_tokens`.

    Args:
        on_token: called with (prompt number, token id) for each new token.

    Raises:
        UserError: a prompt is empty, too long for the model's positions, or has a token that the model does not know.
    """

    def tell(number: int) -> Callable[[Request], None] | None:
        if on_token is None:
            return None
        told = 0

        def call(request: Request) -> None:
            nonlocal told
            for token in request.tokens[told:]:
                on_token(number, token)
            told = len(request.tokens)

        return call

    if not prompts:
        return []
    longest = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
    count = min(len(prompts), 16)
    with Scheduler(engine, count, room=count * min(longest, engine.config.max_position_embeddings)) as scheduler:
        requests = [
            scheduler.submit(prompt, sampling, stop_ids, on_token=tell(number)) for number, prompt in enumerate(prompts)
        ]
        scheduler.run()
    return [request.tokens for request in requests]
