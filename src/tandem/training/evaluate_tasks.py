"""`tandem evaluate --tasks`: benchmarks of lm-evaluation-harness, on the processes that were started."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.backends.interface import Engine
from tandem.checkpoints.hf.companions import end_ids_of
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.prompt import prompt_entry
from tandem.config.settings import DataSettings, Settings, TaskSettings
from tandem.data.templates.catalog import THINKING_MODES, get_template, template_from_entry
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError, raise_all
from tandem.harness.benchmark import Benchmark
from tandem.harness.cache import Answers
from tandem.harness.chat import Chat
from tandem.harness.library import load_tasks
from tandem.harness.team import Team
from tandem.logs import log
from tandem.models.tensors import tensor_table
from tandem.parallel.grid import Grid
from tandem.training.out_of_memory import naming_less_memory
from tandem.training.start.agreement import weights_identity
from tandem.training.start.for_evaluation import Weights

UNFINISHED = ".unfinished"  # suffix of the file that keeps answers until the results are written


@dataclass(frozen=True)
class TaskResults:
    """What an evaluation found.

    Attributes:
        results: in lm-evaluation-harness's schema, without samples.
        samples: of each task, if they were asked for.
        chat: the template that was applied.
        notices: for the user.
    """

    results: Mapping[str, Any]
    samples: Mapping[str, Any]
    chat: Chat | None
    notices: list[str]


def evaluate_tasks(
    settings: Settings, progress: Callable[[str, int, int], None] = lambda *_: None
) -> TaskResults | None:
    """Ask the model of `--load` the tasks of `--tasks`. Writes the files of `--output`.

    Args:
        progress: called on the first rank with the kind of requests, how many are done, and how many there are.

    Returns:
        The results on the first rank; None on the others.

    Raises:
        UserError: tasks, weights or layout do not fit together, or a file cannot be written.
    """
    with naming_less_memory(settings):
        return _evaluate_tasks(settings, progress)


def _evaluate_tasks(settings: Settings, progress: Callable[[str, int, int], None]) -> TaskResults | None:
    given = settings.evaluation
    raise_all(_wrong(settings))
    weights = Weights.of(settings, longest=1)
    if weights.tokenizer is None:
        raise UserError("--tasks needs a tokenizer: give its folder with --tokenizer-name-or-path")
    chat = chat_of(given, settings.data, weights.source, weights.tokenizer)
    benchmark = benchmark_of(given, given.tasks) if weights.world.rank == 0 else None
    communicator, engine = weights.load()
    team = Team(engine, communicator, weights.grid, given.tokens_per_batch)
    results = None
    if benchmark is None:
        team.follow()
    else:
        results = _lead(settings, weights, benchmark, team, chat, progress)
    communicator.close()
    return results


def _wrong(settings: Settings) -> list[str]:
    given = settings.evaluation
    problems = []
    if given.log_samples and given.output is None:
        problems.append("--log-samples: give --output FILE.json, next to which the samples are written")
    if settings.data.valid_data_path:
        problems.append(f"{settings.data.valid_data_path[0]} and --tasks: give data or tasks, each in its own command")
    return problems


def benchmark_of(given: TaskSettings, names: tuple[str, ...]) -> Benchmark:
    """The tasks, loaded. Only where lm-evaluation-harness is needed: on the first rank."""
    tasks = load_tasks(names, given.include_path)
    return Benchmark(tasks, given.num_fewshot, limit_of(given.limit), given.allow_code)


def limit_of(limit: float | None) -> float | None:
    """A number of questions, or a share below 1.

    Raises:
        UserError: it is neither.
    """
    if limit is None or 0 < limit < 1:
        return limit
    if limit < 1 or not limit.is_integer():
        raise UserError(f"--limit {limit:g}: expected a number of questions, or a share above 0 and below 1")
    return int(limit)


def chat_of(given: TaskSettings, data: DataSettings, source: TensorSource, tokenizer: Tokenizer) -> Chat | None:
    """The template of `--prompt-type`, or that of training, or the tokenizer's; None without `--apply-chat-template`.

    Raises:
        UserError: there is none, or a flag of it is given where none is applied.
    """
    mode = data.enable_thinking
    if not given.apply_chat_template:
        unused = [f"--enable-thinking {mode}"] if mode else []
        unused += [f"--prompt-type {data.prompt_type}"] if data.prompt_type else []
        raise_all([f"{' '.join(unused)}: also give --apply-chat-template"] if unused else [])
        return None
    thinking = THINKING_MODES[mode] if mode else None
    entry = prompt_entry(source)
    if data.prompt_type is not None:
        return Chat(tokenizer, get_template(data.prompt_type, thinking, tokenizer), thinking)
    if entry is None:
        return Chat(tokenizer, None, thinking)
    template = template_from_entry({**entry, "enable_thinking": thinking} if mode else entry, tokenizer)
    return Chat(tokenizer, template, template.enable_thinking if template else thinking)


def end_ids(source: TensorSource, tokenizer: Tokenizer, chat: Chat | None) -> frozenset[int]:
    """All tokens that end an answer."""
    ids = {*end_ids_of(source.companions), *tokenizer.end_ids}
    if chat is not None and chat.template is not None:
        ids.add(tokenizer.require_id(chat.template.stop_word))
    return frozenset(ids)


def facts_of(settings: Settings, source: TensorSource, engine: Engine, grid: Grid, framework: str) -> dict[str, Any]:
    """What was asked, for the results. Equal facts give equal answers."""
    sizes = (math.prod(spec.shape) for spec in tensor_table(source.config).values())
    return {
        "load": settings.checkpoint.load,
        "lora_load": settings.lora.lora_load,
        "iteration": source.iteration,
        "weights": weights_identity(source),
        "parameters": sum(sizes),
        "dtype": engine.param_dtype,
        "device": engine.device_name,
        "ai_framework": framework,
        "layout": {
            "tensor_model_parallel_size": grid.tensor_size,
            "pipeline_model_parallel_size": grid.pipeline_size,
            "data_parallel_size": grid.data_size,
        },
    }


def _lead(
    settings: Settings,
    weights: Weights,
    benchmark: Benchmark,
    team: Team,
    chat: Chat | None,
    progress: Callable[[str, int, int], None],
) -> TaskResults:
    """Ask the tasks, and write the results."""
    # These import lm-evaluation-harness, which only the first rank needs.
    from tandem.harness.model import Asking, TandemLM
    from tandem.harness.results import with_facts, write_results

    source, tokenizer, given = weights.source, weights.tokenizer, settings.evaluation
    assert tokenizer is not None
    facts = facts_of(settings, source, team.engine, weights.grid, weights.framework)
    output = Path(given.output) if given.output else None
    asked = {"tokenizer": tokenizer.sha256, "weights": facts["weights"], "dtype": facts["dtype"]}
    answers = Answers(output and output.with_name(output.name + UNFINISHED), asked)
    if len(answers):
        log.info("> going on with %s answers of an evaluation that was stopped", len(answers))
    longest = settings.model.max_position_embeddings or source.config.max_position_embeddings
    asking = Asking(
        team=team,
        tokenizer=tokenizer,
        max_length=longest,
        end_ids=end_ids(source, tokenizer, chat),
        seed=settings.training.seed,
        chat=chat,
        answers=answers,
        progress=progress,
    )
    model = TandemLM(asking)
    try:
        found = benchmark.ask(model)
    finally:
        answers.close()
    team.end()
    results = with_facts(found, benchmark, model, chat, facts)
    samples = found["samples"] if given.log_samples else {}
    if output is not None:
        write_results(output, results, samples)
    answers.remove()
    return TaskResults(results, samples, chat, list(team.engine.notices))
