"""One pair of scripts a size: MindSpeed-LLM's values, checked as runs that could start; the framework is a variable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from frameworks import require_framework
from scripts import EXAMPLES, FRAMEWORKS, SIZES, Site, training_script
from tandem.__main__ import main
from tandem.cli.settings import parse_settings
from tandem.config.settings import Settings
from tandem.data.preprocess.run import PreprocessOptions, preprocess
from tandem.models.hf_config import to_hf
from tandem.models.published import QWEN3_SIZES
from toys import qwen3_config

# What the scripts in MindSpeed-LLM's examples/mindspore/qwen3 give (c77308a1), - where they give nothing.
UPSTREAM = """
    command  size     machines processes TP PP VPP MBS GBS sequence optimizer decay  warmup seed std  save-every
    pretrain 0point6b 1        8         1  1  -   1   8   yes      yes       -      -      -    -    1000
    pretrain 1point7b 1        8         1  1  -   1   32  -        yes       cosine 0.01   42   0.01 2000
    pretrain 4b       1        8         1  1  -   1   64  -        yes       cosine 0.01   42   0.01 2000
    pretrain 8b       1        8         1  4  -   1   64  -        yes       cosine 0.01   42   0.01 2000
    pretrain 14b      1        8         4  2  -   1   128 yes      yes       -      0.01   42   -    2000
    pretrain 32b      2        8         8  2  4   1   128 -        yes       cosine 0.01   42   0.01 2000
    finetune 0point6b 1        8         1  1  -   1   16  yes      -         -      0.01   42   -    2000
    finetune 1point7b 1        8         1  1  -   1   32  yes      -         -      0.01   42   -    2000
    finetune 4b       1        8         1  1  -   1   16  yes      yes       -      -      42   -    1000
    finetune 8b       1        8         1  2  -   1   16  yes      yes       -      -      42   -    1000
    finetune 14b      1        8         8  1  -   1   16  yes      -         -      0.01   42   -    2000
    finetune 32b      2        8         8  2  -   1   16  -        yes       cosine 0.01   42   0.01 2000
"""
FLAGS = (
    *("--nnodes", "--nproc-per-node", "--tensor-model-parallel-size", "--pipeline-model-parallel-size"),
    *("--num-layers-per-virtual-pipeline-stage", "--micro-batch-size", "--global-batch-size"),
    *("--sequence-parallel", "--use-distributed-optimizer"),
    *("--lr-decay-style", "--lr-warmup-fraction", "--seed", "--init-method-std", "--save-interval"),
)
ALL = """
    --train-iters 2000 --seq-length 4096 --split 100,0,0 --lr 1.25e-6 --min-lr 1.25e-7 --weight-decay 1e-1 --bf16
    --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --load LOAD --data-path DATA
"""
# Where the scripts here differ: a CPU or one device is enough for 0.6B.
OURS = {"0point6b": {"--nproc-per-node": "1"}}
Usage = namedtuple("Usage", "total used free")
DryRun = Callable[..., int]  # command, size, framework, variables -> exit code

each_script = pytest.mark.parametrize(
    ("command", "size"), [(command, size) for command in ("pretrain", "finetune") for size in SIZES]
)


def expected(command: str, size: str) -> Settings:
    """The settings that upstream's values give."""
    row = next(words for line in UPSTREAM.splitlines() if (words := line.split())[:2] == [command, size])
    values = dict(zip(FLAGS, row[2:], strict=True)) | OURS.get(size, {})
    words = [word for flag, value in values.items() if value != "-" for word in (flag, value) if word != "yes"]
    return parse_settings(command, "", [*ALL.split(), *words])[0]


@each_script
def test_the_values_are_upstreams(site: Site, launchers: Path, command: str, size: str) -> None:
    settings = site.run(training_script(command, size, "mindspore"), launchers=launchers).settings
    theirs = expected(command, size)
    assert settings.parallel == theirs.parallel
    assert settings.optimizer == theirs.optimizer
    for group, names in {
        "training": ("micro_batch_size", "global_batch_size", "train_iters", "seed", "bf16"),
        "launch": ("nnodes", "nproc_per_node"),
        "data": ("seq_length", "split"),
        "checkpoint": ("save_interval",),
        "model": ("init_method_std",),
    }.items():
        for name in names:
            assert getattr(getattr(settings, group), name) == getattr(getattr(theirs, group), name), name
    assert settings.model.ffn_hidden_size == (None if size == "0point6b" else QWEN3_SIZES[SIZES[size]][2])
    assert settings.checkpoint.save == f"./ckpt/qwen3-{size}" + ("_tune" if command == "finetune" else "")


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize(("command", "size"), [("pretrain", "32b"), ("finetune", "0point6b")])
def test_the_environment_goes_first(site: Site, launchers: Path, command: str, size: str, switch: bool) -> None:
    numbers = {"TP": 2, "PP": 3, "VPP": 4, "MBS": 5, "GBS": 60, "SEED": 7, "SAVE_INTERVAL": 8, "FFN_HIDDEN_SIZE": 9}
    others = {"LR_DECAY_STYLE": "constant", "LR_WARMUP_FRACTION": 0.5, "INIT_METHOD_STD": 0.25}
    switches = {name: str(switch).lower() for name in ("SEQUENCE_PARALLEL", "USE_DISTRIBUTED_OPTIMIZER")}
    done = site.run(training_script(command, size, "torch"), launchers=launchers, **numbers, **others, **switches)
    parallel, training, optimizer = done.settings.parallel, done.settings.training, done.settings.optimizer
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (2, 3)
    assert parallel.num_layers_per_virtual_pipeline_stage == 4
    assert (parallel.sequence_parallel, parallel.use_distributed_optimizer) == (switch, switch)
    assert (training.micro_batch_size, training.global_batch_size, training.seed) == (5, 60, 7)
    assert (optimizer.lr_decay_style, optimizer.lr_warmup_fraction) == ("constant", 0.5)
    assert (done.settings.model.init_method_std, done.settings.model.ffn_hidden_size) == (0.25, 9)
    assert done.settings.checkpoint.save_interval == 8


@each_script
def test_the_layout_can_be_another(site: Site, launchers: Path, command: str, size: str) -> None:
    """No size's values are fixed: on one device, for one."""
    one = {"TP": 1, "PP": 1, "MBS": 2, "GBS": 4, "NPUS_PER_NODE": 1, "NNODES": 1}
    settings = site.run(training_script(command, size, "mindspore"), launchers=launchers, **one).settings
    parallel, training, launch = settings.parallel, settings.training, settings.launch
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (1, 1)
    assert parallel.num_layers_per_virtual_pipeline_stage is None
    assert (training.micro_batch_size, training.global_batch_size) == (2, 4)
    assert (launch.nproc_per_node, launch.nnodes) == (1, 1)


def test_what_a_size_sets_can_be_left_out(site: Site, launchers: Path) -> None:
    nothing = {"LR_WARMUP_FRACTION": "", "INIT_METHOD_STD": "", "FFN_HIDDEN_SIZE": ""}
    settings = site.run(training_script("pretrain", "8b", "torch"), launchers=launchers, **nothing).settings
    assert settings.optimizer.lr_warmup_fraction is None
    assert (settings.model.init_method_std, settings.model.ffn_hidden_size) == (None, None)


def test_a_switch_is_true_or_false(site: Site, launchers: Path) -> None:
    script = training_script("pretrain", "8b", "torch")
    done = site.run(script, launchers=launchers, USE_DISTRIBUTED_OPTIMIZER="yes")
    assert done.code == 2
    assert done.last_line == f"{EXAMPLES / script}: USE_DISTRIBUTED_OPTIMIZER=yes: expected true or false"


@pytest.mark.parametrize("folder", FRAMEWORKS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_variable_picks_the_framework(site: Site, launchers: Path, folder: str, framework: str) -> None:
    """It goes before the script's name, and the log is named after it."""
    done = site.run(training_script("finetune", "8b", folder), launchers=launchers, AI_FRAMEWORK=framework)
    assert done.settings.training.ai_framework == framework
    assert [path.name for path in (site.root / "logs").iterdir()] == [f"tune_qwen3_8b_full_{FRAMEWORKS[framework]}.log"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_scripts_start_from_any_folder(site: Site, launchers: Path, framework: str) -> None:
    """Named by a relative path, and through a link elsewhere."""
    script = EXAMPLES / training_script("pretrain", "8b", framework)
    elsewhere = site.root / "some where"
    elsewhere.mkdir()
    (elsewhere / script.name).symlink_to(script)
    logged = ""
    for name in (os.path.relpath(script, elsewhere), script.name, f"./{script.name}"):
        done = subprocess.run(
            ["bash", name],
            cwd=elsewhere,
            env={**os.environ, "PATH": f"{launchers}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        words = done.stdout.splitlines()
        assert words[words.index("--ai-framework") + 1] == framework
        logged += done.stdout  # a later start adds to the log of an earlier one
        assert (elsewhere / f"logs/train_qwen3_8b_{FRAMEWORKS[framework]}.log").read_text() == logged


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Site:
    """Config and tokenizer of each size, no weights; one long text and a few questions, preprocessed."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = shared_data / "qwen3-0.6b"
    for size in SIZES.values():
        (root / size).mkdir()
        (root / size / "config.json").write_text(json.dumps(to_hf(qwen3_config(size))))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (root / size / name).symlink_to(tokenizer / name)
    with (shared_data / "text/free.jsonl").open(encoding="utf-8") as lines:
        long_text = " ".join(json.loads(line)["text"] for line in islice(lines, 50))
    (root / "text.jsonl").write_text(json.dumps({"text": long_text}), encoding="utf-8")
    questions = json.loads((shared_data / "instruct/gsm8k_train_alpaca.json").read_text(encoding="utf-8"))
    (root / "questions.json").write_text(json.dumps(questions[:20]), encoding="utf-8")
    text, chat = str(root / "text"), str(root / "chat")
    preprocess(PreprocessOptions((str(root / "text.jsonl"),), text, str(tokenizer)))
    preprocess(PreprocessOptions((str(root / "questions.json"),), chat, str(tokenizer), prompt_type="qwen3"))
    return Site(root)


@pytest.fixture
def dry_run(models: Site, launchers: Path, monkeypatch: pytest.MonkeyPatch) -> DryRun:
    """Run the command of a script in this process, for devices elsewhere; the disk has room for every size."""
    monkeypatch.chdir(models.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**13, 0, 10**13))

    def run(command: str, size: str, framework: str, **variables: object) -> int:
        data = {"pretrain": "text_text_document", "finetune": "chat"}[command]
        fixed = {
            "DATA_PATH": data,
            "EXTRA_ARGS": "--dry-run --device npu",
            "TOKENIZER_PATH": SIZES[size],
            "CKPT_LOAD_DIR": "",
        }
        script = training_script(command, size, framework)
        return main(models.run(script, launchers=launchers, **{**fixed, **variables}).command)

    return run


@each_script
def test_every_size_could_start(dry_run: DryRun, capsys: pytest.CaptureFixture[str], command: str, size: str) -> None:
    """What is shipped starts, with upstream's layout and the default number of processes. Both frameworks are told
    the same (test_arguments.py), so each checks one of the two commands."""
    framework = require_framework({"pretrain": "mindspore", "finetune": "torch"}[command])
    assert dry_run(command, size, framework) == 0
    text = capsys.readouterr().out
    parallel, launch = expected(command, size).parallel, expected(command, size).launch
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    processes = launch.nnodes * (launch.nproc_per_node or 1)
    data = processes // (tensor * pipeline)
    assert f"> {processes} processes: tensor {tensor} x pipeline {pipeline} x data {data}; " in text
    assert f"> {framework}: qwen3, " in text
    assert "dry run: all of this can start; nothing was trained" in text


def test_weights_of_another_size_are_refused(dry_run: DryRun, capsys: pytest.CaptureFixture[str]) -> None:
    """All sizes share the guide's default folders."""
    require_framework("torch")
    assert dry_run("pretrain", "4b", "torch", TOKENIZER_PATH="8B") == 2
    assert "--ffn-hidden-size 9728 contradicts the weights' config, which has 12288" in capsys.readouterr().err
    assert dry_run("pretrain", "4b", "torch", TOKENIZER_PATH="8B", FFN_HIDDEN_SIZE="") == 0


def test_the_script_itself_dry_runs(models: Site) -> None:
    require_framework("torch")
    done = models.succeed(
        training_script("finetune", "0point6b", "torch"),
        DATA_PATH="chat",
        CKPT_LOAD_DIR="",
        TOKENIZER_PATH="0.6B",
        EXTRA_ARGS="--dry-run --no-save-optim",
    )
    assert done.last_line == "> dry run: all of this can start; nothing was trained"
    assert not (models.root / "ckpt").exists()
