"""How a task wants its answers generated: lm-evaluation-harness's `generation_kwargs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.errors import UserError
from tandem.inference.sampling import Sampling

DEFAULT_TOKENS = 256  # lm-evaluation-harness's own
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", *LENGTHS}


@dataclass(frozen=True)
class Wishes:
    """How an answer is generated.

    Attributes:
        stops: texts that end an answer and do not belong to it.
    """

    sampling: Sampling
    stops: tuple[str, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any], seed: int, task: str) -> Wishes:
        """From a task's `generation_kwargs`. An answer is the likeliest one, unless the task says how to sample.

        Raises:
            UserError: an option is unknown, or has a value that cannot be used.
        """
        if unknown := sorted(given.keys() - KNOWN):
            raise UserError(
                f"task {task}: generation_kwargs {', '.join(unknown)} not supported; expected some of "
                f"{', '.join(sorted(KNOWN))}"
            )
        until = given.get("until") or []
        temperature = float(given.get("temperature") or 0.0)
        if given.get("do_sample") is False:
            temperature = 0.0
        elif given.get("do_sample") and "temperature" not in given:
            temperature = 1.0
        length = next((given[name] for name in LENGTHS if given.get(name) is not None), DEFAULT_TOKENS)
        sampling = Sampling(
            max_new_tokens=int(length),
            temperature=temperature,
            top_k=int(given.get("top_k") or 0),
            top_p=float(given.get("top_p") or 1.0),
            seed=seed,
        )
        return cls(sampling, tuple([until] if isinstance(until, str) else until))

    @property
    def plain(self) -> tuple[dict[str, Any], list[str]]:
        """The same in a form that JSON can hold: `Wishes(Sampling(**sampling), tuple(stops))`."""
        return dict(vars(self.sampling)), list(self.stops)

    @property
    def is_random(self) -> bool:
        return self.sampling.temperature > 0


def cut(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first stop.

    >>> cut("4\\n\\nQ: and", ["Q:", "\\n\\n"])
    '4'
    """
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
