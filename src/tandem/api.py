"""Tandem from Python: one function per command.

Keywords are the commands' long flags with underscores, and a switch is `True`; where a command takes words without a
flag, the function takes them without a keyword. Values are checked as on the command line: a wrong one raises
`tandem.UserError`, which names the flag, the path or the tensor.

Progress goes to the logger "tandem" of the standard library's `logging`; nothing is printed. To see it:

>>> import logging
>>> logging.basicConfig(format="%(message)s", level=logging.INFO)
"""

from __future__ import annotations

import dataclasses
import inspect as signatures
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast, overload

from tandem.config.settings import (
    CheckpointSettings,
    DataSettings,
    LaunchSettings,
    LoggingSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    Settings,
    TrainingSettings,
)
from tandem.conversion.options import ConvertOptions, ExportOptions
from tandem.data.preprocess.options import MergeOptions, PreprocessOptions
from tandem.errors import UserError
from tandem.inference.options import LoadOptions
from tandem.logs import lines_of_progress, log
from tandem.options import build, expand
from tandem.planning.options import PlanOptions

if TYPE_CHECKING:
    from tandem.checkpoints.describe import Description
    from tandem.conversion.convert import Converted
    from tandem.data.preprocess.run import PreprocessSummary
    from tandem.data.statistics import Statistics
    from tandem.inference.chat import Model
    from tandem.planning.run import LayoutPlan, Suggestions
    from tandem.training.evaluation import Choices, Evaluation
    from tandem.training.result import TrainingResult

P = ParamSpec("P")
OptionsT = TypeVar("OptionsT")
ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


def _takes(kind: Callable[P, OptionsT]) -> Callable[[Callable[[OptionsT], ResultT]], Callable[P, ResultT]]:
    """Make a function of options a function of their fields."""

    def decorate(function: Callable[[OptionsT], ResultT]) -> Callable[P, ResultT]:
        @wraps(function)
        def call(*words: P.args, **keywords: P.kwargs) -> ResultT:
            return function(_options(cast(Any, kind), function.__name__, words, keywords))

        call.__signature__ = signatures.signature(kind)  # type: ignore[attr-defined]
        return call

    return decorate


class Trains(Protocol[P, ResultT_co]):
    """A function of whole `Settings`, or of all settings as keywords."""

    @overload
    def __call__(self, settings: Settings, /) -> ResultT_co: ...

    @overload
    def __call__(self, *words: P.args, **keywords: P.kwargs) -> ResultT_co: ...


def _takes_settings(
    kind: Callable[P, AllSettings],
) -> Callable[[Callable[[Settings], ResultT]], Trains[P, ResultT]]:
    """Make a function of settings one that takes them as keywords, too."""

    def decorate(function: Callable[[Settings], ResultT]) -> Trains[P, ResultT]:
        @wraps(function)
        def call(*words: Any, **keywords: Any) -> ResultT:
            if len(words) == 1 and not keywords and isinstance(words[0], Settings):
                return function(words[0])
            return function(Settings(**vars(_options(AllSettings, function.__name__, words, keywords))))

        call.__signature__ = signatures.signature(kind)  # type: ignore[attr-defined]
        return cast("Trains[P, ResultT]", call)

    return decorate


def _options(kind: type[OptionsT], function: str, words: tuple[Any, ...], keywords: dict[str, Any]) -> OptionsT:
    """The options that a call gives."""
    if len(words) == 1 and not keywords and isinstance(words[0], kind):
        return words[0]
    names = [field.name for field in dataclasses.fields(cast(Any, kind)) if not field.kw_only]
    if len(words) > len(names):
        raise TypeError(f"{function}() takes {len(names)} arguments without a keyword: {', '.join(names)}")
    return build(kind, {**dict(zip(names, words)), **keywords})


def _logged(description: str) -> Callable[[int, int | None], None]:
    """Progress that goes to the log."""
    return lines_of_progress(description, log.info)


@dataclass(frozen=True, kw_only=True)
class AllSettings(
    ModelSettings,
    ParallelSettings,
    DataSettings,
    OptimizerSettings,
    TrainingSettings,
    LoggingSettings,
    CheckpointSettings,
    LaunchSettings,
):
    """Every setting of a run, as keywords."""


@_takes(PreprocessOptions)
def preprocess(options: PreprocessOptions) -> PreprocessSummary:
    """Turn text, conversations or preferences into `.bin/.idx` files, as `tandem preprocess` does.

    Examples:
        >>> tandem.preprocess("chat.jsonl", "run/chat", "qwen3-0.6b", prompt_type="qwen3").sequences  # doctest: +SKIP
        12000

    Raises:
        UserError: options contradict each other, a row is unusable, or nothing was kept.
    """
    from tandem.data.preprocess.run import preprocess as run

    progress = _logged("tokenising")
    return run(options, lambda _, text_bytes: progress(text_bytes, None))


@_takes(MergeOptions)
def merge(options: MergeOptions) -> list[str]:
    """Merge `.bin/.idx` files that were preprocessed in parts; returns the prefixes written.

    Raises:
        UserError: parts are missing, or do not belong together.
    """
    from tandem.data.preprocess.merge import merge_groups

    return merge_groups(options.input, options.merge_group_keys, options.output_prefix)


@_takes(ConvertOptions)
def convert(options: ConvertOptions) -> Converted:
    """Convert weights between Hugging Face and Megatron-core layout, as `tandem convert` does.

    Examples:
        >>> tandem.convert("qwen3-0.6b", "run/mcore", target_tensor_parallel_size=2).folder  # doctest: +SKIP
        PosixPath('run/mcore')

    Raises:
        UserError: the source is damaged, the target exists, or both do not compute the same.
    """
    from tandem.conversion.run import run_conversion

    return run_conversion(options, _logged("converting"))


@_takes(ExportOptions)
def export(options: ExportOptions) -> Converted:
    """Write a checkpoint as a Hugging Face folder, as `tandem export` does.

    Raises:
        UserError: the checkpoint is damaged, or the target exists.
    """
    from tandem.conversion.run import run_export

    return run_export(options, _logged("exporting"))


@_takes_settings(AllSettings)
def train(settings: Settings) -> TrainingResult:
    """Train as the settings say: on text, or with `is_instruction_dataset=True` on conversations.

    Settings are keywords, or one `tandem.Settings`. With `nproc_per_node` above 1 the processes are started as the
    command line does, and `save` is required.

    Examples:
        >>> tandem.train(
        ...     load="run/mcore", data_path="run/text_text_document", train_iters=2, lr=1e-4, seq_length=512
        ... ).losses  # doctest: +SKIP
        [5.834, 5.712]

    Raises:
        UserError: something is missing, contradictory or damaged, or a step went wrong.
        RunStopped: a signal ended the run, after it saved; the same call goes on.
    """
    from tandem.cli.job import train_as_processes
    from tandem.training.result import train_and_collect

    return train_as_processes(settings, log.info) or train_and_collect(settings)


@_takes_settings(AllSettings)
def pretrain(settings: Settings) -> TrainingResult:
    """Train on text, as `tandem pretrain` does; see `train`."""
    if settings.data.is_instruction_dataset or settings.data.stage:
        raise UserError("--is-instruction-dataset and --stage belong to `tandem finetune`")
    return train(settings)


@_takes_settings(AllSettings)
def finetune(settings: Settings) -> TrainingResult:
    """Train on conversations, of which only the answers count, as `tandem finetune` does; see `train`."""
    data = dataclasses.replace(settings.data, is_instruction_dataset=True)
    return train(dataclasses.replace(settings, data=data))


def evaluate(load: str | Path, *data: str | Path, **settings: Any) -> dict[str, Evaluation | Choices]:
    """The loss of a checkpoint on data, or its accuracy on questions, as `tandem evaluate` finds them.

    Args:
        load: checkpoint, or Hugging Face folder.
        data: PREFIX, or NAME=PREFIX for several sets; a FILE.jsonl holds questions with choices.
        settings: fields of `Settings`. Whole sets are taken; `eval_iters` takes less.

    Returns:
        By name of the set, its `loss`, `perplexity` and `tokens`, or its `accuracy`.

    Raises:
        UserError: weights, data or layout do not fit together.
    """
    from tandem.training.evaluate import evaluate_weights

    results, notices = evaluate_weights(
        Settings(**{"eval_iters": "full", **settings, "load": load, "valid_data_path": [*map(str, data)]})
    )
    for notice in notices:
        log.info("> %s", notice)
    return results


@_takes(PlanOptions)
def plan(options: PlanOptions) -> LayoutPlan | Suggestions:
    """Memory, traffic and speed of a layout; with `devices`, the layouts that fit. As `tandem plan`.

    Examples:
        >>> found = tandem.plan("qwen3-8B", hardware="910b", devices=16, global_batch_size=64, bf16=True)
        >>> found.plans[0].job.tensor_size
        1

    Raises:
        UserError: the model is unknown, or the layout does not divide.
    """
    from tandem.planning.run import plan as run

    return run(options)


def inspect(path: str | Path, *, ckpt_step: int | None = None, quick: bool = False) -> Description | Statistics:
    """What a checkpoint holds and whether it is undamaged, or what preprocessed data hold, as `tandem inspect`.

    Args:
        path: a checkpoint, a Hugging Face folder, or the prefix of preprocessed data.
        ckpt_step: iteration; default: the newest.
        quick: check headers and shapes only; read no tensor.

    Raises:
        UserError: it is none of these, or damaged.
    """
    from tandem.checkpoints.describe import describe, with_integrity
    from tandem.data.kinds import kind_of
    from tandem.data.statistics import DataView

    path = expand(str(path))
    if kind_of(path) is not None:
        return DataView(path).statistics()
    description = describe(path, ckpt_step)
    return description if quick else with_integrity(description, _logged("reading"))


@_takes(LoadOptions)
def load(options: LoadOptions) -> Model:
    """Open a Hugging Face folder or a checkpoint to ask it.

    Examples:
        >>> model = tandem.load("run/exported")  # doctest: +SKIP
        >>> model.generate(["Reverse 123.", "Reverse 45."], max_new_tokens=8)  # doctest: +SKIP
        ['321', '54']

    Raises:
        UserError: there is no model, or no tokenizer with it and none is named.
    """
    from tandem.inference.chat import open_model

    return open_model(options)
