"""Continue several token sequences at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from tandem.backends.interface import Engine
from tandem.data.batch import IGNORE, Sample, collate
from tandem.errors import UserError
from tandem.inference.sampling import Sampling, draw


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Collection[int],
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop id (not included) or `max_new_tokens`.

    All prompts run in one batch without padding. Each step computes the whole sequences again.

    Args:
        on_token: called with (prompt number, token id) for each new token.

    Raises:
        UserError: a prompt is empty, could become longer than the model's positions, or has a token that the model does
            not know.
    """
    longest = engine.config.max_position_embeddings - sampling.max_new_tokens
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= longest:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens; expected 1 to {longest}. With {sampling.max_new_tokens} "
                f"new tokens it must fit max_position_embeddings {engine.config.max_position_embeddings}"
            )
        if max(prompt) >= engine.config.vocab_size:
            raise UserError(
                f"prompt {number} has the token id {max(prompt)}, and the model has {engine.config.vocab_size} rows in "
                f"its embedding: the tokenizer is another model's, or `tandem convert --resize-vocab` must add rows"
            )
    random = np.random.default_rng(sampling.seed)
    sequences = [list(prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    for _ in range(sampling.max_new_tokens):
        if not running:
            break
        batch = collate([_sample(sequences[number]) for number in running])
        rows = engine.logits(batch, rows=batch.cu_seqlens[1:] - 1)
        for number, logits in zip(list(running), rows):
            token = draw(logits, sampling, random)
            if token in stop_ids:
                running.remove(number)
                continue
            sequences[number].append(token)
            answers[number].append(token)
            if on_token:
                on_token(number, token)
    return answers


def _sample(tokens: list[int]) -> Sample:
    length = len(tokens)
    return Sample(
        tokens=np.asarray(tokens, np.int32),
        labels=np.full(length, IGNORE, np.int32),
        position_ids=np.arange(length, dtype=np.int32),
        lengths=(length,),
    )
