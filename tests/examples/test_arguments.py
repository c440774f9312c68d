"""What the example scripts pass on, by launchers that only print it; and that upstream's own flags are understood."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from scripts import EXAMPLES, FRAMEWORKS, PRETRAIN, SIZES, TUNE, Site, training_script
from tandem.cli.arguments import parse
from tandem.cli.preprocess import PreprocessFlags
from tandem.cli.settings import parse_settings
from tandem.config.checks import check_settings
from tandem.config.upstream.flags import CONVERT_IGNORED, PREPROCESS_IGNORED, split_ignored
from tandem.conversion.options import ConvertOptions

SHARED_SCRIPTS = (
    "ckpt_convert_qwen3_hf2mcore.sh",
    "ckpt_convert_qwen3_mcore2hf.sh",
    "data_convert_qwen3_instruction.sh",
    "data_convert_qwen3_pairwise.sh",
    "data_convert_qwen3_pretrain.sh",
)
TRAINING_SCRIPTS = [
    training_script(command, size, framework)
    for command in ("pretrain", "finetune", "lora", "dpo")
    for size in SIZES
    for framework in FRAMEWORKS
]
# Of the 0.6B scripts in MindSpeed-LLM's examples/mindspore/qwen3 (M) and examples/mcore/qwen3 (P).
MODEL = """
    --use-mcore-models --sequence-parallel --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec
    --kv-channels 128 --qk-layernorm --num-layers 28 --hidden-size 1024 --num-attention-heads 16
    --ffn-hidden-size 3072 --max-position-embeddings 32768 --make-vocab-size-divisible-by 1
    --padded-vocab-size 151936 --rotary-base 1000000 --disable-bias-linear --swiglu --normalization RMSNorm
    --position-embedding-type rope --use-rotary-position-embeddings --norm-epsilon 1e-6 --group-query-attention
    --num-query-groups 8 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
    --no-gradient-accumulation-fusion --attention-softmax-in-fp32 --no-masked-softmax-fusion --use-flash-attn
"""
RUN = """
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path TOKENIZER --data-path DATA --split 100,0,0
    --seq-length 4096 --micro-batch-size 1 --train-iters 2000 --lr 1.25e-6 --min-lr 1.25e-7 --weight-decay 1e-1
    --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --exit-on-missing-checkpoint --no-load-optim
    --no-load-rng --log-interval 1 --eval-interval 1000 --eval-iters 0 --log-throughput --distributed-backend nccl
    --load LOAD --save SAVE
"""
UPSTREAM = {
    "M pretrain": """--global-batch-size 8 --attention-dropout 0.0 --hidden-dropout 0.0 --initial-loss-scale 4096
        --bf16 --no-shared-storage --use-fused-rotary-pos-emb --use-fused-swiglu --use-fused-rmsnorm
        --use-distributed-optimizer --transformer-impl local --ckpt-format torch --save-interval 1000
        --ai-framework mindspore""",
    "M finetune": """--global-batch-size 16 --attention-dropout 0 --hidden-dropout 0 --lr-warmup-fraction 0.01
        --save-interval 2000 --finetune --stage sft --is-instruction-dataset --prompt-type qwen3
        --variable-seq-lengths --transformer-impl local --ckpt-format torch --ai-framework mindspore""",
    "M lora": """--global-batch-size 16 --attention-dropout 0 --hidden-dropout 0 --lr-warmup-fraction 0.01
        --save-interval 2000 --finetune --stage sft --is-instruction-dataset --prompt-type qwen3
        --variable-seq-lengths --transformer-impl local --ckpt-format torch --ai-framework mindspore
        --lora-r 16 --lora-alpha 32 --lora-fusion
        --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2""",
    "M dpo": """--global-batch-size 64 --attention-dropout 0 --hidden-dropout 0 --save-interval 2000 --finetune
        --stage dpo --is-instruction-dataset --is-pairwise-dataset --dpo-loss-type sigmoid --dpo-beta 0.1
        --dpo-label-smoothing 0.0 --pref-ftx 0.0 --refer-model-iter 1 --prompt-type qwen3 --no-shuffle
        --no-pad-to-seq-lengths --no-save-optim --no-save-rng --npu-deterministic --ckpt-format torch
        --ai-framework mindspore""",
    "P pretrain": """--global-batch-size 32 --attention-dropout 0.0 --hidden-dropout 0.0 --initial-loss-scale 4096
        --seed 42 --bf16 --seed 42 --no-shared-storage --use-fused-rotary-pos-emb --use-fused-swiglu
        --use-fused-rmsnorm --use-distributed-optimizer --transformer-impl local --ckpt-format torch
        --enable-hf2mg-convert --model-type-hf qwen3 --handler-name GeneralPretrainHandler --save-interval 1000""",
    "P finetune": """--global-batch-size 16 --attention-dropout 0 --hidden-dropout 0 --lr-warmup-fraction 0.01
        --seed 42 --save-interval 2000 --finetune --stage sft --is-instruction-dataset --prompt-type qwen3
        --no-pad-to-seq-lengths --transformer-impl local --ckpt-format torch --enable-hf2mg-convert
        --model-type-hf qwen3 --handler-name AlpacaStyleInstructionHandler --enable-thinking true --workers 8
        --tokenizer-not-use-fast""",
}
# Flags of the larger sizes' pretraining scripts that the 0.6B ones lack; none changes a result in one process.
LARGER = """
    --context-parallel-size 1 --context-parallel-algo megatron_cp_algo --norm-topk-prob --use-ascend-coc
    --coc-fused-kernel --reuse-fp32-param --overlap-grad-reduce --overlap-param-gather --init-method-std 0.01
    --lr-decay-style cosine --untie-embeddings-and-output-weights --reset-attention-mask
"""
CONVERT = """
    --use-mcore-models --model-type GPT --load-model-type hf --save-model-type mg --target-tensor-parallel-size 1
    --target-pipeline-parallel-size 1 --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --load-dir HF
    --save-dir MCORE --tokenizer-model HF/tokenizer.json --params-dtype bf16 --model-type-hf qwen3
    --ai-framework mindspore
"""
PREPROCESS = """
    --input DATA --tokenizer-name-or-path HF --output-prefix PREFIX --tokenizer-type PretrainedFromHF --workers 4
    --log-interval 1000
"""


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.sh")), ids=lambda path: path.stem)
def test_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK) == (script.parent.name != "common")  # which is sourced, not run


def test_there_are_no_other_scripts() -> None:
    names = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/qwen3/*")}
    shared = {f"{framework}/qwen3/{name}" for framework in FRAMEWORKS for name in SHARED_SCRIPTS}
    assert names == shared | set(TRAINING_SCRIPTS)


@pytest.mark.parametrize("name", SHARED_SCRIPTS)
def test_conversion_and_data_are_the_same_for_both_frameworks(name: str) -> None:
    """One script, seen from both folders."""
    assert (EXAMPLES / "torch/qwen3" / name).samefile(EXAMPLES / "mindspore/qwen3" / name)


@pytest.mark.parametrize(
    ("command", "size"),
    [*((command, size) for command in ("pretrain", "finetune", "lora") for size in SIZES), ("dpo", "0point6b")],
)
def test_both_frameworks_are_told_the_same(site: Site, launchers: Path, command: str, size: str) -> None:
    told = {
        framework: site.run(training_script(command, size, framework), launchers=launchers).settings.to_dict()
        for framework in FRAMEWORKS
    }
    assert {name: values["training"].pop("ai_framework") for name, values in told.items()} == {
        "mindspore": "mindspore",
        "torch": "torch",
    }
    assert told["mindspore"] == told["torch"]


def test_defaults_are_the_guides(site: Site, launchers: Path) -> None:
    settings = site.run(PRETRAIN["mindspore"], launchers=launchers).settings
    theirs, _ = parse_settings("pretrain", "", (MODEL + RUN + UPSTREAM["M pretrain"]).split())
    assert settings.optimizer == theirs.optimizer
    for name in ("micro_batch_size", "global_batch_size", "train_iters", "seed", "bf16"):
        assert getattr(settings.training, name) == getattr(theirs.training, name), name
    assert settings.logging == theirs.logging
    assert (settings.data.seq_length, settings.data.split) == (4096, "100,0,0")
    assert settings.data.data_path == ("./dataset/alpaca_text_document",)
    assert settings.checkpoint.load == "./model_weights/qwen3_mcore/"


def test_variables_reach_their_flags(site: Site, launchers: Path) -> None:
    variables = {"GBS": 6, "MBS": 3, "SEQ_LENGTH": 77, "TRAIN_ITERS": 5, "DATA_PATH": "my data", "CKPT_SAVE_DIR": "s"}
    extra = {"CKPT_LOAD_DIR": "l", "TOKENIZER_PATH": "t", "EXTRA_ARGS": "--seed 7 --lr 1e-3"}
    settings = site.run(TUNE["torch"], launchers=launchers, **variables, **extra).settings
    assert (settings.training.global_batch_size, settings.training.micro_batch_size) == (6, 3)
    assert (settings.training.train_iters, settings.training.seed, settings.optimizer.lr) == (5, 7, 1e-3)
    assert (settings.data.seq_length, settings.data.data_path) == (77, ("my data",))
    assert (settings.checkpoint.load, settings.checkpoint.save) == ("l", "s")
    assert settings.data.tokenizer_name_or_path == "t"


@pytest.mark.parametrize(("command", "lr"), [("pretrain", 1.25e-6), ("lora", 1.25e-5), ("dpo", 5e-7)])
def test_the_learning_rate_is_the_commands_or_given(site: Site, launchers: Path, command: str, lr: float) -> None:
    script = training_script(command, "0point6b", "torch")
    assert site.run(script, launchers=launchers).settings.optimizer.lr == lr
    given = site.run(script, launchers=launchers, LR="2e-8", MIN_LR="1e-9").settings.optimizer
    assert (given.lr, given.min_lr) == (2e-8, 1e-9)
    assert site.run(script, launchers=launchers, LR_DECAY_STYLE="constant").settings.optimizer.min_lr == 0


def test_each_machine_has_a_log_and_starts_are_added(site: Site, launchers: Path) -> None:
    for rank in (0, 1, 1):
        site.run(PRETRAIN["torch"], launchers=launchers, NNODES=2, NODE_RANK=rank)
    first, second = (site.root / f"logs/train_qwen3_0point6b_ptd{end}.log" for end in ("", "_node1"))
    assert second.read_text().count("--node-rank\n1\n") == 2
    assert first.read_text().count("--node-rank\n0\n") == 1


@pytest.mark.parametrize("script", [*PRETRAIN.values(), *TUNE.values()])
def test_a_blend_is_several_words(site: Site, launchers: Path, script: str) -> None:
    settings = site.run(script, launchers=launchers, DATA_PATH="0.3 a_text_document 0.7 b*").settings
    assert settings.data.data_path == ("0.3", "a_text_document", "0.7", "b*")


@pytest.mark.parametrize("script", [*PRETRAIN.values(), *TUNE.values()])
def test_the_launcher_is_told_the_world(site: Site, launchers: Path, script: str) -> None:
    world = {"NPUS_PER_NODE": 4, "NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "host", "MASTER_PORT": 6000}
    launch = site.run(script, launchers=launchers, **world).settings.launch
    assert (launch.nproc_per_node, launch.nnodes, launch.node_rank) == (4, 2, 1)
    assert (launch.master_addr, launch.master_port) == ("host", 6000)


@pytest.mark.parametrize("script", [name for name in TRAINING_SCRIPTS if name.startswith("mindspore")])
def test_no_random_weights_unless_asked_for(site: Site, launchers: Path, script: str) -> None:
    """A folder, named or not, is loaded; INIT=random goes before it."""
    for variables, load in (({}, "./model_weights/qwen3_mcore/"), ({"CKPT_LOAD_DIR": "nowhere"}, "nowhere")):
        done = site.run(script, launchers=launchers, **variables)
        assert (done.settings.checkpoint.init, done.settings.checkpoint.load) == (None, load)
        assert "random" not in done.output
    checkpoint = site.run(script, launchers=launchers, CKPT_LOAD_DIR="nowhere", INIT="random").settings.checkpoint
    assert (checkpoint.init, checkpoint.load) == ("random", None)


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_an_empty_ckpt_load_dir_means_random_weights(site: Site, launchers: Path, script: str) -> None:
    """As the guide says; one line says so, before all else."""
    done = site.run(script, launchers=launchers, CKPT_LOAD_DIR="")
    assert done.output.splitlines()[0] == "> CKPT_LOAD_DIR is empty: a new run starts from random weights"
    assert (done.settings.checkpoint.init, done.settings.checkpoint.load) == ("random", None)


def test_flags_of_the_larger_sizes_are_understood() -> None:
    settings, notices = parse_settings("pretrain", "", (MODEL + RUN + UPSTREAM["P pretrain"] + LARGER).split())
    check_settings(settings)
    assert len(notices) == 1
    assert settings.data.reset_attention_mask


@pytest.mark.parametrize("name", UPSTREAM)
def test_upstreams_flags_are_understood(name: str) -> None:
    """With the program's name and the paths replaced, MindSpeed-LLM's own 0.6B scripts train Qwen3-0.6B here."""
    command = name.split()[1].replace("lora", "finetune").replace("dpo", "finetune")
    settings, notices = parse_settings(command, "", (MODEL + RUN + UPSTREAM[name]).split())
    check_settings(settings)
    assert len(notices) == 1
    assert settings.model.num_query_groups == 8
    assert settings.optimizer.adam_beta2 == 0.95
    assert settings.training.bf16
    assert settings.data.is_instruction_dataset == (command == "finetune")
    assert settings.checkpoint.load == "LOAD"
    assert bool(settings.lora.lora_target_modules) == ("lora" in name)


def test_upstreams_conversion_flags_are_understood() -> None:
    rest, notices, _ = split_ignored(CONVERT.split(), CONVERT_IGNORED)
    options = parse(ConvertOptions, "convert", "", rest)
    assert (options.load_model_type, options.save_model_type, options.params_dtype) == ("hf", "mg", "bf16")
    assert len(notices) == 1


@pytest.mark.parametrize(
    "more",
    [
        "--handler-name GeneralPretrainHandler --json-keys text",
        "--handler-name AlpacaStyleInstructionHandler --enable-thinking true --prompt-type qwen3",
        "--handler-name GeneralPretrainHandler --datasets a b --reward-tokens + - --seed 5",
    ],
)
def test_upstreams_preprocessing_flags_are_understood(more: str) -> None:
    rest, _, _ = split_ignored((PREPROCESS + more).split(), PREPROCESS_IGNORED)
    options = parse(PreprocessFlags, "preprocess", "", rest)
    assert (options.workers, options.handler_name) == (4, more.split()[1])
