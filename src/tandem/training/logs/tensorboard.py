"""TensorBoard's event files."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from tandem.errors import UserError
from tandem.files.publish import check_writable
from tandem.training.logs.log import StepRecord
from tandem.training.logs.scalars import scalars

FLUSH_SECONDS = 10


def check_tensorboard(folder: str) -> None:
    """Raise UserError when the library is not installed, or the folder cannot be written."""
    _library(folder)
    check_writable(folder, "--tensorboard-dir")


class TensorBoardWriter:
    """Writes every `interval`-th step and every evaluation, with TensorBoard's library.

    Args:
        iteration: the last finished iteration. TensorBoard then drops later steps that an earlier process wrote.

    Raises:
        UserError: the library is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: str, interval: int, iteration: int) -> None:
        library = _library(folder)
        self._event, self._summary, self._interval = library.Event, library.Summary, interval
        try:
            self._writer: Any = library.EventFileWriter(folder, flush_secs=FLUSH_SECONDS)
        except OSError as error:
            raise UserError(f"--tensorboard-dir {folder}: {error.strerror}") from error
        start = library.SessionLog(status=library.SessionLog.START)
        self._writer.add_event(library.Event(wall_time=time.time(), step=iteration + 1, session_log=start))

    def on_step(self, record: StepRecord) -> None:
        if record.iteration % self._interval and not (record.validation or record.tasks):
            return
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record).items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=record.iteration, summary=summary))

    def close(self) -> None:
        self._writer.close()


def _library(folder: str) -> Any:
    """What is needed of TensorBoard."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise UserError(f"--tensorboard-dir {folder}: {error}; pip install 'tandem-llm[tensorboard]'") from error
    return SimpleNamespace(Event=Event, SessionLog=SessionLog, Summary=Summary, EventFileWriter=EventFileWriter)
