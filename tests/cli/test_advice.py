"""What an error tells the user to do works: each command fails, the advice is followed as it stands, and it goes on.

Advice that other tests follow: YaRN in config.json, and an earlier iteration (tests/training), `iconv`
(tests/files), locks (tests/files/test_lock.py), DPO's defaults (tests/training).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.__main__ import main
from workspace import Workspace

TRAIN = (
    "pretrain --dry-run --device cpu --ai-framework torch --load {hf} --data-path {text} --seq-length 32 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3 --split 100,0,0"
)
RUN = TRAIN.replace(" --dry-run", "") + " --eval-iters 0 --save {new}"
PREPROCESS = "preprocess --input {questions} --output-prefix {new} --tokenizer-name-or-path {hf} --prompt-type qwen3"
CONVERT = "convert --load-dir {hf} --save-dir {new} --no-verify"


def without(line: str, flag: str, values: int = 1) -> str:
    words = shlex.split(line)
    place = words.index(flag)
    return shlex.join(words[:place] + words[place + 1 + values :])


def changed(line: str, flag: str, value: str) -> str:
    """The value behind a flag, which is added where it is missing."""
    return f"{without(line, flag)} {flag} {value}" if flag in shlex.split(line) else f"{line} {flag} {value}"


@dataclass(frozen=True)
class Case:
    """A command, what its error must advise (a pattern), and the commands that follow the advice.

    `follow` takes the command and the match of the pattern. Names in braces are those of `places`.
    """

    line: str
    advice: str
    follow: Callable[[str, re.Match[str]], str | list[str]]


def leave_out(flag: str, values: int = 1) -> Callable[[str, re.Match[str]], str]:
    return lambda line, _: without(line, flag, values)


def add(words: str) -> Callable[[str, re.Match[str]], str]:
    return lambda line, _: f"{line} {words}"


def give(line: str, found: re.Match[str]) -> str:
    """The flag and the value that the error names."""
    return changed(line, found[1], found[2])


CASES = {
    "longer than the model allows": Case(
        changed(TRAIN, "--seq-length", "4096"), r"give (--seq-length) (\d+), or less", give
    ),
    "an iteration of a folder without any": Case(
        f"{TRAIN} --ckpt-step 3", "leave out --ckpt-step", leave_out("--ckpt-step")
    ),
    "a file in place of a prefix": Case(
        changed(TRAIN, "--data-path", "{text}.bin"), r"leave out \.bin", lambda line, _: line.replace(".bin", "")
    ),
    "no data": Case(
        without(TRAIN, "--data-path"),
        "--data-path is required: the prefix that `tandem preprocess` wrote",
        lambda line, _: [
            "preprocess --input {corpus} --output-prefix {new} --tokenizer-name-or-path {hf} --append-eod",
            f"{line} --data-path {{new}}_text_document",
        ],
    ),
    "interleaved stages without stages": Case(
        f"{TRAIN} --num-layers-per-virtual-pipeline-stage 2",
        "leave it out, or give --pipeline-model-parallel-size 2 or more",
        leave_out("--num-layers-per-virtual-pipeline-stage"),
    ),
    "what one framework lacks, left out": Case(
        changed(f"{TRAIN} --use-torch-fsdp2", "--ai-framework", "mindspore"),
        "leave it out, or use --ai-framework torch",
        leave_out("--use-torch-fsdp2", 0),
    ),
    "what one framework lacks, with the other": Case(
        changed(f"{TRAIN} --use-torch-fsdp2", "--ai-framework", "mindspore"), r"use (--ai-framework) (torch)", give
    ),
    "adapters of nothing": Case(f"{TRAIN} --lora-r 4", r"add (--lora-target-modules) (all-linear), or names", give),
    "instructions for pretraining": Case(
        changed(f"{TRAIN} --is-instruction-dataset", "--data-path", "{chat}"),
        "belong to `tandem finetune`",
        lambda line, _: line.replace("pretrain", "finetune", 1),
    ),
    "epochs of weighted data": Case(
        changed(without(TRAIN, "--train-iters"), "--data-path", "1 {text} 2 {other_text}") + " --epochs 1",
        "leave the weights out, or give --train-iters",
        lambda line, _: line.replace("1 {text} 2", "{text}"),
    ),
    "epochs of weighted data, counted": Case(
        changed(without(TRAIN, "--train-iters"), "--data-path", "1 {text} 2 {other_text}") + " --epochs 1",
        "leave the weights out, or give --train-iters",
        lambda line, _: changed(without(line, "--epochs"), "--train-iters", "2"),
    ),
    "a profile without a folder": Case(f"{TRAIN} --profile", "give --save or --profile-save-path", add("--save {new}")),
    "a profile without a folder, with its own": Case(
        f"{TRAIN} --profile", "give --save or --profile-save-path", add("--profile-save-path {new}")
    ),
    "no weights": Case(without(TRAIN, "--load"), "--init random", add("--init random --hf-cfg-dir {hf}")),
    "machines without processes": Case(
        f"{TRAIN} --nnodes 2", "also give --nproc-per-node", lambda line, _: without(line, "--nnodes")
    ),
    "a tokenizer of more tokens than rows": Case(
        changed(TRAIN, "--load", "{fewer_rows}") + " --tokenizer-name-or-path {hf}",
        r"add rows with `(tandem convert --resize-vocab (\d+))`",
        lambda line, found: [
            f"convert --load-dir {{fewer_rows}} --save-dir {{new}} --no-verify --resize-vocab {found[2]}",
            changed(line, "--load", "{new}"),
        ],
    ),
    "a target that exists": Case(
        changed(CONVERT, "--save-dir", "{full}"),
        "remove it or choose another place",
        lambda line, _: changed(line, "--save-dir", "{new}"),
    ),
    "adapters into a checkpoint": Case(
        f"{CONVERT} --save-lora-to-hf --lora-load {{adapters}} --save-model-type mg",
        "add --save-model-type hf",
        lambda line, _: changed(line, "--save-model-type", "hf"),
    ),
    "bad rows": Case(
        changed(PREPROCESS, "--input", "{bad_rows}"),
        "`tandem preprocess (--on-bad) (skip)` leaves such rows out",
        give,
    ),
    "a flag of another handler": Case(
        f"{PREPROCESS} --mix-strategy interleave_under",
        "works only with --handler-name LlamaFactoryInstructionHandler; leave it out",
        leave_out("--mix-strategy"),
    ),
    "data without a record": Case(
        "inspect data {no_record}", "give --tokenizer-name-or-path, or --show 0", add("--tokenizer-name-or-path {hf}")
    ),
    "data without a record, not shown": Case(
        "inspect data {no_record}", r"give --tokenizer-name-or-path, or (--show) (0)", give
    ),
    "messages in plain text": Case(
        "generate {hf} --prompts-file {messages} --max-new-tokens 1 --device cpu --raw",
        "leave out --raw",
        leave_out("--raw", 0),
    ),
    "nothing to check": Case(
        "generate {hf} hello --max-new-tokens 1 --device cpu --dry-run", "leave it out", leave_out("--dry-run", 0)
    ),
    "no optimizer, a new one": Case(
        f"{without(RUN, '--save')} --save {{no_optimizer}}", "add (--no-load-optim) to go on", add("--no-load-optim")
    ),
    "no optimizer, a new run": Case(
        f"{without(RUN, '--save')} --save {{no_optimizer}}",
        r"begin a new run with its weights: (--load \S+ --finetune), another --save",
        lambda line, found: f"{without(without(line, '--load'), '--save')} --save {{new}} {found[1]}",
    ),
    "another run's folder": Case(
        changed(changed(RUN, "--save", "{no_optimizer}"), "--data-path", "{chat}").replace("pretrain", "finetune", 1),
        "Choose another folder",
        lambda line, _: changed(line, "--save", "{new}"),
    ),
}


@pytest.fixture(scope="module")
def places(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    """What commands name in braces."""
    require_framework("torch")
    root = tmp_path_factory.mktemp("advice")
    (root / "bad.jsonl").write_text('{"instruction": "Reverse 1.", "output": "1"}\n{"instruction": 5}\n')
    message = {"messages": [{"role": "user", "content": "hello"}]}
    (root / "messages.jsonl").write_text(json.dumps(message) + "\n")
    (root / "full").mkdir()
    (root / "full" / "file").write_text("")
    for end in ("bin", "idx"):
        for name in ("no_record", "other_text"):
            shutil.copy(f"{workspace.text}_text_document.{end}", root / f"{name}.{end}")
    names: dict[str, Path | str] = {
        "hf": workspace.hf,
        "text": f"{workspace.text}_text_document",
        "chat": workspace.instructions,
        "corpus": workspace.corpus,
        "questions": workspace.questions,
        "bad_rows": root / "bad.jsonl",
        "messages": root / "messages.jsonl",
        "full": root / "full",
        "no_record": root / "no_record",
        "other_text": root / "other_text",
        "no_optimizer": root / "no_optimizer",
        "fewer_rows": root / "fewer_rows",
        "adapters": root / "adapters" / "peft",
    }
    without_optimizer = f"{changed(RUN, '--save', '{no_optimizer}')} --no-save-optim --exit-interval 1"
    adapters = f"{changed(RUN, '--save', str(root / 'lora'))} --lora-r 4 --lora-target-modules linear_qkv"
    for line in (without_optimizer, adapters, f"export {root / 'lora'} {names['adapters']} --save-lora-to-hf"):
        assert main(shlex.split(line.format(**names))) == 0
    cut_rows(workspace.hf, root / "fewer_rows", 200)
    return names


def cut_rows(source: Path, target: Path, rows: int) -> None:
    """The same model with fewer rows for tokens."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:rows].copy()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))


@pytest.mark.parametrize("name", CASES)
def test_advice_works(
    name: str, places: dict[str, Path | str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    if "mindspore" in case.line:
        require_framework("mindspore")
    names = {**places, "new": tmp_path / "new"}
    if "no_optimizer" in case.line:  # going on changes it
        names["no_optimizer"] = shutil.copytree(places["no_optimizer"], tmp_path / "no_optimizer")
    assert main(shlex.split(case.line.format(**names))) == 2
    said = capsys.readouterr().err
    found = re.search(case.advice, said)
    assert found, said
    followed = case.follow(case.line, found)
    for line in [followed] if isinstance(followed, str) else followed:
        code = main(shlex.split(line.format(**names)))
        assert code == 0, capsys.readouterr().err
