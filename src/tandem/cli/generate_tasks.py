"""`tandem generate --task`: what MindSpeed-LLM's inference.py does, and prints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TextIO

from tandem.cli.given_input import lines_of, open_input
from tandem.data.templates.messages import Message
from tandem.inference.beams import beam_search
from tandem.inference.chat import Model
from tandem.inference.defaults import SamplingOptions, greedy
from tandem.inference.replies import Question
from tandem.inference.sampling import Sampling

QUESTION = "how are you?"
BEAMS = 2
# How tokens are drawn where no flag says it; the model's files are not asked.
DRAWN = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
TITLES = {
    "greedy": "Greedy Search",
    "do_sample": "Do Sample",
    "beam_search": "Beam Search",
    "beam_search_with_sampling": "Beam Search with sampling",
}
TASKS = (*TITLES, "chat")
END, CLEAR = ("q", "quit", "exit"), ("clear", "new")


def run(
    model: Model,
    tasks: Sequence[str],
    prompts: Sequence[str],
    options: SamplingOptions,
    history_turns: int,
) -> None:
    """Run the tasks in their order. Only the first copy of the model answers; other processes wait."""
    sampling = model.defaults.sampling(SamplingOptions(**{**DRAWN, **options.given()}))
    for task in [task for task in TASKS if task in tasks]:
        if task == "chat":
            _chat(model, sampling, history_turns)
            continue
        for prompt in prompts or (QUESTION,):
            _answer(model, task, prompt, sampling)


def _answer(model: Model, task: str, prompt: str, sampling: Sampling) -> None:
    start = time.monotonic()
    if "sampl" not in task:
        sampling = greedy(sampling)
    if _is_first(model):
        print(f"\n=============== {TITLES[task]} ================", flush=True)
    if model.copy == 0:
        tokens = model.prompt_ids(prompt)
        if "beam" in task:
            ids = beam_search(model.engine, tokens, sampling, model.stop_ids(), BEAMS)
            text = model.tokenizer.decode(ids, skip_special_tokens=True)
        else:
            text = "".join(reply.text for reply in model.replies([Question(tokens, sampling)]))
    if _is_first(model):
        print(f"\nYou:\n{prompt}\n\nTandem:\n{text}", flush=True)
        print("==============================================", flush=True)
        print(f"\nElapsed: {time.monotonic() - start:.2f}s", flush=True)


def _chat(model: Model, sampling: Sampling, history_turns: int) -> None:
    """A conversation over standard input. Without a template, the model sees the texts one after the other."""
    turns: list[tuple[str, str]] = []
    typed = _typed(open_input()) if _is_first(model) else iter(())
    while (question := model.communicator.all_gather(next(typed, None))[0]) is not None:
        if question in CLEAR:
            turns.clear()
            continue
        if model.has_template:
            said = [(Message("user", asked), Message("assistant", answered)) for asked, answered in turns]
            tokens = model.prompter.prompt([*chain.from_iterable(said), Message("user", question)]).ids
        else:
            tokens = model.prompt_ids("".join(f"{asked}{answered}" for asked, answered in turns) + question)
        if _is_first(model):
            print("\nTandem:", flush=True)
        answer = ""
        if model.copy == 0:
            pieces = model.replies(
                [Question(tokens, sampling)], on_text=lambda _, text: print(text, end="", flush=True)
            )
            answer = "".join(reply.text for reply in pieces)
        turns.append((question, str(model.communicator.all_gather(answer)[0])))
        turns = turns[len(turns) - history_turns :] if history_turns else []


def _typed(source: TextIO) -> Iterator[str]:
    lines = lines_of(source)
    while True:
        print("\n\nYou >> ", end="", flush=True)
        line = next(lines, None)
        if line is None or line.strip() in END:
            print(flush=True)
            return
        if line.strip():
            yield line.strip()


def _show(_: int, text: str) -> None:
    print(text, end="", flush=True)


def _is_first(model: Model) -> bool:
    return model.communicator.world.rank == 0
