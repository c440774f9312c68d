"""Every flag of upstream's Qwen3 pretraining and full-tuning scripts, of both its backends, and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tandem.__main__ import main
from tandem.cli.settings import parse_settings
from tandem.config.settings import LaunchSettings
from tandem.errors import UserError

# msrun's and torchrun's own, as the scripts pass them; the settings of the launch that they become.
LAUNCHER = {
    "--worker_num 16 --local_worker_num 8 --node_rank 1 --master_addr 10.0.0.1 --master_port 6011 --log_dir=msrun_log "
    "--join=True --cluster_time_out=300": {"log_dir": "msrun_log"},
    "--nproc_per_node 8 --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 6011": {},
}

# A flag with words of the scripts -> the setting that takes them, and its value then.
SETTINGS: dict[str, tuple[str, Any]] = {
    "--ai-framework mindspore": ("training.ai_framework", "mindspore"),
    "--seed 42": ("training.seed", 42),
    "--no-shared-storage": ("checkpoint.no_shared_storage", True),
    "--num-layers 28": ("model.num_layers", 28),
    "--hidden-size 1024": ("model.hidden_size", 1024),
    "--ffn-hidden-size 3072": ("model.ffn_hidden_size", 3072),
    "--num-attention-heads 16": ("model.num_attention_heads", 16),
    "--num-query-groups 8": ("model.num_query_groups", 8),
    "--kv-channels 128": ("model.kv_channels", 128),
    "--norm-epsilon 1e-6": ("model.norm_epsilon", 1e-6),
    "--rotary-base 1000000": ("model.rotary_base", 1e6),
    "--max-position-embeddings 4096": ("model.max_position_embeddings", 4096),
    "--untie-embeddings-and-output-weights": ("model.untie_embeddings_and_output_weights", True),
    "--make-vocab-size-divisible-by 1": ("model.make_vocab_size_divisible_by", 1),
    "--padded-vocab-size 151936": ("model.padded_vocab_size", 151936),
    "--init-method-std 0.01": ("model.init_method_std", 0.01),
    "--attention-dropout 0.0": ("model.attention_dropout", 0.0),
    "--hidden-dropout 0.0": ("model.hidden_dropout", 0.0),
    "--tensor-model-parallel-size 8": ("parallel.tensor_model_parallel_size", 8),
    "--pipeline-model-parallel-size 2": ("parallel.pipeline_model_parallel_size", 2),
    "--num-layers-per-virtual-pipeline-stage 4": ("parallel.num_layers_per_virtual_pipeline_stage", 4),
    "--context-parallel-size 1": ("parallel.context_parallel_size", 1),
    "--norm-topk-prob": ("experts.norm_topk_prob", True),
    "--sequence-parallel": ("parallel.sequence_parallel", True),
    "--use-distributed-optimizer": ("parallel.use_distributed_optimizer", True),
    "--overlap-grad-reduce": ("parallel.overlap_grad_reduce", True),
    "--overlap-param-gather": ("parallel.overlap_param_gather", True),
    "--recompute-granularity full": ("training.recompute_granularity", "full"),
    "--recompute-method block": ("training.recompute_method", "block"),
    "--recompute-num-layers 2": ("training.recompute_num_layers", 2),
    "--bf16": ("training.bf16", True),
    "--micro-batch-size 1": ("training.micro_batch_size", 1),
    "--global-batch-size 64": ("training.global_batch_size", 64),
    "--train-iters 2000": ("training.train_iters", 2000),
    "--lr 1.25e-6": ("optimizer.lr", 1.25e-6),
    "--min-lr 1.25e-7": ("optimizer.min_lr", 1.25e-7),
    "--lr-decay-style cosine": ("optimizer.lr_decay_style", "cosine"),
    "--lr-warmup-fraction 0.01": ("optimizer.lr_warmup_fraction", 0.01),
    "--weight-decay 1e-1": ("optimizer.weight_decay", 0.1),
    "--clip-grad 1.0": ("optimizer.clip_grad", 1.0),
    "--adam-beta1 0.9": ("optimizer.adam_beta1", 0.9),
    "--adam-beta2 0.95": ("optimizer.adam_beta2", 0.95),
    "--data-path ./finetune_dataset/alpaca": ("data.data_path", ("./finetune_dataset/alpaca",)),
    "--split 100,0,0": ("data.split", "100,0,0"),
    "--seq-length 4096": ("data.seq_length", 4096),
    "--handler-name AlpacaStyleInstructionHandler": ("data.handler_name", "AlpacaStyleInstructionHandler"),
    "--workers 4": ("data.workers", 4),
    "--log-interval 1": ("logging.log_interval", 1),
    "--prompt-type qwen3": ("data.prompt_type", "qwen3"),
    "--enable-thinking true": ("data.enable_thinking", "true"),
    "--pack": ("data.pack", True),
    "--neat-pack": ("data.neat_pack", True),
    "--is-instruction-dataset": ("data.is_instruction_dataset", True),
    "--stage sft": ("data.stage", "sft"),
    "--finetune": ("checkpoint.finetune", True),
    "--no-pad-to-seq-lengths": ("data.no_pad_to_seq_lengths", True),
    "--variable-seq-lengths": ("data.variable_seq_lengths", True),
    "--reset-attention-mask": ("data.reset_attention_mask", True),
    "--tokenizer-type PretrainedFromHF": ("data.tokenizer_type", "PretrainedFromHF"),
    "--tokenizer-name-or-path ./model_from_hf/qwen3_hf": ("data.tokenizer_name_or_path", "./model_from_hf/qwen3_hf"),
    "--load ./ckpt": ("checkpoint.load", "./ckpt"),
    "--save ./out": ("checkpoint.save", "./out"),
    "--save-interval 2000": ("checkpoint.save_interval", 2000),
    "--no-load-optim": ("checkpoint.no_load_optim", True),
    "--no-load-rng": ("checkpoint.no_load_rng", True),
    "--exit-on-missing-checkpoint": ("checkpoint.exit_on_missing_checkpoint", True),
    "--ckpt-format torch": ("checkpoint.ckpt_format", "torch"),
    "--log-throughput": ("logging.log_throughput", True),
    "--eval-interval 2000": ("training.eval_interval", 2000),
    "--eval-iters 0": ("training.eval_iters", 0),
    "--initial-loss-scale 4096": ("training.initial_loss_scale", 4096.0),
}

# What happens anyway, or changes no result: accepted, and said once.
NO_EFFECT = (
    *("--use-mcore-models", "--spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec", "--transformer-impl local"),
    *("--distributed-backend nccl", "--group-query-attention", "--qk-layernorm", "--swiglu", "--normalization RMSNorm"),
    *(
        "--position-embedding-type rope",
        "--use-rotary-position-embeddings",
        "--disable-bias-linear",
    ),
    *("--context-parallel-algo megatron_cp_algo", "--context-parallel-algo ulysses_cp_algo"),
    *("--attention-mask-type causal", "--attention-mask-type general"),
    *("--use-flash-attn", "--use-fused-rotary-pos-emb", "--use-fused-swiglu"),
    *("--use-fused-rmsnorm", "--no-masked-softmax-fusion", "--attention-softmax-in-fp32", "--use-ascend-coc"),
    *("--no-gradient-accumulation-fusion", "--coc-fused-kernel", "--use-ascend-mc2", "--reuse-fp32-param"),
    *("--tokenizer-not-use-fast", "--enable-hf2mg-convert", "--model-type-hf qwen3"),
)
# The same, of other scripts of upstream's and of Megatron-LM's.
OTHERS = (
    *("--exit-signal-handler", "--override-opt_param-scheduler", "--log-params-norm", "--log-num-zeros-in-grad"),
    *("--profile-ranks 0 1 -1", "--no-save-rng", "--manual-gc", "--manual-gc-interval 50", "--swap-optimizer"),
    *("--swap-attention", "--use-cp-send-recv-overlap", "--use-fused-ring-attention-update"),
    *("--kv-head-repeat-before-uly-alltoall", "--gemm-gradient-accumulation-fusion", "--disable-gloo-group"),
    *("--recompute-activation-function", "--recompute-activation-function-num-layers 2", "--recompute-norm"),
    *("--recompute-norm-num-layers 2", "--enable-recompute-layers-per-pp-rank", "--moe-permutation-async-comm"),
    *("--moe-permute-fusion", "--moe-alltoall-overlap-comm", "--moe-fb-overlap", "--moe-zero-memory level1"),
    *("--moe-token-dispatcher-type alltoall_seq", "--moe-token-dispatcher-type flex", "--moe-grouped-gemm"),
    *("--moe-router-topk-scaling-factor 1.0", "--moe-router-score-function softmax", "--topk-softmax-in-fp32"),
    *("--moe-alltoall-mc2", "--moe-allgather-overlap-comm", "--enable-a2avc 1"),
    *("--moe-pad-expert-input-to-capacity", "--max-new-tokens 256"),
)

REFUSED = (
    "--spec my.module my_spec",
    "--transformer-impl transformer_engine",
    "--normalization LayerNorm",
    "--position-embedding-type alibi",
    "--context-parallel-algo hybrid_cp_algo",
    "--model-type-hf llama2",
    "--use-ascend-coc --use-ascend-mc2",
    "--fix-router",
    "--moe-router-topk-scaling-factor 2.5",
    *("--o2-optimizer", "--o2-gradient", "--dataloader-type cyclic"),
)


def value_of(words: Sequence[str], name: str) -> Any:
    settings, _ = parse_settings("pretrain", "", words)
    group, _, field = name.partition(".")
    return getattr(getattr(settings, group), field)


@pytest.mark.parametrize("line", SETTINGS)
def test_the_flag_sets_what_it_says(line: str) -> None:
    name, value = SETTINGS[line]
    assert value_of(line.split(), name) == value


@pytest.mark.parametrize("line", [*NO_EFFECT, *OTHERS])
def test_the_flag_is_accepted_and_said_to_have_no_effect(line: str) -> None:
    settings, notices = parse_settings("pretrain", "", line.split())
    assert settings == parse_settings("pretrain", "", [])[0]
    assert notices == [f"accepted, without effect here: {line.split()[0]}"]


@pytest.mark.parametrize("line", LAUNCHER)
def test_a_launchers_flags_say_which_processes_to_start(line: str) -> None:
    expected = {"nproc_per_node": 8, "nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1", "master_port": 6011}
    settings, _ = parse_settings("pretrain", "", line.split())
    assert settings.launch == LaunchSettings(**{**expected, **LAUNCHER[line]})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--worker_num 16", "--worker_num 16: expected --worker_num .* and --local_worker_num"),
        ("--worker-num=12 --local-worker-num=8", "--worker_num 12 --local_worker_num 8: expected .* a multiple of"),
        ("--local_worker_num 8 --worker_num all", "--local_worker_num 8 --worker_num all: expected"),
    ],
)
def test_wrong_numbers_of_msrun_processes_are_errors(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_settings("pretrain", "", line.split())


@pytest.mark.parametrize("line", REFUSED)
def test_the_flag_is_refused_with_its_name(line: str) -> None:
    with pytest.raises(UserError, match=line.split()[0]):
        parse_settings("pretrain", "", line.split())


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("finetune --lu-lora-lr 1.25e-6", "LU-LoRA"),
        ("evaluate --lu-lora-lr-ratio=1", "LU-LoRA"),
        ("generate --lu_lora_final_layer_index 3", "LU-LoRA"),
        ("finetune --qlora", "QLoRA"),
        ("convert --qlora-nf4", "QLoRA"),
        ("convert --qlora-save-dequantize", "QLoRA"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(line: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    flag = line.split()[1].partition("=")[0]
    assert f"{flag}: {name}, " in capsys.readouterr().err


def test_a_checkpoints_schedule_is_asked_for_in_megatrons_spelling() -> None:
    assert value_of(["--use-checkpoint-opt_param-scheduler"], "optimizer.use_checkpoint_opt_param_scheduler") is True


def test_a_router_in_fp32_is_asked_for_in_upstreams_spelling() -> None:
    assert value_of(["--router-gating-in-fp32"], "experts.moe_router_dtype") == "fp32"


def test_all_of_them_at_once_are_one_command_line() -> None:
    words = [word for line in (*SETTINGS, *NO_EFFECT) if line != "--use-ascend-mc2" for word in line.split()]
    settings, notices = parse_settings("pretrain", "", [*words, "--bf16"])
    assert settings.model.num_layers == 28
    assert len(notices) == 1


def test_the_tables_hold_every_flag_of_the_scripts(shared_data: Path) -> None:
    """Against the inventory of upstream's scripts: those that pretraining (T) and full tuning (F) scripts use."""
    text = (shared_data.parent / "reference" / "mindspeed-llm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| `(--[\w-]+)` \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE)
    assert len(rows) == 131
    used = {flag for flag, mindspore, torch in rows if re.search(r"\b[TF]\d", f"{mindspore} {torch}")}
    launcher = re.findall(r"--\w+", " ".join(LAUNCHER))
    assert used == {*launcher, *(line.split()[0] for line in (*SETTINGS, *NO_EFFECT))}
