"""`tandem evaluate`: the loss and perplexity of weights on data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tandem.cli.processes import run_as_processes
from tandem.config.parsing import parse_settings
from tandem.config.settings import Settings
from tandem.launch.world import World
from tandem.training.evaluate import Result, evaluate_weights
from tandem.training.evaluation import Evaluation

DESCRIPTION = (
    "tandem evaluate CHECKPOINT DATA... [OPTIONS]: loss, perplexity and tokens of a checkpoint or a Hugging Face "
    "folder on data that `tandem preprocess` made. DATA is PREFIX, or NAME=PREFIX for several sets. Whole sets are "
    "taken; --eval-iters takes less. A FILE.jsonl in place of a PREFIX holds a question per line, {context, choices, "
    "answer}, and its accuracy is found. Runs at any layout with --nproc-per-node, or under torchrun or msrun."
)
WIDTH = 100  # of the table where there is no terminal


def run(argv: Sequence[str]) -> int:
    words = list(argv)
    places = []
    while words and not words[0].startswith("-"):
        places.append(words.pop(0))
    settings, notices = parse_settings("evaluate", DESCRIPTION, ["--eval-iters", "full", *words])
    if (code := run_as_processes("evaluate", argv, settings)) is not None:
        return code
    found, more = evaluate_weights(with_places(settings, places))
    if World.from_environment().rank == 0:
        for notice in [*notices, *more]:
            print(f"> {notice}")
        print_tables(found)
    return 0


def with_places(settings: Settings, places: Sequence[str]) -> Settings:
    """The words before the first flag: the checkpoint, then the data."""
    data, checkpoint = settings.data, settings.checkpoint
    if places:
        checkpoint = dataclasses.replace(checkpoint, load=places[0])
    if places[1:]:
        data = dataclasses.replace(data, valid_data_path=tuple(places[1:]))
    return dataclasses.replace(settings, data=data, checkpoint=checkpoint)


def print_tables(found: dict[str, Result]) -> None:
    """A table of losses, and one of answers; those without a row are left out."""
    losses, answers = [], []
    for name, of in found.items():
        if isinstance(of, Evaluation):
            losses.append([name, f"{of.loss:.6f}", f"{of.perplexity:.4f}", f"{of.tokens:,}"])
        else:
            shares = [f"{of.accuracy:.4f}", f"{of.accuracy_per_character:.4f}", f"{of.log_likelihood:.6f}"]
            answers.append([name, *shares, f"{of.questions:,}"])
    _print_table(("set", "loss", "perplexity", "tokens"), losses)
    _print_table(("questions", "accuracy", "per character", "log-likelihood", "number"), answers)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table()
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else WIDTH).print(table)
