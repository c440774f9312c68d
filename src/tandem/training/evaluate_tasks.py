"""`tandem evaluate --tasks`: benchmarks of lm-evaluation-harness, on the processes that were started."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.backends.interface import Engine
from tandem.checkpoints.hf.companions import end_ids_of
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.prompt import prompt_entry
from tandem.config.settings import DataSettings, ModelSettings, Settings, TaskSettings, TrainingSettings
from tandem.data.templates.catalog import THINKING_MODES, get_template, template_from_entry
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError, raise_all
from tandem.harness.benchmark import Benchmark
from tandem.harness.cache import Answers
from tandem.harness.chat import Chat
from tandem.harness.generation import Ends, has_sessions
from tandem.harness.library import load_tasks
from tandem.harness.team import Team
from tandem.harness.upstream.benchmarks import Wanted, load_upstream
from tandem.logs import log
from tandem.models.tensors import tensor_table
from tandem.options import as_typed, flag_of
from tandem.parallel.grid import Grid
from tandem.training.out_of_memory import naming_less_memory
from tandem.training.start.agreement import weights_identity
from tandem.training.start.for_evaluation import Weights

UNFINISHED = ".unfinished"  # suffix of the file that keeps answers until the results are written


@dataclass(frozen=True)
class TaskResults:
    """What an evaluation found: on the first process. On the others all is empty.

    Attributes:
        results: in lm-evaluation-harness's schema, without samples: `results["results"]["gsm8k"]` has a task's metrics.
        samples: of each task, every question with its answers and metrics, in lm-evaluation-harness's schema.
        chat: the template that was applied.
        notices: for the user.
    """

    results: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    chat: Chat | None = None
    notices: list[str] = field(default_factory=list)


def defaults_of_tasks(*, asks_upstream: bool) -> dict[str, Any]:
    """Settings that MindSpeed-LLM's `--task` has unless they are given; none for `--tasks`.

    Its evaluation applies the template. But a model that thinks would not begin with its answer, and upstream cuts it
    off before it comes to one.
    """
    return {"apply_chat_template": True, "enable_thinking": "false"} if asks_upstream else {}


def evaluate_tasks(settings: Settings, progress: Callable[[str, int, int], None] = lambda *_: None) -> TaskResults:
    """Ask the model of `--load` the tasks of `--tasks`. Writes the files of `--output`.

    Args:
        progress: called on the first rank with the kind of requests, how many are done, and how many there are.

    Raises:
        UserError: tasks, weights or layout do not fit together, or a file cannot be written.
    """
    with naming_less_memory(settings):
        return _evaluate_tasks(settings, progress)


def _evaluate_tasks(settings: Settings, progress: Callable[[str, int, int], None]) -> TaskResults:
    given = settings.evaluation
    raise_all(_wrong(settings))
    weights = Weights.of(settings, longest=1)
    if weights.tokenizer is None:
        raise UserError("benchmarks need a tokenizer: give its folder with --tokenizer-name-or-path")
    chat = chat_of(given, settings.data, weights.source, weights.tokenizer)
    notices = list[str]()
    benchmark = None
    if weights.world.rank == 0 and given.task:
        tasks, notices = load_upstream(wanted_of(settings, weights))
        benchmark = benchmark_with(given, tasks)
    elif weights.world.rank == 0:
        benchmark = benchmark_of(given, given.tasks)
    communicator, engine = weights.load()
    ends = Ends(weights.tokenizer, end_ids(weights.source, weights.tokenizer, chat))
    keeps = has_sessions(weights.grid, weights.engine_settings)
    team = Team(engine, communicator, weights.grid, ends, keeps, given.tokens_per_batch)
    results = TaskResults()
    if benchmark is None:
        team.follow()
    else:
        results = _lead(settings, weights, benchmark, team, chat, progress)
        results.notices.extend([*notices, *_idle(settings)])
    communicator.close()
    return results


def _wrong(settings: Settings) -> list[str]:
    given = settings.evaluation
    problems = []
    if given.eval_tasks:
        problems.append("--eval-tasks belongs to training: give --tasks")
    if given.log_samples and given.output is None:
        problems.append("--log-samples: give --output FILE.json, next to which the samples are written")
    if given.output is not None and Path(given.output).is_dir():
        problems.append(f"--output {given.output}: is a folder; expected the name of a file")
    if given.tasks and given.task:
        problems.append("--tasks and --task: give one of them")
    names = ("task_data_path", "max_new_tokens", "chain_of_thought")
    of_task = [flag_of(name) for name in names if getattr(given, name)]
    if of_task and not given.task:
        problems.append(f"{' '.join(of_task)}: belongs to --task")
    if settings.data.valid_data_path:
        problems.append(f"{settings.data.valid_data_path[0]} and --tasks: give data or tasks, each in its own command")
    return problems


def _idle(settings: Settings) -> list[str]:
    """A notice about settings of an evaluation on data, which tasks do not have."""
    flags = []
    if settings.data.seq_length != DataSettings.seq_length:
        flags.append(as_typed("seq_length", settings.data.seq_length))
    if settings.training.eval_iters not in ("full", TrainingSettings.eval_iters):
        flags.append(as_typed("eval_iters", settings.training.eval_iters))
    if not flags:
        return []
    return [f"{' '.join(flags)}: without effect on tasks; --max-position-embeddings and --limit make them shorter"]


def benchmark_of(given: TaskSettings, names: tuple[str, ...]) -> Benchmark:
    """The tasks, loaded. Only where lm-evaluation-harness is needed: on the first rank."""
    return benchmark_with(given, load_tasks(names, given.include_path))


def benchmark_with(given: TaskSettings, tasks: Mapping[str, Any]) -> Benchmark:
    return Benchmark(tasks, given.num_fewshot, limit_of(given.limit), given.allow_code)


def wanted_of(settings: Settings, weights: Weights) -> Wanted:
    """What `--task` and its flags ask for."""
    given = settings.evaluation
    assert weights.tokenizer is not None
    return Wanted(
        names=given.task,
        folders=given.task_data_path,
        tokenizer=weights.tokenizer,
        positions=positions_of(settings.model, weights.source),
        max_new_tokens=given.max_new_tokens,
        chain_of_thought=given.chain_of_thought,
    )


def positions_of(model: ModelSettings, source: TensorSource) -> int:
    """The most tokens that the model takes."""
    bounds = (model.max_position_embeddings, source.config.max_position_embeddings)
    return min(bound for bound in bounds if bound is not None)


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
    if given.task and not given.apply_chat_template:
        return None
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
    asking = Asking(
        team=team,
        tokenizer=tokenizer,
        max_length=positions_of(settings.model, source),
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
    if output is not None:
        write_results(output, results, found["samples"] if given.log_samples else {})
    answers.remove()
    return TaskResults(results, found["samples"], chat, list(team.engine.notices))
