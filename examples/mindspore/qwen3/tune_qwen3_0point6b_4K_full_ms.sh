#!/bin/bash
# Fine-tune all weights of Qwen3-0.6B on MindSpore. Every variable can be set from the environment.
set -euo pipefail

NPUS_PER_NODE="${NPUS_PER_NODE:-1}" # processes on this machine; TP x PP must divide them all
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-6015}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"

CKPT_LOAD_DIR="${CKPT_LOAD_DIR-./model_weights/qwen3_mcore/}" # or the CKPT_SAVE_DIR of pretraining
CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/qwen3-0point6b_tune}"
DATA_PATH="${DATA_PATH:-./finetune_dataset/alpaca}" # one, or several: WEIGHT PREFIX WEIGHT PREFIX
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}"
INIT="${INIT:-}" # random: random weights for TOKENIZER_PATH's config.json, in place of CKPT_LOAD_DIR

TP="${TP:-1}"
PP="${PP:-1}"
MBS="${MBS:-1}"
GBS="${GBS:-16}"
SEQ_LENGTH="${SEQ_LENGTH:-4096}"
TRAIN_ITERS="${TRAIN_ITERS:-2000}"
EXTRA_ARGS="${EXTRA_ARGS:-}" # further flags of `tandem finetune`, such as: --no-save-optim

DISTRIBUTED_ARGS=(
    --nproc-per-node "$NPUS_PER_NODE"
    --nnodes "$NNODES"
    --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR"
    --master-port "$MASTER_PORT"
)

if [[ -n "$INIT" ]]; then
    WEIGHTS_ARGS=(--init "$INIT")
else
    WEIGHTS_ARGS=(--load "${CKPT_LOAD_DIR:?is empty: name the folder of the initial weights, or set INIT=random}")
fi

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
)

TRAIN_ARGS=(
    --micro-batch-size "$MBS"
    --global-batch-size "$GBS"
    --train-iters "$TRAIN_ITERS"
    --lr 1.25e-6
    --min-lr 1.25e-7
    --lr-warmup-fraction 0.01
    --weight-decay 1e-1
    --clip-grad 1.0
    --adam-beta1 0.9
    --adam-beta2 0.95
    --bf16
)

DATA_WORDS=("$DATA_PATH")
if [[ "$DATA_PATH" =~ ^[0-9.]+\  ]]; then
    read -ra DATA_WORDS <<< "$DATA_PATH"
fi
DATA_ARGS=(
    --data-path "${DATA_WORDS[@]}"
    --split "100,0,0"
    --seq-length "$SEQ_LENGTH"
    --tokenizer-name-or-path "$TOKENIZER_PATH"
)

TUNE_ARGS=(
    --finetune # weights only: start at iteration 0
    --stage sft
    --is-instruction-dataset
    --prompt-type qwen3
)

OUTPUT_ARGS=(
    --save "$CKPT_SAVE_DIR"
    --save-interval "$TRAIN_ITERS"
    --eval-iters 0
    --log-interval 1
    --log-throughput
)

mkdir -p logs
# shellcheck disable=SC2086 # EXTRA_ARGS holds several words
python -m tandem finetune \
    "${DISTRIBUTED_ARGS[@]}" \
    --ai-framework mindspore \
    "${WEIGHTS_ARGS[@]}" \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${TRAIN_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${TUNE_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" \
    $EXTRA_ARGS 2>&1 | tee logs/tune_qwen3_0point6b_full_ms.log
