"""`tandem evaluate`: the loss and perplexity of weights on data."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tandem.cli.processes import run_as_processes
from tandem.cli.settings import parse_settings
from tandem.launch.world import World
from tandem.training.evaluate import Result, evaluate_weights
from tandem.training.evaluation import Evaluation

DESCRIPTION = (
    "Loss, perplexity and tokens of a checkpoint or a Hugging Face "
    "folder on data that `tandem preprocess` made. DATA is PREFIX, or NAME=PREFIX for several sets. Whole sets are "
    "taken; --eval-iters takes less. A FILE.jsonl in place of a PREFIX holds a question per line, {context, choices, "
    "answer}, and its accuracy is found. Runs at any layout with --nproc-per-node, or under torchrun or msrun."
)
FIRST = (
    *("seq_length", "eval_iters", "tokenizer_name_or_path", "prompt_type", "ckpt_step", "micro_batch_size"),
    *("ai_framework", "device", "bf16", "tensor_model_parallel_size", "pipeline_model_parallel_size", "nproc_per_node"),
)
GROUPS = ("model", "parallel", "data", "training", "checkpoint", "launch")
WIDTH = 100  # of the table where there is no terminal


def run(argv: Sequence[str]) -> int:
    settings, notices = parse_settings(
        *("evaluate", DESCRIPTION, argv),
        first=FIRST,
        groups=GROUPS,
        positionals={"load": "CHECKPOINT", "valid_data_path": "DATA..."},
        values={"eval_iters": "full"},
    )
    if (code := run_as_processes("evaluate", argv, settings.launch, settings.training.ai_framework)) is not None:
        return code
    found, more = evaluate_weights(settings)
    if World.from_environment().rank == 0:
        for notice in [*notices, *more]:
            print(f"> {notice}")
        print_tables(found)
    return 0


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
