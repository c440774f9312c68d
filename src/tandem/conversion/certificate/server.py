"""Comparing a running server with a certificate: any that speaks OpenAI's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.hf.record import CERTIFICATE
from tandem.conversion.certificate.compare import (
    END_TOKEN,
    NO_STATED_END,
    ROUNDING,
    TEMPLATE,
    Difference,
    of_numbers,
    of_prompts,
)
from tandem.conversion.certificate.content import Certificate, Computed, Probe
from tandem.conversion.certificate.http import Refused, Server
from tandem.conversion.certificate.result import Verified
from tandem.errors import UserError

MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError)  # of answers that are not as agreed
ALLOWED = 5.0  # times the largest difference on the same tokens: how far one on a prompt of the server's may be
NO_END = "the end token: no answer here ends by itself, and the server takes no `logit_bias`"
FEW = 4  # tokens that an answer may get after its end


def served_model(server: Server, name: str | None) -> dict[str, Any]:
    """The entry of the model in the server's list: the one of that name, or the only one.

    Raises:
        UserError: the server has no such list, or the model cannot be told.
        Lost: the server does not answer.
    """
    try:
        models = {str(entry["id"]): dict(entry) for entry in server.get("/v1/models")["data"]}
    except (Refused, *MALFORMED) as error:
        raise UserError(f"--url {server.root}: /v1/models is no list of models: {error}") from None
    if name is None and len(models) != 1:
        raise UserError(
            f"--url {server.root} serves {len(models)} models: choose one with --model: {', '.join(models)}"
        )
    name = next(iter(models)) if name is None else name
    if name not in models:
        raise UserError(f"--model {name}: {server.root} serves {', '.join(models)}")
    return models[name]


def folder_of(entry: dict[str, Any]) -> Path | None:
    """The folder of a served model, where it lies on this machine and has a certificate."""
    for key in ("root", "id"):
        place = Path(str(entry.get(key) or ""))
        if place.is_absolute() and (place / CERTIFICATE).is_file():
            return place
    return None


def verify_server(server: Server, model: str, certificate: Certificate, tolerance: float) -> Verified:
    """Compare prompts, ends of answers and log-probabilities.

    Raises:
        UserError: the server answers nothing that can be compared.
        Lost: it stops answering.
    """
    asking = _Asking(server, model, certificate)
    differences, skipped = [], []
    numbers = None
    found = [asking.log_probabilities(probe) for probe in certificate.probes]
    measured = [values for values in found if values is not None]
    if len(measured) == len(found):
        numbers = of_numbers(certificate, Computed(tuple(measured)), tolerance)
        if numbers.difference is not None:
            differences.append(numbers.difference)
    else:
        skipped.append("log-probabilities: the server gives none for prompts (neither `echo` nor `prompt_logprobs`)")
    is_same_model = numbers is not None and (numbers.difference is None or numbers.difference.cause == ROUNDING)
    allowed = max(tolerance, ALLOWED * numbers.largest) if numbers and is_same_model else None
    parts = (asking.template(allowed), asking.end_tokens(is_same_model))
    for found_differences, reason in parts:
        differences += found_differences
        skipped += [reason] if reason else []
    if numbers is None and (not asking.chats or all(reason for _, reason in parts)):
        raise UserError(f"--url {server.root}: nothing could be compared. {'; '.join(skipped)}")
    return Verified(f"{server.root} ({model})", "the server", certificate, tuple(differences), numbers, tuple(skipped))


class _Asking:
    """Questions to a server, and what its answers say."""

    def __init__(self, server: Server, model: str, certificate: Certificate) -> None:
        self._server, self._model, self._certificate = server, model, certificate
        self.chats = [(probe, number) for number, probe in enumerate(certificate.probes) if probe.messages]

    def log_probabilities(self, probe: Probe) -> np.ndarray | None:
        """Of a probe's tokens after the first, float64; None where the server gives none."""
        asked = {"prompt": list(probe.token_ids), "max_tokens": 1, "temperature": 0}
        for way, read in (({"echo": True, "logprobs": 1}, _echoed), ({"prompt_logprobs": 0}, _of_prompt)):
            try:
                values = read(self._complete({**asked, **way}), probe.token_ids)
            except (Refused, *MALFORMED):
                continue
            if len(values) == len(probe.token_ids) - 1:
                return np.asarray(values, np.float64)
        return None

    def template(self, allowed: float | None) -> tuple[list[Difference], str]:
        """Differences of the prompts that the server makes of conversations, or why they cannot be compared.

        Args:
            allowed: how far the log-probability of the next token may be from training's; None when it does not count.
        """
        if not self.chats:
            return [], ""
        tokens = [self._tokens_of(probe) for probe, _ in self.chats]
        if all(ids is not None for ids in tokens):
            return of_prompts([probe for probe, _ in self.chats], tokens), ""
        wrong, compared = [], 0
        for probe, number in self.chats:
            try:
                count, first = self._chat(probe)
            except Refused as error:
                return [], f"the template: the server refuses to chat ({error})"
            except MALFORMED:
                return [], "the template: the server's answers have no `usage` of tokens"
            compared += 1
            expected = self._certificate.likeliest[number][1]
            if count != len(probe.prompt_ids):
                wrong.append(f"{probe.title} has {count} tokens, {len(probe.prompt_ids)} in training")
            elif allowed is not None and first is not None and abs(first - expected) > allowed:
                wrong.append(
                    f"{probe.title} has as many tokens as in training, but its likeliest next token has "
                    f"log-probability {first:.4f}, {expected:.4f} in training"
                )
        text = f"{len(wrong)} of {compared} conversations are not asked as in training; "
        return ([Difference(TEMPLATE, text + wrong[0])] if wrong else []), ""

    def end_tokens(self, is_same_model: bool) -> tuple[list[Difference], str]:
        """A difference when answers do not end where they should, or why that cannot be compared."""
        certificate = self._certificate
        if not self.chats:
            return [], ""
        if not certificate.end_ids:
            return [], NO_STATED_END
        natural = [probe for probe, number in self.chats if certificate.stops[number]]
        try:
            if not natural or not is_same_model:
                return self._forced_end(self.chats[0][0])
            goes_on = [probe for probe in natural if self._after(probe, {})[1]]
        except (Refused, *MALFORMED):
            return [], NO_END
        return [self._other_end(probe, " or ".join(certificate.end_texts)) for probe in goes_on[:1]], ""

    def _forced_end(self, probe: Probe) -> tuple[list[Difference], str]:
        """The same where no answer ends by itself: the end token is made the likeliest one."""
        plain, _ = self._after(probe, {})
        for end, text in zip(self._certificate.end_ids, self._certificate.end_texts):
            biased, goes_on = self._after(probe, {"logit_bias": {str(end): 100}})
            if goes_on:
                return ([], NO_END) if biased == plain else ([self._other_end(probe, text)], "")
        return [], ""

    def _other_end(self, probe: Probe, ends: str) -> Difference:
        return Difference(
            END_TOKEN, f"after the answer to {probe.title} the server goes on; training ends it at {ends}"
        )

    def _after(self, probe: Probe, more: dict[str, Any]) -> tuple[str, bool]:
        """What the server writes after an answer, and whether it would go on."""
        whole = [*probe.prompt_ids, *probe.answer_ids[:-1]]
        answer = self._complete({"prompt": whole, "max_tokens": FEW, "temperature": 0, **more})
        return str(answer["choices"][0]["text"]), answer["choices"][0]["finish_reason"] == "length"

    def _complete(self, body: dict[str, Any]) -> Any:
        return self._server.post("/v1/completions", {"model": self._model, **body})

    def _tokens_of(self, probe: Probe) -> tuple[int, ...] | None:
        """A prompt's tokens, where the server has vLLM's path for them."""
        body = {"model": self._model, "messages": list(probe.messages), "add_generation_prompt": True}
        try:
            tokens = self._server.post("/tokenize", body)["tokens"]
            return tuple(map(int, tokens)) or None
        except (Refused, *MALFORMED):
            return None

    def _chat(self, probe: Probe) -> tuple[int, float | None]:
        """How many tokens the prompt of a conversation has, and the log-probability of the likeliest next one."""
        body = {"messages": list(probe.messages), "max_tokens": 1, "temperature": 0, "logprobs": True}
        answer = self._server.post("/v1/chat/completions", {"model": self._model, **body})
        count = int(answer["usage"]["prompt_tokens"])
        try:
            return count, float(answer["choices"][0]["logprobs"]["content"][0]["logprob"])
        except MALFORMED:
            return count, None


def _echoed(answer: Any, tokens: tuple[int, ...]) -> list[float]:
    values = answer["choices"][0]["logprobs"]["token_logprobs"]
    return [float(value) for value in values[1 : len(tokens)]]


def _of_prompt(answer: Any, tokens: tuple[int, ...]) -> list[float]:
    values = answer["choices"][0]["prompt_logprobs"]
    return [float(entry[str(token)]["logprob"]) for entry, token in zip(values[1:], tokens[1:])]
