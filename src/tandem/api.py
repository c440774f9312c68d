"""Tandem from Python: one function per command.

Keywords are the long flags of the commands, with underscores. A switch is `True`. Values that a command takes without
a flag may be given without a keyword. Values are checked as on the command line. A wrong value raises
`tandem.UserError`, which names the flag, the path or the tensor.

Progress goes to the logger "tandem" of Python's `logging`. Nothing is printed. To see the progress:

>>> import logging
>>> logging.basicConfig(format="%(message)s", level=logging.INFO)
"""

from __future__ import annotations

import dataclasses
import inspect as signatures
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast, overload

from tandem.config.checks import wrong_stage
from tandem.config.settings import (
    CheckpointSettings,
    DataSettings,
    ExpertSettings,
    LaunchSettings,
    LoggingSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    PreferenceSettings,
    Settings,
    TaskSettings,
    TrainingSettings,
)
from tandem.conversion.certificate.options import VerifyOptions
from tandem.conversion.options import ConvertOptions, ExportOptions
from tandem.data.preprocess.options import MergeOptions, PreprocessOptions
from tandem.errors import UserError, raise_all
from tandem.inference.options import LoadOptions
from tandem.logs import lines_of_progress, lines_of_requests, log
from tandem.options import build, expand, options_of
from tandem.planning.options import PlanOptions

if TYPE_CHECKING:
    from tandem.checkpoints.describe import Description
    from tandem.cli.job import ModelOfProcesses
    from tandem.conversion.certificate.result import Verified
    from tandem.conversion.convert import Converted
    from tandem.data.preprocess.run import PreprocessSummary
    from tandem.data.statistics import Statistics
    from tandem.inference.chat import Model
    from tandem.planning.run import LayoutPlan, Suggestions
    from tandem.training.evaluate_tasks import TaskResults
    from tandem.training.evaluation import Choices
    from tandem.training.objectives import Evaluation
    from tandem.training.result import TrainingResult

P = ParamSpec("P")
OptionsT = TypeVar("OptionsT")
ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


def _takes(kind: Callable[P, OptionsT]) -> Callable[[Callable[[OptionsT], ResultT]], Callable[P, ResultT]]:
    """Turn a function of a dataclass of options into a function of its fields."""

    def decorate(function: Callable[[OptionsT], ResultT]) -> Callable[P, ResultT]:
        @wraps(function)
        def call(*words: P.args, **keywords: P.kwargs) -> ResultT:
            return function(_options(cast(Any, kind), function.__name__, words, keywords))

        call.__signature__ = signatures.signature(kind)  # type: ignore[attr-defined]
        return call

    return decorate


class Trains(Protocol[P, ResultT_co]):
    """A function that takes one `Settings`, or every setting as a keyword."""

    @overload
    def __call__(self, settings: Settings, /) -> ResultT_co: ...

    @overload
    def __call__(self, *words: P.args, **keywords: P.kwargs) -> ResultT_co: ...


def _takes_settings(
    kind: Callable[P, AllSettings],
) -> Callable[[Callable[[Settings], ResultT]], Trains[P, ResultT]]:
    """Turn a function of `Settings` into one that also takes settings as keywords."""

    def decorate(function: Callable[[Settings], ResultT]) -> Trains[P, ResultT]:
        @wraps(function)
        def call(*words: Any, **keywords: Any) -> ResultT:
            if len(words) == 1 and not keywords and isinstance(words[0], Settings):
                return function(words[0])
            settings = Settings(**vars(_options(AllSettings, function.__name__, words, keywords)))
            raise_all(wrong_stage(settings, keywords, function.__name__))
            return function(settings)

        call.__signature__ = signatures.signature(kind)  # type: ignore[attr-defined]
        return cast("Trains[P, ResultT]", call)

    return decorate


def _options(kind: type[OptionsT], function: str, words: tuple[Any, ...], keywords: dict[str, Any]) -> OptionsT:
    """The options in the arguments of a call."""
    if len(words) == 1 and not keywords and isinstance(words[0], kind):
        return words[0]
    names = [field.name for field in dataclasses.fields(cast(Any, kind)) if not field.kw_only]
    if len(words) > len(names):
        raise TypeError(f"{function}() takes {len(names)} arguments without a keyword: {', '.join(names)}")
    return build(kind, {**dict(zip(names, words)), **keywords})


def _logged(description: str) -> Callable[[int, int | None], None]:
    """A function that writes progress to the log."""
    return lines_of_progress(description, log.info)


@dataclass(frozen=True, kw_only=True)
class AllSettings(
    ModelSettings,
    ExpertSettings,
    ParallelSettings,
    DataSettings,
    OptimizerSettings,
    TrainingSettings,
    LoraSettings,
    PreferenceSettings,
    LoggingSettings,
    CheckpointSettings,
    LaunchSettings,
    TaskSettings,
):
    """Every setting of a run, as keywords."""


@_takes(PreprocessOptions)
def preprocess(options: PreprocessOptions) -> PreprocessSummary:
    """Turn text, conversations or preferences into `.bin/.idx` files, as `tandem preprocess` does.

    Examples:
        >>> tandem.preprocess("chat.jsonl", "run/chat", "qwen3-0.6b", prompt_type="qwen3").sequences  # doctest: +SKIP
        12000

    Raises:
        UserError: options contradict each other, a row cannot be used, or no row was kept.
    """
    from tandem.data.preprocess.run import preprocess as run

    progress = _logged("tokenising")
    return run(options, lambda _, text_bytes: progress(text_bytes, None))


@_takes(MergeOptions)
def merge(options: MergeOptions) -> list[str]:
    """Merge `.bin/.idx` files that were preprocessed in parts.

    Returns:
        The prefixes of the files that were written.

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
        UserError: the source is damaged, the target exists, or the result computes something else than the source.
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


@_takes(VerifyOptions)
def verify(options: VerifyOptions) -> Verified:
    """Compare an exported folder, or a server with `url`, with what training computes, as `tandem verify` does.

    Examples:
        >>> tandem.verify("run/exported").differences  # doctest: +SKIP
        ()

    Raises:
        UserError: there is no certificate, the folder cannot be opened, or the server does not answer.
    """
    from tandem.conversion.certificate.run import run_verify

    return run_verify(options)


@_takes_settings(AllSettings)
def train(settings: Settings) -> TrainingResult:
    """Train on text, or on conversations with `is_instruction_dataset=True`.

    Give settings as keywords, or one `tandem.Settings`. `nproc_per_node` above 1 starts that many processes, as the
    command line does. It needs `save`.

    Examples:
        >>> tandem.train(
        ...     load="run/mcore", data_path="run/text_text_document", train_iters=2, lr=1e-4, seq_length=512
        ... ).losses  # doctest: +SKIP
        [5.834, 5.712]

    Raises:
        UserError: settings or files are missing, wrong or damaged, or a step failed.
        RunStopped: a signal stopped the run, and the run saved a checkpoint. The same call continues it.
    """
    if settings.launch.dry_run:
        raise UserError("--dry-run: the Python functions train; use `tandem pretrain --dry-run`")
    from tandem.cli.job import train_as_processes
    from tandem.training.result import train_and_collect

    return train_as_processes(settings, log.info) or train_and_collect(settings)


@_takes_settings(AllSettings)
def pretrain(settings: Settings) -> TrainingResult:
    """Train on text, as `tandem pretrain` does. See `train`."""
    if settings.data.is_instruction_dataset or settings.data.stage:
        raise UserError("--is-instruction-dataset and --stage belong to `tandem finetune`")
    return train(settings)


@_takes_settings(AllSettings)
def finetune(settings: Settings) -> TrainingResult:
    """Train on conversations, as `tandem finetune` does. The loss counts only the answers. See `train`."""
    data = dataclasses.replace(settings.data, is_instruction_dataset=True)
    return train(dataclasses.replace(settings, data=data))


@overload
def evaluate(load: str | Path, *, tasks: Sequence[str], **settings: Any) -> TaskResults: ...


@overload
def evaluate(load: str | Path, *, task: Sequence[str], **settings: Any) -> TaskResults: ...


@overload
def evaluate(load: str | Path, *data: str | Path, **settings: Any) -> dict[str, Evaluation | Choices]: ...


def evaluate(load: str | Path, *data: str | Path, **settings: Any) -> dict[str, Evaluation | Choices] | TaskResults:
    """The loss of a checkpoint on data, or its scores in benchmarks, as `tandem evaluate` does.

    Examples:
        >>> tandem.evaluate("run/mcore", "run/valid_text_document", seq_length=512)["validation"].loss  # doctest: +SKIP
        2.31
        >>> found = tandem.evaluate("run/tuned", tasks=["gsm8k"], limit=100, num_fewshot=5)  # doctest: +SKIP
        >>> found.results["results"]["gsm8k"]["exact_match,strict-match"]  # doctest: +SKIP
        0.41

    Args:
        load: checkpoint, or Hugging Face folder.
        data: PREFIX of preprocessed data, or NAME=PREFIX for each of several sets. A FILE.jsonl of questions with
            choices also works.
        settings: fields of `Settings`. Whole sets are used; `eval_iters` sets a smaller number of batches. `tasks`, or
            MindSpeed-LLM's `task`, asks benchmarks in place of data, with the other settings of `TaskSettings`.

    Returns:
        For each set, by name: its `loss`, `perplexity` and `tokens`; of preferences also `metrics`; of questions its
        `accuracy`. For benchmarks, `results` and `samples` as lm-evaluation-harness has them.

    Raises:
        UserError: weights, data, tasks or layout do not fit together.
    """
    from tandem.training.evaluate import evaluate_weights
    from tandem.training.evaluate_tasks import defaults_of_tasks, evaluate_tasks

    if data and "valid_data_path" in settings:
        raise UserError("valid_data_path and data without a keyword are the same: give one of them")
    places = {"valid_data_path": [*map(str, data)]} if data else {}
    defaults = {"eval_iters": "full", **defaults_of_tasks(asks_upstream=bool(settings.get("task")))}
    chosen = Settings(**{**defaults, **settings, **places, "load": load})
    if chosen.launch.nproc_per_node not in (None, 1):
        raise UserError("--nproc-per-node: the Python function evaluates in this process; use `tandem evaluate`")
    if chosen.evaluation.tasks or chosen.evaluation.task:
        found = evaluate_tasks(chosen, lines_of_requests(log.info))
        _log_notices(found.notices)
        return found
    results, notices = evaluate_weights(chosen)
    _log_notices(notices)
    return results


def _log_notices(notices: Sequence[str]) -> None:
    for notice in notices:
        log.info("> %s", notice)


@_takes(PlanOptions)
def plan(options: PlanOptions) -> LayoutPlan | Suggestions:
    """Memory, traffic and speed of one layout, as `tandem plan` shows. With `devices`, the layouts that fit.

    Examples:
        >>> suggestions = tandem.plan("qwen3-8B", hardware="910b", devices=16, global_batch_size=64, bf16=True)
        >>> suggestions.plans[0].job.tensor_size
        1

    Raises:
        UserError: the model is unknown, or the layout does not divide the model or the batch evenly.
    """
    from tandem.planning.run import plan as run

    return run(options)


def inspect(path: str | Path, *, ckpt_step: int | None = None, quick: bool = False) -> Description | Statistics:
    """The contents of a checkpoint, with a check for damage, or of preprocessed data, as `tandem inspect` shows.

    Examples:
        >>> tandem.inspect("run/mcore", quick=True).config.num_layers  # doctest: +SKIP
        28

    Args:
        path: a checkpoint, a Hugging Face folder, or the prefix of preprocessed data.
        ckpt_step: iteration to show; default: the newest.
        quick: check only headers and shapes; do not read tensors.

    Raises:
        UserError: the path is none of these, or both data and a folder with a model, or the files are damaged.
    """
    from tandem.checkpoints.describe import describe, with_integrity
    from tandem.checkpoints.recognise import is_model_folder
    from tandem.data.kinds import kind_of
    from tandem.data.statistics import DataView

    path = expand(str(path))
    if kind_of(path) is not None:
        if is_model_folder(Path(path)):
            raise UserError(f"{path} is preprocessed data, and also a folder with a model: rename one of the two")
        return DataView(path).statistics()
    description = describe(path, ckpt_step)
    return description if quick else with_integrity(description, _logged("reading"))


@dataclass(frozen=True)
class ProcessOptions(LoadOptions):
    """A model to ask, and how many processes answer."""

    nproc_per_node: int | None = field(default=None, kw_only=True)
    """Number of processes to start for each call of `generate`. Leave it out for one, or under torchrun or msrun."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.nproc_per_node is not None and self.nproc_per_node < 1:
            yield f"--nproc-per-node {self.nproc_per_node}: expected 1 or more"


@_takes(ProcessOptions)
def load(options: ProcessOptions) -> Model | ModelOfProcesses:
    """Open a Hugging Face folder or a checkpoint to ask questions.

    `nproc_per_node` starts that many processes for each call, which open the model again: give all prompts in one call.

    Examples:
        >>> model = tandem.load("run/exported")  # doctest: +SKIP
        >>> model.generate(["Reverse 123.", "Reverse 45."], max_new_tokens=8)  # doctest: +SKIP
        ['321', '54']

    Raises:
        UserError: there is no model in the folder, or no tokenizer in the folder and none is given.
    """
    if options.nproc_per_node not in (None, 1):
        from tandem.cli.job import ModelOfProcesses

        own = {name: getattr(options, name) for name in options_of(LoadOptions)}
        return ModelOfProcesses(LoadOptions(**own), options.nproc_per_node)
    from tandem.inference.chat import open_model

    return open_model(options)
