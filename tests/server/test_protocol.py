"""OpenAI's protocol, as OpenAI's own client speaks it, over a toy with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from servers import Server, serving

from frameworks import require_framework
from tandem.data.batch import IGNORE, Sample, collate
from tandem.inference.sampling import Sampling
from workspace import Workspace

QUESTION: Any = [{"role": "user", "content": "Sort 312."}]
GREEDY: dict[str, Any] = {"model": "toy", "messages": QUESTION, "max_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def server(workspace: Workspace) -> Iterator[Server]:
    with serving({"toy": workspace.hf}) as server:
        yield server


@pytest.fixture(params=["torch", "mindspore"], scope="module")
def either(request: pytest.FixtureRequest, workspace: Workspace, server: Server) -> Iterator[Server]:
    """A server on each framework."""
    if request.param == "torch":
        yield server
        return
    with serving({"toy": workspace.hf}, require_framework("mindspore")) as other:
        yield other


def joined(stream: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


def scores(server: Server, ids: list[int]) -> np.ndarray:
    """Log-probabilities of every token after each of `ids`, by the engine of training."""
    tokens = np.asarray(ids, np.int32)
    sample = Sample(tokens, np.full(len(ids), IGNORE, np.int32), np.arange(len(ids), dtype=np.int32), (len(ids),))
    logits = server.model.engine.logits(collate([sample])).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_an_answer_is_the_one_of_generate(either: Server) -> None:
    made = either.client.chat.completions.create(**GREEDY)
    assert made.choices[0].message.content == either.model.answer(["Sort 312."], Sampling(max_new_tokens=20))[0]
    assert made.choices[0].finish_reason == "length"
    assert made.usage
    assert (made.usage.completion_tokens, made.usage.prompt_tokens) == (20, len(either.model.prompt_ids("Sort 312.")))


def test_joined_deltas_are_the_whole_text(either: Server) -> None:
    """Random tokens: bytes that make no character, and special tokens."""
    for seed in range(2):
        drawn = {**GREEDY, "temperature": 3.0, "seed": seed, "max_tokens": 40}
        whole = either.client.chat.completions.create(**drawn).choices[0]
        chunks = list(either.client.chat.completions.create(**drawn, stream=True))
        assert joined(chunks) == whole.message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.finish_reason
        text = either.client.completions.create(model="toy", prompt="Sort", temperature=3, seed=seed, max_tokens=40)
        parts = either.client.completions.create(
            model="toy", prompt="Sort", temperature=3, seed=seed, max_tokens=40, stream=True
        )
        assert "".join(part.choices[0].text for part in parts) == text.choices[0].text


def test_a_stream_ends_with_usage_and_done(server: Server) -> None:
    body = {**GREEDY, "stream": True, "stream_options": {"include_usage": True}}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 20
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_what_was_computed_before_is_told(server: Server) -> None:
    """Of the next turn of a chat; of two answers to one prompt, the first one's."""
    messages = [{"role": "system", "content": "You sort and reverse numbers."}, {"role": "user", "content": "Sort 9."}]
    counts = []
    for _ in range(2):
        made = server.client.chat.completions.create(**{**GREEDY, "messages": messages, "n": 2})
        assert made.usage
        assert made.usage.prompt_tokens_details
        counts.append((made.usage.prompt_tokens_details.cached_tokens or 0, made.usage.prompt_tokens))
        answer = {"role": "assistant", "content": made.choices[0].message.content}
        messages = [*messages, answer, {"role": "user", "content": "Reverse 12."}]
    (before, length), (cached, _) = counts
    assert before < length
    assert 16 <= cached <= length + 20
    assert cached > before


def test_log_probabilities_are_those_of_training(either: Server) -> None:
    prompt = either.model.prompt_ids("Sort 312.")
    made = either.client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3)
    assert made.choices[0].logprobs
    entries = made.choices[0].logprobs.content
    assert entries
    streamed = list(either.client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3, stream=True))
    told = [one for chunk in streamed if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content or []]
    assert told == entries
    vocabulary = [list(either.model.tokenizer.token_bytes(token)) for token in range(len(either.model.tokenizer))]
    ids = [vocabulary.index(entry.bytes or []) for entry in entries]
    expected = scores(either, [*prompt, *ids])[len(prompt) - 1 : -1]
    for entry, row, token in zip(entries, expected, ids):
        assert entry.logprob == pytest.approx(row[token], abs=1e-5)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(sorted(row)[:-4:-1], abs=1e-5)


def test_prompts_are_scored_as_lm_eval_asks(either: Server) -> None:
    """`echo` with `logprobs`, prompts as token ids, several at once."""
    prompts = [either.model.tokenizer.encode(text) for text in ("Sort 312.", "Reverse <12>. Yes")]
    made = either.client.completions.create(
        model="toy", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for choice, ids in zip(made.choices, prompts):
        told, expected = choice.logprobs, scores(either, ids)
        assert told
        assert told.token_logprobs
        assert told.token_logprobs[0] is None
        own = [row[token] for row, token in zip(expected, ids[1:])]
        assert told.token_logprobs[1:-1] == pytest.approx(own, abs=1e-5)
        for row, score, top in zip(expected, told.token_logprobs[1:], (told.top_logprobs or [])[1:]):
            assert max(top.values()) == pytest.approx(row.max(), abs=1e-5)
            assert score in top.values()
        assert choice.text.startswith(either.model.tokenizer.decode(ids))
        words, places = (told.tokens or [])[:-1], (told.text_offset or [])[:-1]
        assert "".join(words) == either.model.tokenizer.decode(ids)
        assert [choice.text[place] for place in places] == [word[0] for word in words]
    assert made.usage
    assert made.usage.completion_tokens == 2


def test_offsets_are_those_of_characters_that_several_tokens_make(server: Server) -> None:
    """And null asks for nothing, whatever the field."""
    made = server.client.completions.create(
        model="toy", prompt="é世 a", max_tokens=0, echo=True, logprobs=0, extra_body={"unheard_of": None}
    )
    told = made.choices[0].logprobs
    assert told
    assert (made.choices[0].text, told.text_offset) == ("é世 a", [0, 0, 1, 1, 1, 2, 3])


def test_prompts_are_only_scored_with_no_new_tokens(server: Server) -> None:
    made = server.client.completions.create(model="toy", prompt="Sort 312.", max_tokens=0, echo=True, logprobs=0)
    choice = made.choices[0]
    assert (choice.text, choice.finish_reason) == ("Sort 312.", "length")
    assert choice.logprobs
    assert choice.logprobs.token_logprobs
    assert len(choice.logprobs.token_logprobs) == len(server.model.tokenizer.encode("Sort 312."))
    streamed = server.client.completions.create(model="toy", prompt="Sort", max_tokens=2, echo=True, stream=True)
    assert "".join(part.choices[0].text for part in streamed).startswith("Sort")


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_held_back(server: Server, stream: bool) -> None:
    drawn = {**GREEDY, "temperature": 2.0, "seed": 5, "max_tokens": 60}
    text = server.client.chat.completions.create(**drawn).choices[0].message.content or ""
    stop = text[20:24]
    made = server.client.chat.completions.create(**drawn, stop=["never", stop], stream=stream)
    if stream:
        chunks = list(made)
        assert (joined(chunks), chunks[-1].choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    else:
        assert (made.choices[0].message.content, made.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    server.wait_until_idle()


def test_a_seed_says_what_is_drawn_and_n_draws_several(server: Server) -> None:
    drawn = {**GREEDY, "temperature": 1.0, "n": 3}
    first, second = (server.client.chat.completions.create(**drawn, seed=7) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    other, another = (server.client.chat.completions.create(**drawn).choices[0].message.content for _ in range(2))
    assert other != another
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in server.client.chat.completions.create(**drawn, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts
    made = server.client.completions.create(model="toy", prompt=["Sort", "Sort"], n=2, best_of=2, seed=7, temperature=1)
    assert [choice.text for choice in made.choices[:2]] == [choice.text for choice in made.choices[2:]]


@pytest.mark.parametrize("chance", [{"top_p": 0.9}, {"n": 2}, {"extra_body": {"top_k": 40}}])
def test_a_request_for_chance_needs_no_temperature(server: Server, chance: dict[str, Any]) -> None:
    """The toy has no generation_config.json: without a word, the most likely token is taken. OpenAI's default is 1."""
    asked: dict[str, Any] = {"model": "toy", "messages": QUESTION, "max_tokens": 20, "seed": 3}
    made, same = (
        [choice.message.content for choice in server.client.chat.completions.create(**asked, **given).choices]
        for given in (chance, {**chance, "temperature": 1})
    )
    assert made == same
    plain, likely = (
        server.client.chat.completions.create(**{**asked, **given}).choices[0].message.content
        for given in ({"top_p": 1, "n": 1}, {"temperature": 0})
    )
    assert plain == likely != made[0]


def test_many_at_once_get_what_each_gets_alone(server: Server) -> None:
    """16 at a time, streamed and not, of different lengths, greedy and drawn."""

    def ask(number: int) -> str:
        body = {**GREEDY, "max_tokens": 4 + 2 * number, "seed": number, "temperature": number % 3}
        body["messages"] = [{"role": "user", "content": f"Sort {'321' * number}."}]
        if number % 2:
            return joined(server.client.chat.completions.create(**body, stream=True))
        return server.client.chat.completions.create(**body).choices[0].message.content or ""

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    assert together == [ask(number) for number in range(16)]


def test_models_are_listed(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["toy"]
    assert server.client.models.retrieve("toy").object == "model"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_prompt_of_a_completion_begins_as_in_pretraining(server: Server) -> None:
    texts = server.client.completions.create(model="toy", prompt="Sort 3", temperature=0)
    ids = server.client.completions.create(
        model="toy", prompt=server.model.tokenizer.encode_prompt("Sort 3"), temperature=0
    )
    assert texts.choices[0].text == ids.choices[0].text
    assert texts.usage
    assert texts.usage.completion_tokens == 16  # OpenAI's default
