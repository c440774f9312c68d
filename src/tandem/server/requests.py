"""What is asked in /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.data.handlers.fields import described
from tandem.errors import UserError, nearest
from tandem.inference.answers import Answer
from tandem.inference.defaults import SamplingOptions
from tandem.inference.sampling import Sampling
from tandem.inference.worker import Query
from tandem.server.choices import ChatChoice, Choice, CompletionChoice
from tandem.server.errors import ApiError, bad_request, too_long
from tandem.server.fields import (
    Field,
    above,
    an_object,
    anything,
    flag,
    ignored,
    number,
    only,
    read,
    text,
    texts,
    whole,
)
from tandem.server.models import Served

MOST_CHOICES = 128  # answers to one request
MOST_STOPS = 64
MOST_TOP = 20
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
NOT_HERE = "this server does not do that"

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # as `Sampling` calls them, too
COMMON: dict[str, Field] = {
    "model": text(),
    "stream": flag(),
    "stream_options": an_object(),
    "temperature": number(0),
    "top_p": number(0, 1),
    "top_k": whole(-1),
    "min_p": number(0, 1),
    "repetition_penalty": above(0),
    "frequency_penalty": only(0, because=f"{NOT_HERE}; there is repetition_penalty"),
    "presence_penalty": only(0, because=f"{NOT_HERE}; there is repetition_penalty"),
    "logit_bias": only({}, because=NOT_HERE),
    "max_tokens": whole(0),
    "stop": texts(MOST_STOPS),
    "seed": Field(lambda value: type(value) is int, "a whole number"),
    "n": whole(1, MOST_CHOICES, 1),
    "user": ignored(),
    "metadata": ignored(),
    "store": ignored(),
    "service_tier": ignored(),
    "safety_identifier": ignored(),
    "prompt_cache_key": ignored(),
}
CHAT: dict[str, Field] = {
    **COMMON,
    "messages": anything(),
    "max_completion_tokens": whole(1),
    "logprobs": flag(),
    "top_logprobs": whole(0, MOST_TOP),
    "tools": anything(),
    "tool_choice": only("auto", "none", because="the model itself decides whether it calls"),
    "parallel_tool_calls": only(True, because="the model itself decides how many calls it makes"),
    "chat_template_kwargs": an_object(),
    "response_format": only({"type": "text"}, because="only texts are written"),
    "modalities": only(["text"], because="only texts are written"),
}
COMPLETION: dict[str, Field] = {
    **COMMON,
    "prompt": anything(),
    "echo": flag(),
    "logprobs": whole(0, MOST_TOP),
    "best_of": whole(1),
    "suffix": only("", because=NOT_HERE),
}


@dataclass(frozen=True)
class Asked:
    """A request, ready to be answered.

    Attributes:
        questions: one for each choice, in order, with the `choices` that will show the answers.
        prompt_tokens: of all prompts.
        answers: to each prompt; those to one prompt stand one after the other.
        include_usage: whether a stream ends with the numbers of tokens.
    """

    kind: str
    model: str
    questions: Sequence[Query]
    choices: Sequence[Choice]
    prompt_tokens: int
    answers: int
    stream: bool
    include_usage: bool


def read_chat(body: Any, models: Mapping[str, Served], max_tokens: int) -> Asked:
    """A request of /v1/chat/completions.

    Args:
        max_tokens: the longest answer where the request does not say, if there is room for it.

    Raises:
        ApiError: the request is wrong, or asks for what is not here.
    """
    values = read(body, CHAT)
    served = _served(values["model"], models)
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise bad_request("top_logprobs: also set logprobs to true", "top_logprobs")
    offered = {} if values["tool_choice"] == "none" else {"tools": values["tools"]}
    try:
        prompt = served.model.prompter.prompt_of(
            {"messages": values["messages"], **offered}, values["chat_template_kwargs"]
        )
    except UserError as error:
        raise bad_request(str(error), "messages") from None
    given = {name: values[name] for name in ("max_tokens", "max_completion_tokens") if values[name] is not None}
    if len(set(given.values())) > 1:
        raise bad_request("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    longest = next(iter(given.values()), None)
    sampling = _sampling(values, served, len(prompt.ids), longest, max_tokens, least=1)
    top = values["top_logprobs"] or 0

    def question(index: int) -> Query:
        answer = Answer(served.model.tokenizer, _stops(values), prompt.parts())
        return Query(served.name, prompt.ids, sampling(index), served.stop_ids, answer, top)

    return _asked(
        *("chat", served, values, [len(prompt.ids)], question),
        lambda index: ChatChoice(index, served.model.tokenizer, values["logprobs"]),
    )


def read_completion(body: Any, models: Mapping[str, Served]) -> Asked:
    """A request of /v1/completions.

    Raises:
        ApiError: the request is wrong, or asks for what is not here.
    """
    values = read(body, COMPLETION)
    served, count = _served(values["model"], models), values["n"]
    if values["best_of"] not in (None, count):
        raise bad_request(
            f"best_of {values['best_of']} with n {count}: expected the same number, as every answer is sent", "best_of"
        )
    prompts = _prompts(values["prompt"], served)
    if len(prompts) * count > MOST_CHOICES:
        raise bad_request(f"{len(prompts)} prompts with n {count}: expected at most {MOST_CHOICES} answers", "prompt")
    echo, logprobs, tokenizer = values["echo"], values["logprobs"], served.model.tokenizer
    samplings = [
        _sampling(values, served, len(ids), values["max_tokens"], COMPLETION_TOKENS, least=0) for ids, _ in prompts
    ]

    def question(index: int) -> Query:
        ids, _ = prompts[index // count]
        sampling = samplings[index // count](index % count)
        answer = Answer(tokenizer, _stops(values))
        scored = echo and logprobs is not None
        return Query(served.name, ids, sampling, served.stop_ids, answer, logprobs or 0, scored)

    def choice(index: int) -> Choice:
        ids, words = prompts[index // count]
        return CompletionChoice(index, tokenizer, ids, words if echo else None, logprobs)

    return _asked("completion", served, values, [len(ids) for ids, _ in prompts], question, choice)


def _asked(
    kind: str,
    served: Served,
    values: Mapping[str, Any],
    lengths: Sequence[int],
    question: Callable[[int], Query],
    choice: Callable[[int], Choice],
) -> Asked:
    options = values["stream_options"]
    if unknown := options.keys() - {"include_usage", "include_obfuscation"}:
        raise bad_request(f"stream_options: unknown {sorted(unknown)}", "stream_options")
    if not isinstance(options.get("include_usage", False), bool):
        raise bad_request("stream_options: include_usage: expected true or false", "stream_options")
    numbers = range(len(lengths) * values["n"])
    return Asked(
        kind,
        served.name,
        [question(index) for index in numbers],
        [choice(index) for index in numbers],
        sum(lengths),
        values["n"],
        values["stream"],
        options.get("include_usage", False),
    )


def _served(name: str | None, models: Mapping[str, Served]) -> Served:
    """The model that a request names; the first one if it names none."""
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise ApiError(
            404,
            f"the model {name!r} is not here; expected one of {sorted(models)}{nearest(name, sorted(models))}",
            param="model",
            code="model_not_found",
        )
    return models[name]


def _stops(values: Mapping[str, Any]) -> Sequence[str]:
    stop = values["stop"]
    return [stop] if isinstance(stop, str) else stop


def _prompts(value: Any, served: Served) -> list[tuple[list[int], str]]:
    """The token ids of each prompt, and its text. The value is a text, token ids, or a list of either."""
    tokenizer = served.model.tokenizer
    many = value if isinstance(value, list) and value and not all(type(item) is int for item in value) else [value]
    prompts = []
    for item in many:
        if isinstance(item, str):
            prompts.append((tokenizer.encode_prompt(item), item))
        elif isinstance(item, list) and item and all(type(token) is int for token in item):
            rows = served.model.engine.config.vocab_size
            if not 0 <= min(item) <= max(item) < rows:
                wrong = next(token for token in item if not 0 <= token < rows)
                raise bad_request(f"prompt: token id {wrong}; expected 0 to {rows - 1}", "prompt")
            prompts.append((item, tokenizer.decode(item)))
        else:
            raise bad_request(
                f"prompt: expected a text, token ids, or a list of either; found {described(item)}", "prompt"
            )
    if any(not ids for ids, _ in prompts):
        raise bad_request("prompt: is empty; expected at least one token", "prompt")
    return prompts


def _asks_for_chance(given: Mapping[str, Any], answers: int) -> bool:
    """Whether a request can only mean that tokens are drawn: several answers, or some of the likely tokens.

    >>> _asks_for_chance({"top_p": 1, "top_k": 0}, 1), _asks_for_chance({"top_p": 0.9}, 1)
    (False, True)
    """
    return answers > 1 or 1e-9 < given.get("top_p", 1) < 1 or given.get("top_k", 0) > 1 or given.get("min_p", 0) > 0


def _sampling(
    values: Mapping[str, Any], served: Served, length: int, longest: int | None, default: int, least: int
) -> Callable[[int], Sampling]:
    """The sampling of each answer to a prompt of `length` tokens, by its number."""
    most = served.most_tokens
    room = most - length
    if room < least or (longest or 0) > room:
        wanted = f" and {longest:,} of the answer" if longest is not None else ""
        raise too_long(f"{length:,} tokens of the prompt{wanted}: this model takes {most:,} tokens together")
    given = {name: values[name] for name in SAMPLING if values[name] is not None}
    if given.get("top_k") == -1:  # as vLLM says: all tokens
        given["top_k"] = 0
    if given.get("top_p") == 0:  # as OpenAI takes it: the most likely token
        given["top_p"] = 1e-9
    if "temperature" not in given and _asks_for_chance(given, values["n"]):
        given["temperature"] = served.model.defaults.values.get("temperature", 1.0)  # 1 is OpenAI's
    seed = secrets.randbits(62) if values["seed"] is None else values["seed"] % 2**62
    tokens = longest if longest is not None else min(default, room)
    try:
        base = served.model.defaults.sampling(SamplingOptions(**given))
    except UserError as error:
        raise bad_request(str(error)) from None
    base = dataclasses.replace(base, max_new_tokens=tokens)
    return lambda index: dataclasses.replace(base, seed=seed + index)
