"""The results of a benchmark as files, in lm-evaluation-harness's schema, and as a table."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tandem.errors import UserError
from tandem.files.publish import write_text_atomically
from tandem.harness.benchmark import BOOTSTRAPS, SEEDS, Benchmark
from tandem.harness.chat import Chat, describe
from tandem.version import __version__

if TYPE_CHECKING:  # it imports lm-evaluation-harness
    from tandem.harness.model import TandemLM

MODEL = "tandem"  # the model's name in `lm_eval --model`


def with_facts(
    found: Mapping[str, Any], benchmark: Benchmark, model: TandemLM, chat: Chat | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole results: lm-evaluation-harness's, and what they are true of.

    Args:
        found: what `Benchmark.ask` returned.
        facts: of the model and the machine, such as "load", "weights", "dtype" and "ai_framework".
    """
    name = str(facts["load"])
    return {
        **{key: value for key, value in found.items() if key not in ("samples", "seconds")},
        "config": {
            "model": MODEL,
            "model_args": {key: facts[key] for key in ("load", "lora_load") if facts.get(key)},
            "model_num_parameters": facts["parameters"],
            "model_dtype": facts["dtype"],
            "batch_size": None,
            "device": facts["device"],
            "limit": benchmark.limit,
            "bootstrap_iters": BOOTSTRAPS,
            "gen_kwargs": None,
            **SEEDS,
        },
        "model_source": MODEL,
        "model_name": name,
        "model_name_sanitized": name.strip("/").replace("/", "__"),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": chat is not None,
        **describe(chat),
        "lm_eval_version": version("lm_eval"),
        "eot_token_id": model.eot_token_id,
        "max_length": model.max_length,
        "total_evaluation_time_seconds": str(found["seconds"]),
        "tandem": {"version": __version__, **facts},
    }


def write_results(path: Path, results: Mapping[str, Any], samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Write `FILE.json`, and `FILE_samples_TASK.jsonl` for each task in `samples`.

    Raises:
        UserError: a file cannot be written.
    """
    try:
        for task, lines in samples.items():
            write_text_atomically(samples_file(path, task), "".join(_json(_sample(line)) + "\n" for line in lines))
        write_text_atomically(path, _json(results, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from error


def samples_file(path: Path, task: str) -> Path:
    return path.with_name(f"{path.stem}_samples_{task.replace('/', '_')}.jsonl")


def _sample(line: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as lm-evaluation-harness writes it: what was asked by number, and every answer as text."""
    asked = {
        f"gen_args_{number}": {f"arg_{place}": value for place, value in enumerate(arguments)}
        for number, arguments in enumerate(line["arguments"])
    }
    return {**line, "arguments": asked, "target": str(line["target"])}


def _json(values: Any, indent: int | None = None) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(values, indent=indent, default=handle_non_serializable, ensure_ascii=False)


def table_of(results: Mapping[str, Any]) -> Table:
    """One row for each metric of each task and group."""
    table = Table()
    for column in ("task", "shots", "questions", "filter", "metric"):
        table.add_column(column, justify="right" if column in ("shots", "questions") else "left")
    table.add_column("value", justify="right")
    table.add_column("± stderr", justify="right")
    groups = results.get("groups", {})
    for name, values in {**groups, **results["results"]}.items():
        shots = results["n-shot"].get(name, "")
        asked = results["n-samples"].get(name, {}).get("effective", "")
        for key, value in values.items():
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_}")
            cells = [name, str(shots), str(asked), "" if filter_ == "none" else filter_, metric, _number(value)]
            table.add_row(*cells, _number(error) if error != "N/A" else "")
    return table


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def in_words(results: Mapping[str, Any], chat: Chat | None) -> str:
    """What the numbers hang on, in a line."""
    mode = {True: "on", False: "off", None: "as the template has it"}
    if chat is None:
        template = "no chat template"
    else:
        template = f"chat template: {chat.name}, thinking: {mode[chat.enable_thinking]}"
    seconds = float(results["total_evaluation_time_seconds"])
    return f"{template}; lm-eval {results['lm_eval_version']}; {time.strftime('%H:%M:%S', time.gmtime(seconds))}"
