"""`tandem evaluate`: the loss and perplexity of weights on data, and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tandem.cli.processes import run_as_processes
from tandem.cli.settings import parse_settings
from tandem.config.settings import Settings
from tandem.config.upstream.flags import EVALUATE_IGNORED
from tandem.launch.world import World
from tandem.logs import lines_of_requests, log
from tandem.training.evaluate import Result, evaluate_weights
from tandem.training.evaluate_tasks import defaults_of_tasks, evaluate_tasks
from tandem.training.objectives import Evaluation

DESCRIPTION = (
    "Measure the loss and perplexity of a checkpoint or a Hugging Face folder. DATA is the PREFIX of data that "
    "`tandem preprocess` made, or NAME=PREFIX for each of several sets. Whole sets are used, or less with "
    "--eval-iters. DATA can also be a FILE.jsonl with a question {context, choices, answer} on each line; the result "
    "is then the accuracy. Of preferences, rewards and the loss of --stage are shown; the default is dpo or kto. With "
    "--tasks, benchmarks of lm-evaluation-harness are asked instead. Several processes: "
    "--nproc-per-node, or torchrun or msrun."
)
FIRST = (
    *("tasks", "include_path", "num_fewshot", "limit", "apply_chat_template", "output", "log_samples"),
    *("seq_length", "eval_iters", "tokenizer_name_or_path", "prompt_type", "ckpt_step", "lora_load"),
    *("stage", "dpo_loss_type", "dpo_beta", "kto_beta", "ref_model"),
    *("micro_batch_size", "ai_framework", "device", "bf16"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "nproc_per_node"),
)
GROUPS = ("model", "parallel", "data", "training", "lora", "preferences", "checkpoint", "launch", "evaluation")
WIDTH = 100  # columns of a table when the output is not a terminal


def run(argv: Sequence[str]) -> int:
    settings, notices = parse_settings(
        *("evaluate", DESCRIPTION, argv),
        first=FIRST,
        groups=GROUPS,
        positionals={"load": "CHECKPOINT", "valid_data_path": "DATA..."},
        values={"eval_iters": "full", **defaults_of_tasks(asks_upstream=_has_task(argv))},
        ignored=EVALUATE_IGNORED,
    )
    if (code := run_as_processes("evaluate", argv, settings)) is not None:
        return code
    if settings.evaluation.tasks or settings.evaluation.task:
        return run_tasks(settings, notices)
    results, more_notices = evaluate_weights(settings)
    if World.from_environment().rank == 0:
        for notice in [*notices, *more_notices]:
            print(f"> {notice}")
        print_tables(results)
    return 0


def _has_task(argv: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == "--task" for word in argv)


def run_tasks(settings: Settings, notices: Sequence[str]) -> int:
    """Ask benchmarks, and print their results."""
    from tandem.harness.results import in_words, table_of  # which needs lm-evaluation-harness

    found = evaluate_tasks(settings, lines_of_requests(log.info))
    if World.from_environment().rank:
        return 0
    for notice in [*notices, *found.notices]:
        print(f"> {notice}")
    _print(table_of(found.results))
    print(f"> {in_words(found.results, found.chat)}")
    if settings.evaluation.output is not None:
        print(f"> {settings.evaluation.output}")
    return 0


def print_tables(results: dict[str, Result]) -> None:
    """Print a table of losses, one of preferences and one of questions. An empty table is left out."""
    losses, answers = [], []
    preferences: dict[str, Evaluation] = {}
    for name, result in results.items():
        if isinstance(result, Evaluation) and result.metrics:
            preferences[name] = result
        elif isinstance(result, Evaluation):
            losses.append([name, f"{result.loss:.6f}", f"{result.perplexity:.4f}", f"{result.tokens:,}"])
        else:
            accuracies = [f"{result.accuracy:.4f}", f"{result.accuracy_per_character:.4f}"]
            answers.append([name, *accuracies, f"{result.log_likelihood:.6f}", f"{result.questions:,}"])
    _print_table(("set", "loss", "perplexity", "tokens"), losses)
    _print_table(("preferences", *preferences), _rows_of(list(preferences.values())))
    _print_table(("questions", "accuracy", "per character", "log-likelihood", "number"), answers)


def _rows_of(preferences: Sequence[Evaluation]) -> list[list[str]]:
    """A row for each number of the sets, which are columns."""
    names = dict.fromkeys(name for result in preferences for name in result.metrics)
    rows = [["loss", *(f"{result.loss:.6f}" for result in preferences)]]
    for name in names:
        rows.append(
            [name, *(f"{result.metrics[name]:.6f}" if name in result.metrics else "" for result in preferences)]
        )
    return [*rows, ["tokens", *(f"{result.tokens:,}" for result in preferences)]] if preferences else []


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table()
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    _print(table)


def _print(table: Table) -> None:
    Console(width=None if Console().is_terminal else WIDTH).print(table)
