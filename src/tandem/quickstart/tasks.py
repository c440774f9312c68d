"""A small world with answers that can be checked: questions and plain text about lists of digits.

Held-out lists are neither in the text nor in the training questions. So only a model that has learned the operations
can answer questions about them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Digits = tuple[int, ...]

# name -> (question, sentence of the text, digits of the answer)
OPERATIONS: dict[str, tuple[str, str, Callable[[Digits], Digits]]] = {
    "copy": ("Repeat {list}.", "Repeated, {list} is {answer}.", lambda digits: digits),
    "reverse": ("Reverse {list}.", "Reversed, {list} is {answer}.", lambda digits: digits[::-1]),
    "sort": ("Sort {list}.", "Sorted, {list} is {answer}.", lambda digits: tuple(sorted(digits))),
    "largest": ("Which digit of {list} is largest?", "The largest of {list} is {answer}.", lambda d: (max(d),)),
}


@dataclass(frozen=True)
class World:
    """Training text and questions, and held-out questions."""

    text: list[str]
    train: list[dict[str, str]]
    held_out: list[dict[str, str]]


def make_world(seed: int, lists: int = 3000, held_out_lists: int = 50, lengths: tuple[int, ...] = (2, 3, 4)) -> World:
    """Draw different lists and hold some out; there is a question for every list and operation."""
    generator = random.Random(seed)
    drawn: dict[Digits, None] = {}
    while len(drawn) < lists + held_out_lists:
        drawn[tuple(generator.randrange(10) for _ in range(generator.choice(lengths)))] = None
    chosen = list(drawn)
    generator.shuffle(chosen)
    held_out, train = chosen[:held_out_lists], chosen[held_out_lists:]
    questions = [question(name, digits) for digits in train for name in OPERATIONS]
    generator.shuffle(questions)
    return World(
        text=[sentence(generator, digits) for digits in train],
        train=questions,
        held_out=[question(name, digits) for digits in held_out for name in OPERATIONS],
    )


def question(name: str, digits: Digits) -> dict[str, str]:
    """One alpaca record."""
    ask, _, answer = OPERATIONS[name]
    return {"instruction": ask.format(list=show(digits)), "input": "", "output": show(answer(digits))}


def sentence(generator: random.Random, digits: Digits) -> str:
    """A document about one list: a sentence for each operation, in random order."""
    names = list(OPERATIONS)
    generator.shuffle(names)
    sentences = []
    for name in names:
        _, statement, answer = OPERATIONS[name]
        sentences.append(statement.format(list=show(digits), answer=show(answer(digits))))
    return " ".join(sentences)


def show(digits: Digits) -> str:
    return "".join(str(digit) for digit in digits)


def write_world(world: World, folder: Path) -> tuple[Path, Path]:
    """Write `corpus.jsonl` and `instructions.json`; returns their paths."""
    corpus, instructions = folder / "corpus.jsonl", folder / "instructions.json"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in world.text), encoding="utf-8")
    instructions.write_text(json.dumps(world.train, indent=0) + "\n", encoding="utf-8")
    return corpus, instructions
