"""The quickstart: convert, preprocess, pretrain, fine-tune, export and ask. Each step runs the public command."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.checkpoints.folders import saved_iterations
from tandem.config.parsing import from_dict
from tandem.config.settings import Settings
from tandem.conversion.as_trained import export
from tandem.conversion.convert import convert
from tandem.conversion.options import ConvertOptions, ExportOptions
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.errors import UserError
from tandem.files.publish import write_text_atomically
from tandem.files.text import read_json
from tandem.frameworks import check_framework, installed_frameworks
from tandem.inference.chat import open_model
from tandem.inference.options import LoadOptions
from tandem.inference.sampling import Sampling
from tandem.options import Options, PathText, flag_of
from tandem.quickstart.report import Stage, print_table, save_curve
from tandem.quickstart.tasks import World, make_world, write_world
from tandem.quickstart.toy_model import write_toy_model
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from tandem.training.run import train

SEED = 1234
SEQ_LENGTH = 64
OPTIONS_FILE = "quickstart.json"  # the options, by which the same command is recognised


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions(Options):
    """Options of `tandem quickstart`."""

    backend: Literal["mindspore", "torch", "both"] | None = None
    """Which framework trains; default: both, or the one that is installed. With both, MindSpore trains first and
    PyTorch continues from its checkpoint."""
    work_dir: PathText = "quickstart_run"
    """Folder for all results. Must be empty or new, or hold a quickstart that was interrupted: it goes on."""
    pretrain_iters: int = 150
    """Steps of pretraining."""
    finetune_iters: int = 300
    """Steps of fine-tuning; with both, each backend does half."""
    questions: int = 200
    """Number of held-out questions to ask."""

    def backends(self) -> list[str]:
        """The frameworks that train, in order.

        Raises:
            UserError: one of them is not installed.
        """
        chosen = {"both": ["mindspore", "torch"], None: sorted(one.name for one in installed_frameworks())}
        backends = chosen.get(self.backend, [str(self.backend)]) or ["torch"]
        return [check_framework(name).name for name in backends]


def quickstart(options: QuickstartOptions) -> list[Stage]:
    """Run all steps, print a table, and save the loss curve as `loss.png`.

    Steps that an interrupted quickstart in the same folder has finished are not run again.

    Returns:
        The stages, each with its steps and its held-out accuracy.

    Raises:
        UserError: a framework is missing, or the folder holds something else, or was begun with other options.
    """
    # Matrix products this small gain nothing from threads, and waiting threads are slow on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start = time.perf_counter()
    work, backends = Path(options.work_dir), options.backends()
    begin(work, options, backends)

    world = make_world(SEED)
    prepare(world, work)
    held_out = world.held_out[: options.questions]
    stages = [Stage("before training", backends[0], accuracy(work / "hf", backends[0], held_out))]

    say(f"pretrain on {backends[0]}")
    if newest(work / "pretrained") < options.pretrain_iters:
        train(pretrain_settings(work, backends[0], options))
    right = accuracy(work / "pretrained", backends[0], held_out)
    stages.append(Stage("pretrain", backends[0], right, steps_of(work / "pretrained")))

    ends = [options.finetune_iters * (number + 1) // len(backends) for number in range(len(backends))]
    for number, (backend, end) in enumerate(zip(backends, ends)):
        say(f"fine-tune on {backend}" + (", from the other backend's checkpoint" if number else ""))
        if newest(work / "finetuned") < end:
            train(finetune_settings(work, backend, options, first=number == 0, stop_after=end))
        right = accuracy(work / "finetuned", backend, held_out, iteration=end)
        steps = [step for step in steps_of(work / "finetuned") if step["iteration"] <= end]
        stages.append(Stage("fine-tune", backend, right, steps[ends[number - 1] if number else 0 :]))

    say("export to Hugging Face, and ask the exported model")
    if not (work / "exported").exists():
        export(ExportOptions(load=str(work / "finetuned"), save_dir=str(work / "exported")))
    stages.append(Stage("exported", backends[-1], accuracy(work / "exported", backends[-1], held_out, show=4)))
    save_curve(stages, work / "loss.png")
    print_table(stages, len(held_out), time.perf_counter() - start)
    print(f"loss curve: {work / 'loss.png'}   model for transformers: {work / 'exported'}")
    return stages


def begin(work: Path, options: QuickstartOptions, backends: list[str]) -> None:
    """Make the folder, or see that it holds the same quickstart, which then goes on.

    Raises:
        UserError: the folder holds something else, or a quickstart with other options.
    """
    chosen = {**vars(options), "backend": backends, "work_dir": None}
    if not work.exists() or not any(work.iterdir()):
        write_text_atomically(work / OPTIONS_FILE, json.dumps(chosen) + "\n")
        return
    if not (work / OPTIONS_FILE).exists():
        raise UserError(f"--work-dir {work} is not empty; remove it or choose another")
    before = read_json(work / OPTIONS_FILE)
    if different := [f"{flag_of(name)} {before.get(name)}" for name in chosen if before.get(name) != chosen[name]]:
        raise UserError(
            f"--work-dir {work} holds a quickstart with {' '.join(different)}: give the same, remove the folder or "
            f"choose another"
        )
    print(f"{work} holds this quickstart: what is done is not done again; remove the folder to begin again")


def newest(folder: Path) -> int:
    """The newest iteration that a training has saved in a folder; 0 without one."""
    return max(saved_iterations(folder), default=0)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The steps of a training, as in metrics.jsonl."""
    return read_metrics(folder / METRICS_FILE)


def prepare(world: World, work: Path) -> None:
    """Write text, questions and a toy model in Hugging Face form; convert the model and preprocess the rest."""
    say("write a small world, train a tokenizer on it, make a toy Qwen3 with random weights")
    corpus, instructions = work / "corpus.jsonl", work / "instructions.json"
    if not (work / "hf").exists():
        corpus, instructions = write_world(world, work)
        write_toy_model(work / "hf", world.text + [item["instruction"] for item in world.train], SEED)
    print(f"{len(world.text):,} texts, {len(world.train):,} questions")
    say("convert Hugging Face -> Megatron-core layout, TP 2, PP 2")
    if not (work / "mcore").exists():
        converted = convert(
            ConvertOptions(
                load_dir=str(work / "hf"),
                save_dir=str(work / "mcore"),
                target_tensor_parallel_size=2,
                target_pipeline_parallel_size=2,
            )
        )
        print(f"{converted.tensors} tensors, {converted.parameters:,} parameters")
    say("preprocess text and questions to .bin/.idx")
    tokenizer = str(work / "hf")
    for options in (
        PreprocessOptions((str(corpus),), str(work / "text" / "alpaca"), tokenizer, append_eod=True),
        PreprocessOptions((str(instructions),), str(work / "instructions" / "alpaca"), tokenizer, prompt_type="qwen3"),
    ):
        if not Path(f"{options.output_prefix}.json").exists():  # the record, which is written last
            summary = preprocess(options)
            print(f"{summary.documents:,} documents, {summary.tokens:,} tokens, {summary.trained_tokens:,} trained")


def pretrain_settings(work: Path, backend: str, options: QuickstartOptions) -> Settings:
    return from_dict(
        {
            "ai_framework": backend,
            "data_path": str(work / "text" / "alpaca_text_document"),
            "load": str(work / "mcore"),
            "save": str(work / "pretrained"),
            "train_iters": options.pretrain_iters,
            "log_interval": max(1, options.pretrain_iters // 3),
            **COMMON,
        },
        "quickstart",
    )


def finetune_settings(work: Path, backend: str, options: QuickstartOptions, first: bool, stop_after: int) -> Settings:
    """The first backend starts from the pretrained weights. A second one resumes the run of the first."""
    return from_dict(
        {
            "ai_framework": backend,
            "data_path": str(work / "instructions" / "alpaca"),
            "is_instruction_dataset": True,
            "load": str(work / ("pretrained" if first else "finetuned")),
            "finetune": first,
            "save": str(work / "finetuned"),
            "train_iters": options.finetune_iters,
            "exit_interval": stop_after,
            "log_interval": max(1, options.finetune_iters // 6),
            **COMMON,
        },
        "quickstart",
    )


COMMON = {
    "seq_length": SEQ_LENGTH,
    "micro_batch_size": 64,
    "global_batch_size": 64,
    "lr": 3e-3,
    "min_lr": 3e-4,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.05,
    "adam_beta2": 0.95,
    "split": "100,0,0",
    "eval_iters": 0,
    "seed": SEED,
}


def accuracy(
    folder: Path, backend: str, questions: Sequence[dict[str, str]], show: int = 0, iteration: int | None = None
) -> float:
    """Share of questions that the model in `folder` answers exactly. The first `show` answers are printed."""
    model = open_model(LoadOptions(str(folder), ai_framework=backend, ckpt_step=iteration))
    answers = model.answer([item["instruction"] for item in questions], Sampling(max_new_tokens=8))
    for item, answer in list(zip(questions, answers))[:show]:
        print(f"  {item['instruction']:<34} {answer:<8} expected {item['output']}")
    return sum(answer == item["output"] for item, answer in zip(questions, answers)) / len(questions)


def say(step: str) -> None:
    print(f"\n== {step}", flush=True)
