"""Trains, or asks a model, with several processes, for a Python program that waits for the result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tandem.cli.processes import machines_to_start, start_processes
from tandem.config.parsing import to_yaml
from tandem.config.settings import Settings
from tandem.errors import RunStopped, UserError
from tandem.inference.defaults import SamplingOptions
from tandem.inference.options import LoadOptions
from tandem.logs import log
from tandem.options import as_words, build
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from tandem.training.result import TrainingResult
from tandem.training.run_record import read_starts

USER_ERROR, STOPPED = 2, 75  # exit codes of the command line


def train_as_processes(settings: Settings, write: Callable[[str], None]) -> TrainingResult | None:
    """Train with the processes that `nproc_per_node` asks for. Returns None when this process must train.

    Args:
        write: called with each line that the first rank writes.

    Raises:
        UserError: a rank refused its input, or `save` is missing. The result is read from that folder.
        RunStopped: a signal stopped the job, and it saved a checkpoint.
        RuntimeError: a rank failed in another way.
    """
    machines = machines_to_start(settings)
    if machines is None or machines.processes == 1:
        return None
    save = settings.checkpoint.save
    if save is None:
        raise UserError(
            f"--nproc-per-node {machines.nproc_per_node}: give --save, the folder from which the result is read"
        )
    command = "finetune" if settings.data.is_instruction_dataset else "pretrain"
    with tempfile.TemporaryDirectory(prefix="tandem-settings-") as folder:
        file = Path(folder) / "settings.yaml"
        file.write_text(to_yaml(settings), encoding="utf-8")
        end = start_processes([command, "--config", str(file)], settings, machines, _Lines(write).take)
    assert end is not None, "there are several processes"
    if end.code == USER_ERROR:
        raise UserError(end.text)
    if end.code == STOPPED:
        raise RunStopped(end.text)
    if end.code:
        raise RuntimeError(f"the job ended with code {end.code}: {end.text}")
    first = read_starts(save)[-1]["iteration"]
    steps = [step for step in read_metrics(Path(save) / METRICS_FILE) if step["iteration"] > first]
    return TrainingResult(steps[-1]["iteration"] if steps else first, tuple(steps), Path(save))


@dataclass(frozen=True)
class ModelOfProcesses:
    """A model that several processes answer for. They are started for each call, and open it again."""

    options: LoadOptions
    processes: int

    def generate(self, prompt: str | Sequence[str], **sampling: Any) -> str | list[str]:
        """As `tandem.inference.chat.Model.generate`.

        Raises:
            UserError: a process refused its input.
            RuntimeError: a process failed in another way.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            return []
        settings = Settings(nproc_per_node=self.processes, ai_framework=self.options.ai_framework)
        machines = machines_to_start(settings)
        assert machines is not None, "inside a job, the model is opened without nproc_per_node"
        with tempfile.TemporaryDirectory(prefix="tandem-prompts-") as folder:
            asked, answers = (Path(folder) / name for name in ("prompts.jsonl", "answers.jsonl"))
            asked.write_bytes(b"".join(orjson.dumps({"prompt": text}) + b"\n" for text in prompts))
            words = [*as_words(self.options), *as_words(build(SamplingOptions, sampling))]
            words += ["--prompts-file", str(asked), "--output", str(answers)]
            words += ["--nproc-per-node", str(self.processes)]
            end = start_processes(["generate", *words], settings, machines, _Lines(log.info).take)
            assert end is not None, "there are several processes"
            if end.code == USER_ERROR:
                raise UserError(end.text)
            if end.code:
                raise RuntimeError(f"the job ended with code {end.code}: {end.text}")
            texts = [orjson.loads(line)["text"] for line in answers.read_bytes().splitlines()]
        return texts[0] if isinstance(prompt, str) else texts


class _Lines:
    """Collects pieces of text and writes whole lines."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._rest = write, ""

    def take(self, text: str) -> None:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self._write(line)
