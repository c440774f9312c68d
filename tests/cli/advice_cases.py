"""Commands that fail, the advice in their errors, and how to follow it: the table of test_advice.py."""

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
    """

    line: str
    advice: str
    follow: Callable[[str, re.Match[str]], str | list[str]]
    ends: int = 2
    says: str = ""


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
        changed(changed(RUN, "--save", "{counted}"), "--data-path", "{chat}").replace("pretrain", "finetune", 1),
        "Choose another folder",
        lambda line, _: changed(line, "--save", "{new}"),
    ),
    "random weights of nothing": Case(
        changed(without(TRAIN, "--load"), "--init", "random"),
        "give its folder with --hf-cfg-dir",
        add("--hf-cfg-dir {hf}"),
    ),
    "smoothing that a loss does not use": Case(
        f"{DPO} --dpo-loss-type ipo --dpo-label-smoothing 0.1",
        "does not use it: leave it out",
        leave_out("--dpo-label-smoothing"),
    ),
    "dropout while answers are compared": Case(
        f"{DPO} --lora-r 4 --lora-target-modules all-linear --lora-dropout 0.1",
        "as in TRL: leave it out",
        leave_out("--lora-dropout"),
    ),
    "dropout with DoRA": Case(
        f"{TRAIN} --lora-r 4 --lora-target-modules all-linear --lora-dropout 0.1 --lora-use-dora",
        "leave one out",
        leave_out("--lora-dropout"),
    ),
    "dropout, and no DoRA": Case(
        f"{TRAIN} --lora-r 4 --lora-target-modules all-linear --lora-dropout 0.1 --lora-use-dora",
        "leave one out",
        leave_out("--lora-use-dora", 0),
    ),
    "epochs with another batch": Case(
        changed(EPOCH, "--global-batch-size", "8"),
        r"keep (\d+), or",
        lambda line, found: changed(line, "--global-batch-size", found[1]),
    ),
    "epochs with another batch, counted": Case(
        changed(EPOCH, "--global-batch-size", "8"),
        r"give (--train-samples) (\d+) instead of --epochs",
        lambda line, found: give(without(line, "--epochs"), found),
    ),
    "an iteration of a run that goes on": Case(
        changed(f"{EPOCH} --ckpt-step 1", "--save", "{counted}"),
        r"give (--load) (\S+) --ckpt-step 1",
        give,
    ),
    "raw conversations for pretraining": Case(
        changed(TRAIN, "--data-path", "{alpaca}") + " --tokenizer-name-or-path {hf} --data-cache-path {new}",
        r"give (--handler-name) (AlpacaPretrainHandler)",
        give,
    ),
    "raw text for fine-tuning": Case(
        changed(TRAIN, "--data-path", "{corpus}").replace("pretrain", "finetune", 1)
        + " --tokenizer-name-or-path {hf} --data-cache-path {new} --prompt-type qwen3",
        "to read them as conversations, give --handler-name or --map-keys",
        add('--map-keys \'{{"prompt": "text", "response": "text"}}\''),
    ),
    "a raw file in place of a prefix": Case(
        "inspect data {corpus} --show 0",
        r"preprocess it first with `tandem (preprocess --input \S+ --output-prefix) PREFIX (\S+) MODEL`",
        lambda _, found: [
            f"{found[1]} {{new}} {found[2]} {{hf}}",
            "inspect data {new}_text_document --show 0",
        ],
    ),
    "conversations in place of questions": Case(
        "evaluate {hf} {alpaca} --seq-length 32 --device cpu",
        r"preprocess it first with `tandem (preprocess --input \S+ --output-prefix) PREFIX (\S+) MODEL`",
        lambda line, found: [
            f"{found[1]} {{new}} {found[2]} {{hf}}",
            line.replace("{alpaca}", "{new}"),
        ],
    ),
    "a run to verify": Case(
        "verify {counted}", r"tandem (export \S+) NEW_FOLDER", lambda _, found: f"{found[1]} {{new}} --no-verify"
    ),
    "a run in place of its tokenizer": Case(
        f"{changed(PREPROCESS, '--tokenizer-name-or-path', '{counted}')}",
        r"give (\S+), which has one",
        lambda line, found: changed(line, "--tokenizer-name-or-path", found[1]),
    ),
    "text for fine-tuning": Case(
        TRAIN.replace("pretrain", "finetune", 1),
        "these data are plain text, for `tandem pretrain`",
        lambda line, _: line.replace("finetune", "pretrain", 1),
    ),
    "packed rows of another length": Case(
        changed(PACKED, "--seq-length", "64"),
        r"train with (--seq-length) (\d+)",
        give,
    ),
    "borders that cut prompts from answers": Case(
        f"{PACKED} --reset-position-ids",
        "leave the flags out, or preprocess again with --pack --neat-pack",
        leave_out("--reset-position-ids", 0),
    ),
    "borders that cut prompts from answers, stored": Case(
        f"{PACKED} --reset-position-ids",
        "preprocess again with (--pack --neat-pack)",
        lambda line, found: [
            f"{PREPROCESS} --seq-length 128 --over-long drop {found[1]}",
            changed(line, "--data-path", "{new}"),
        ],
    ),
    "layers that do not divide": Case(
        f"{CONVERT} --ckpt-format torch --target-pipeline-parallel-size 3",
        r"give the layers of each stage with (--num-layer-list) (\S+), or",
        give,
    ),
    "layers that do not divide, filled up": Case(
        f"{CONVERT} --ckpt-format torch --target-pipeline-parallel-size 3", r"with (--noop-layers) (\S+)$", give
    ),
    "fewer layers than stages": Case(
        f"{CONVERT} --ckpt-format torch --target-pipeline-parallel-size 6",
        r"size 6: [^-]*leave slots without a layer with (--noop-layers) (\S+)$",
        give,
    ),
    "fewer layers than stages, in training": Case(
        f"{TRAIN} --pipeline-model-parallel-size 6 --nproc-per-node 6",
        r"leave slots without a layer with (--noop-layers) (\S+)$",
        give,
    ),
    "two chunks of layers that do not divide": Case(
        f"{CONVERT} --ckpt-format torch --target-pipeline-parallel-size 3 --num-layers-per-virtual-pipeline-stage 1",
        r"with (--noop-layers) (\S+)$",
        give,
    ),
    "tensors that cannot be split so": Case(
        f"{CONVERT} --target-tensor-parallel-size 7", r"(--target-tensor-parallel-size) 7: .* give 1 or (\d)$", give
    ),
    "tensors that cannot be split so, in training": Case(
        f"{TRAIN} --tensor-model-parallel-size 7 --nproc-per-node 7",
        r"(--tensor-model-parallel-size) 7: .* give 1 or (\d)$",
        lambda line, found: changed(give(line, found), "--nproc-per-node", "2"),
    ),
    "chunks of layers that do not divide": Case(
        f"{TRAIN} --pipeline-model-parallel-size 2 --nproc-per-node 2 --num-layers-per-virtual-pipeline-stage 3",
        r"(--num-layers-per-virtual-pipeline-stage) 3: .* give (\d), or leave it out$",
        give,
    ),
    "adapters of rank 0": Case(
        f"{TRAIN} --lora-target-modules all-linear --lora-r 0",
        "--lora-r 0: expected a whole number, at least 1",
        lambda line, _: changed(line, "--lora-r", "1"),
    ),
    "two precisions": Case(f"{TRAIN} --fp16 --bf16", "exclude each other: give one", leave_out("--fp16", 0)),
    "two warm-ups": Case(
        f"{TRAIN} --lr-warmup-fraction 0.5 --lr-warmup-iters 1",
        "exclude each other: give one",
        leave_out("--lr-warmup-iters"),
    ),
    "fewer samples than a step takes": Case(
        f"{without(TRAIN, '--train-iters')} --train-samples 2",
        r"give more, or a smaller (--global-batch-size)",
        lambda line, found: changed(line, found[1], "2"),
    ),
    "a prefix twice": Case(
        changed(TRAIN, "--data-path", "{text} {text}"),
        "is named twice: .* give it one weight",
        lambda line, _: changed(line.replace("{text} {text}", "{text}"), "--data-path", "{text}"),
    ),
    "a token for ends that are not added": Case(
        changed(PREPROCESS, "--input", "{corpus}").replace(" --prompt-type qwen3", "") + " --eod-token '<|im_end|>'",
        "needs (--append-eod).*; give both",
        lambda line, found: f"{line} {found[1]}",
    ),
    "rows that are packed with borders, but not packed": Case(
        f"{PREPROCESS} --seq-length 128 --neat-pack", r"needs (--pack); give both", lambda line, _: f"{line} --pack"
    ),
    "rows of no length": Case(
        f"{PREPROCESS} --pack", r"needs (--seq-length), .*; give both", add("--seq-length 128 --over-long drop")
    ),
    "a format that is only read": Case(f"{CONVERT} --ckpt-format torch_dist", r"write (--ckpt-format) (torch),", give),
    "a template, and none": Case(
        "generate {hf} hello --max-new-tokens 1 --device cpu --raw --prompt-type qwen3",
        "give one of them",
        leave_out("--raw", 0),
    ),
    "a page with the name of a folder": Case(
        "inspect data {text} --show 0 --html {full}",
        r"give the name of a file, such as (page\.html)",
        lambda line, found: line.replace("{full}", f"{{new}}-{found[1]}"),
    ),
    "another target for adapters": Case(
        f"{CONVERT} --save-lora-to-hf --save-model-type hf",
        "give theirs with --lora-load",
        add("--lora-load {adapters}"),
    ),
    "adapters of a model without any": Case(
        "export {hf} {new} --save-lora-to-hf", "give theirs with --lora-load", add("--lora-load {adapters}")
    ),
    "whole weights as adapters": Case(
        "generate {hf} hello --max-new-tokens 1 --device cpu --lora-load {no_optimizer}",
        "give whole weights with --load",
        lambda line, _: "generate --load {no_optimizer} --prompt hello --max-new-tokens 1 --device cpu",
    ),
    "adapters whose weights have moved": Case(
        "export {lora} {new} --no-verify",
        r"give --load FOLDER (--lora-load \S+)",
        lambda line, found: f"export --load {{moved}} {found[1]} --save-dir {{new}} --no-verify",
    ),
    "no tokenizer to ask": Case(
        "generate {bare} hello --max-new-tokens 1 --device cpu",
        "give its folder with --tokenizer-name-or-path",
        add("--tokenizer-name-or-path {hf}"),
    ),
    "no tokenizer for a GGUF file": Case(
        "export {bare} {new} --gguf f16", "give --hf-cfg-dir", add("--hf-cfg-dir {hf}")
    ),
    "numbers beyond float16": Case(
        "export {large} {new} --gguf f16", "use (--gguf) (bf16)", lambda line, found: line.replace("f16", found[2])
    ),
    "fields of plain text": Case(
        "preprocess --input {corpus} --output-prefix {new} --tokenizer-name-or-path {hf} "
        '--handler-name GeneralPretrainHandler --map-keys \'{{"prompt": "text"}}\'',
        "leave it out, or name fields with --json-keys",
        lambda line, _: without(line, "--map-keys") + " --json-keys text",
    ),
    "thoughts without a template": Case(
        changed(PREPROCESS, "--prompt-type", "empty") + " --enable-thinking true",
        "leave --enable-thinking out",
        leave_out("--enable-thinking"),
    ),
    "variables that a template does not take": Case(
        changed(PREPROCESS, "--input", "{variables}"),
        r"Choose (--prompt-type) (chat_template)",
        give,
    ),
    "answers of which nobody knows whose they are": Case(
        changed(PREPROCESS, "--input", "{split_texts}"), r"give (--prompt-type) (empty)", give
    ),
    "an option of conversations": Case(
        "preprocess --input {corpus} --output-prefix {new} --tokenizer-name-or-path {hf} --train-turns last",
        "leave it out",
        leave_out("--train-turns"),
    ),
    "a folder of another handler": Case(
        f"{PREPROCESS} --dataset-dir {{full}}",
        "works only with --handler-name LlamaFactoryInstructionHandler; leave it out",
        leave_out("--dataset-dir"),
    ),
    "conversations that are too long": Case(
        f"{PREPROCESS} --seq-length 24 --over-long stop", r"or choose (--over-long) (trim)", give
    ),
    "no token that ends documents": Case(
        changed(f"{PREPROCESS} --append-eod", "--tokenizer-name-or-path", "{no_end}")
        .replace("{questions}", "{corpus}")
        .replace(" --prompt-type qwen3", ""),
        "give --eod-token",
        add("--eod-token '<|im_end|>'"),
    ),
    "a pretraining that ended, fine-tuned": Case(
        RUN,
        r"or tandem (finetune --load \S+ --finetune --save) NEW_RUN \.\.\.",
        lambda line, found: changed(without(without(line, "--load"), "--save"), "--data-path", "{chat}").replace(
            "pretrain", f"{found[1]} {{new}}_tuned", 1
        ),
        ends=0,
        says="successfully saved checkpoint from iteration       2 to",
    ),
    "a pretraining that ended, exported": Case(
        RUN, r"next: tandem (export \S+) NEW_FOLDER,", lambda _, found: f"{found[1]} {{new}}_hf --no-verify", ends=0
    ),
    "a fine-tuning that ended": Case(
        changed(RUN, "--data-path", "{chat}").replace("pretrain", "finetune", 1),
        r"next: tandem (generate \S+)",
        lambda _, found: f"{found[1]} hello --max-new-tokens 1 --device cpu",
        ends=0,
    ),
    "no run to report": Case(
        "report", "is required: The --save folder of each run", lambda line, _: "report {counted}"
    ),
}
