"""`--eval-tasks`: benchmarks of lm-evaluation-harness while a run trains. They change nothing in the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem.backends.interface import Engine
from tandem.data.templates.catalog import template_from_entry
from tandem.errors import UserError
from tandem.harness.benchmark import Benchmark, numbers
from tandem.harness.cache import Answers
from tandem.harness.chat import Chat
from tandem.harness.generation import Ends, has_sessions
from tandem.harness.team import Team
from tandem.launch.world import Communicator
from tandem.training.evaluate_tasks import benchmark_of, chat_of, end_ids
from tandem.training.start.prepare import ModelAndProcesses, PreparedRun

TaskMetrics = Mapping[str, Mapping[str, float]]  # task or group -> metric -> value


@dataclass(frozen=True)
class RunTasks:
    """The benchmarks of a run.

    Attributes:
        benchmark: None on other ranks than the first.
        interval: they are asked after iterations that are a multiple of this, and after the last one.
    """

    run: PreparedRun
    team: Team
    benchmark: Benchmark | None
    chat: Chat | None
    interval: int

    def ask(self, before_batch: Callable[[], None]) -> TaskMetrics:
        """What the model scores now, on the first rank; nothing on the others. Collective.

        Args:
            before_batch: called before each batch, at the same time on all ranks. An error in it ends the benchmarks.
        """
        team = dataclasses.replace(self.team, before_batch=before_batch)
        if self.benchmark is None:
            team.follow()
            return {}
        from tandem.harness.model import Asking, TandemLM  # which imports lm-evaluation-harness

        run, tokenizer = self.run, self.run.tokenizer
        assert tokenizer is not None
        asking = Asking(
            team=team,
            tokenizer=tokenizer,
            max_length=run.source.config.max_position_embeddings,
            seed=run.settings.training.seed,
            chat=self.chat,
            answers=Answers(None, {}),
        )
        found = numbers(self.benchmark.ask(TandemLM(asking)))
        team.end()
        return found


def open_tasks(run: PreparedRun, engine: Engine, communicator: Communicator) -> RunTasks | None:
    """Load the tasks of `--eval-tasks`; None when there are none.

    Raises:
        UserError: there is no such task, or its data cannot be read.
    """
    given = run.settings.evaluation
    if not given.eval_tasks:
        return None
    check_tokenizer(run)
    assert run.tokenizer is not None
    chat = chat_of_run(run, run.data.template)
    ends = Ends(run.tokenizer, end_ids(run.source, run.tokenizer, chat))
    keeps = has_sessions(run.grid, run.engine)
    team = Team(engine, communicator, run.grid, ends, keeps, given.tokens_per_batch)
    benchmark = benchmark_of(given, given.eval_tasks) if run.world.rank == 0 else None
    interval = given.eval_tasks_interval or run.settings.training.eval_interval
    return RunTasks(run, team, benchmark, chat, interval)


def check_tasks(start: ModelAndProcesses, template: dict[str, Any] | None) -> None:
    """Raise as `open_tasks`. `template`: that of the data."""
    given = start.settings.evaluation
    if given.eval_tasks:
        check_tokenizer(start)
        assert start.tokenizer is not None
        end_ids(start.source, start.tokenizer, chat_of_run(start, template))
        benchmark_of(given, given.eval_tasks)


def check_tokenizer(start: ModelAndProcesses) -> None:
    if start.tokenizer is None:
        raise UserError("--eval-tasks needs a tokenizer: give its folder with --tokenizer-name-or-path")


def chat_of_run(start: ModelAndProcesses, entry: dict[str, Any] | None) -> Chat | None:
    """The template that the run trains with, or that of its weights; None without `--apply-chat-template`.

    Args:
        entry: the template of the data.
    """
    settings = start.settings
    if not settings.evaluation.apply_chat_template:
        return None
    assert start.tokenizer is not None
    template = template_from_entry(entry, start.tokenizer)
    if template is not None:
        return Chat(start.tokenizer, template, template.enable_thinking)
    return chat_of(settings.evaluation, settings.data, start.source, start.tokenizer)
