"""A thread that answers many questions at a time, to one model or several. It opens the models, and it alone computes.

Other threads ask it, and hear from it piece by piece.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from tandem.inference.answers import Answer, Piece
from tandem.inference.chat import Model
from tandem.inference.sampling import Sampling
from tandem.inference.scheduler import MAX_BATCH_SIZE, FinishReason, Request, Scheduler, Top, default_room
from tandem.logs import log


@dataclass(frozen=True)
class Query:
    """What to continue, and how.

    Attributes:
        prompt: token ids.
        answer: reads the tokens.
        top_logprobs: how many of the most likely tokens are told for each token.
        prompt_logprobs: whether log-probabilities of the prompt's tokens are told, too.
    """

    model: str
    prompt: Sequence[int]
    sampling: Sampling
    stop_ids: Collection[int]
    answer: Answer
    top_logprobs: int = 0
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class Update:
    """What is new of an answer.

    Attributes:
        tokens: of these, `logprobs` and `top` tell as `Request` does. Their text may be in a later update.
        finish_reason: why the answer ended; None while it goes on.
        prompt_logprobs, prompt_top: of the prompt, in the first update, if they were asked for.
        shared_tokens: of the prompt, in the first update: those that were not computed for it.
        error: why there will be no more of it.
    """

    pieces: Sequence[Piece] = ()
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    top: Sequence[Top] = ()
    finish_reason: FinishReason | None = None
    prompt_logprobs: Sequence[float | None] = ()
    prompt_top: Sequence[Top | None] = ()
    shared_tokens: int = 0
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Job:
    """A question that is being answered. `tell` is called in the worker's thread."""

    query: Query
    tell: Callable[[Update], None]
    request: Request | None = None
    told: int | None = None  # tokens; None before the first update

    def update(self, request: Request) -> Update | None:
        """What is new; None if there is nothing."""
        is_first, begin = self.told is None, self.told or 0
        answer, tokens, reason = self.query.answer, request.tokens[begin:], request.finish_reason
        if not tokens and reason is None:
            return None
        self.told = begin + len(tokens)
        pieces = answer.feed(tokens)
        if answer.stopped:
            reason = "stop"
        return Update(
            [*pieces, *answer.end()] if reason else pieces,
            tokens,
            request.logprobs[begin:],
            request.top[begin:],
            reason,
            request.prompt_logprobs if is_first else (),
            request.prompt_top if is_first else (),
            request.shared_tokens if is_first else 0,
        )


def scheduler_next_to(others: Sequence[Scheduler], model: Model, models: int, max_batch_size: int | None) -> Scheduler:
    """One of a model, which shares the free memory with those of `models` models. Ranks follow all of them together."""
    texts = MAX_BATCH_SIZE if max_batch_size is None else max_batch_size
    return Scheduler(model.engine, texts, default_room(model.engine, texts, models), others[0] if others else None)


class Worker:
    """Answers questions in a thread of its own.

    Attributes:
        models: by name; empty until they are open.
        failure: why they could not be opened, or why the thread ended.

    Args:
        open_models: called in the thread, since some frameworks compute only where the model was opened. The models are
            on the same processes (`open_models`).
        max_batch_size: how many answers of a model are computed at a time; others wait.
        when_open: called in the thread when the models are open.
        when_failed: called in the thread when there is a `failure`. It then ends.
    """

    def __init__(
        self,
        open_models: Callable[[], Mapping[str, Model]],
        max_batch_size: int | None = None,
        when_open: Callable[[], None] = lambda: None,
        when_failed: Callable[[], None] = lambda: None,
    ) -> None:
        self.models: Mapping[str, Model] = {}
        self.failure: BaseException | None = None
        self._open_models, self._max_batch_size = open_models, max_batch_size
        self._when_open, self._when_failed = when_open, when_failed
        self._schedulers: dict[str, Scheduler] = {}
        self._jobs: set[Job] = set()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="tandem-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return bool(self.models) and self._thread.is_alive()

    def ask(self, query: Query, tell: Callable[[Update], None]) -> Job:
        """Begin an answer. `tell` hears of it, in the worker's thread, until `is_last`."""
        job = Job(query, tell)
        self._calls.put(lambda: self._begin(job))
        return job

    def cancel(self, job: Job) -> None:
        """Give up an answer, if it has not ended. Nothing more is told of it."""
        self._calls.put(lambda: self._give_up(job))

    def end(self, timeout: float | None = None) -> None:
        """Finish all answers that are begun, then end the thread. Waits for it at most `timeout` seconds."""
        self._calls.put(self._finish)
        self._thread.join(timeout)

    # --- in the thread

    def _run(self) -> None:
        try:
            models = self._open_models()
            for name, model in models.items():
                self._begin_session(name, model, len(models))
            self.models = models
            self._when_open()
            while self._jobs or not self._ends:
                self._take_calls()
                for name, scheduler in list(self._schedulers.items()):
                    self._step(name, scheduler)
                for job in list(self._jobs):
                    self._tell_news(job)
            for scheduler in self._schedulers.values():
                scheduler.close()
            next(iter(models.values())).communicator.close()
        except BaseException as error:  # noqa: BLE001 - raised again where the worker was made
            self.failure = error
            for job in self._jobs:
                job.tell(Update(error=RuntimeError("the worker has failed")))
            self._when_failed()

    def _begin_session(self, name: str, model: Model, models: int) -> None:
        """A new state of a model, which shares the free memory with the other ones."""
        self._schedulers.pop(name, None)
        self._schedulers[name] = scheduler = self._scheduler(model, models)
        log.info("> %s: %s", name, scheduler.notice)

    def _scheduler(self, model: Model, models: int) -> Scheduler:
        return scheduler_next_to(list(self._schedulers.values()), model, models, self._max_batch_size)

    def _take_calls(self) -> None:
        """Do what other threads have asked for. With nothing to compute, wait for them."""
        while True:
            try:
                call = self._calls.get(block=not self._jobs and not self._ends)
            except queue.Empty:
                return
            call()

    def _begin(self, job: Job) -> None:
        query = job.query
        try:
            job.request = self._schedulers[query.model].submit(
                query.prompt,
                query.sampling,
                query.stop_ids,
                top_logprobs=query.top_logprobs,
                prompt_logprobs=query.prompt_logprobs,
            )
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            job.tell(Update(error=error))
        else:
            self._jobs.add(job)

    def _give_up(self, job: Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
            assert job.request is not None
            self._schedulers[job.query.model].cancel(job.request)

    def _finish(self) -> None:
        self._ends = True

    def _step(self, name: str, scheduler: Scheduler) -> None:
        """One step of a model. If it fails, all its answers end with the error, and it begins with a new state.

        A model of several processes ends: the others do not know that a step failed.
        """
        try:
            scheduler.step()
        except Exception as error:
            log.exception("> a step of %s failed", name)
            for job in [job for job in self._jobs if job.query.model == name]:
                self._jobs.remove(job)
                job.tell(Update(error=error))
            if self.models[name].grid.size > 1:
                raise
            scheduler.close()
            self._begin_session(name, self.models[name], len(self.models))

    def _tell_news(self, job: Job) -> None:
        assert job.request is not None
        update = job.update(job.request)
        if update is None:
            return
        if update.is_last:
            self._jobs.remove(job)
            if job.request.finish_reason is None:  # a stop string
                self._schedulers[job.query.model].cancel(job.request)
        job.tell(update)
