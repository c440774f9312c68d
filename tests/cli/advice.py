"""What the tables of advice are made of: commands, the advice that they print, and how to follow it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

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


EPOCH = f"{without(RUN, '--train-iters')} --epochs 1".replace("{new}", "{counted}")
PACKED = changed(changed(TRAIN, "--data-path", "{packed}"), "--seq-length", "128").replace("pretrain", "finetune", 1)
DPO = changed(TRAIN, "--data-path", "{pairs}").replace("pretrain", "finetune", 1) + " --stage dpo"


@dataclass(frozen=True)
class Case:
    """A command, what it must advise (a pattern), and the commands that follow the advice.

    `follow` takes the command and the match of the pattern. Names in braces are those of `places`.

    Attributes:
        ends: the exit code of the command that advises.
        says: what the last of the commands that follow must say.
        copies: a folder that the commands change, so that they get a copy.
    """

    line: str
    advice: str
    follow: Callable[[str, re.Match[str]], str | list[str]]
    ends: int = 2
    says: str = ""
    copies: str = ""


def leave_out(flag: str, values: int = 1) -> Callable[[str, re.Match[str]], str]:
    return lambda line, _: without(line, flag, values)


def add(words: str) -> Callable[[str, re.Match[str]], str]:
    return lambda line, _: f"{line} {words}"


def give(line: str, found: re.Match[str]) -> str:
    """The flag and the value that the error names."""
    return changed(line, found[1], found[2])


def give_value(value: str) -> Callable[[str, re.Match[str]], str]:
    """The flag that the error names, with this value."""
    return lambda line, found: changed(line, found[1], value)
