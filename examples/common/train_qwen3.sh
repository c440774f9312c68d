# shellcheck shell=bash
# What the training scripts of all sizes share. A script sets its size's values, then sources this file with what it
# trains: pretrain, finetune, lora, or dpo. The environment goes before every default; examples/README.md explains the
# variables.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=logged.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/logged.sh"

COMMAND="$1"
SCRIPT="${BASH_SOURCE[1]}" # as the user named it, perhaps a link
case "$SCRIPT" in
    *_ptd.sh) AI_FRAMEWORK="${AI_FRAMEWORK:-torch}" ;;
    *) AI_FRAMEWORK="${AI_FRAMEWORK:-mindspore}" ;;
esac
case "$AI_FRAMEWORK" in
    mindspore) SUFFIX=ms ;;
    *) SUFFIX=ptd ;;
esac

if [[ "$COMMAND" == pretrain ]]; then
    MASTER_PORT="${MASTER_PORT:-6011}"
    CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/qwen3-$SIZE}"
    DATA_PATH="${DATA_PATH:-./dataset/alpaca_text_document}"
    COMMAND_ARGS=(pretrain)
    LOG="logs/train_qwen3_${SIZE}_$SUFFIX.log"
else
    MASTER_PORT="${MASTER_PORT:-6015}"
    CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/qwen3-${SIZE}_${COMMAND/finetune/tune}}"
    COMMAND_ARGS=(
        finetune
        --finetune # weights only: start at iteration 0
        --is-instruction-dataset
        --prompt-type qwen3
    )
    if [[ "$COMMAND" == dpo ]]; then
        DATA_PATH="${DATA_PATH:-./finetune_dataset/orca_rlhf}"
        COMMAND_ARGS+=(--stage dpo --is-pairwise-dataset)
        LOG="logs/dpo_qwen3_${SIZE}_full_$SUFFIX.log"
    else
        DATA_PATH="${DATA_PATH:-./finetune_dataset/alpaca}"
        COMMAND_ARGS+=(--stage sft)
        LOG="logs/tune_qwen3_${SIZE}_full_$SUFFIX.log"
    fi
fi
if [[ "$COMMAND" == dpo ]]; then
    LR="${LR:-5e-7}"
fi
if [[ "$COMMAND" == lora ]]; then
    LR="${LR:-1.25e-5}"
    LOG="logs/tune_qwen3_${SIZE}_lora_$SUFFIX.log"
    COMMAND_ARGS+=(
        --lora-r "${LORA_R:-16}"
        --lora-alpha "${LORA_ALPHA:-32}"
        --lora-target-modules ${LORA_TARGET_MODULES:-linear_qkv linear_proj linear_fc1 linear_fc2}
    )
fi
MASTER_ADDR="${MASTER_ADDR:-localhost}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
if [[ "$NODE_RANK" != 0 ]]; then
    LOG="${LOG%.log}_node$NODE_RANK.log" # machines may share the disk
fi
LR="${LR:-1.25e-6}"
CKPT_LOAD_DIR="${CKPT_LOAD_DIR-./model_weights/qwen3_mcore/}" # set and empty: random weights
INIT="${INIT:-}"                                              # random: random weights, whatever CKPT_LOAD_DIR is
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}" # with random weights, the model's config.json, too
SEQ_LENGTH="${SEQ_LENGTH:-4096}"
TRAIN_ITERS="${TRAIN_ITERS:-2000}"
SAVE_INTERVAL="${SAVE_INTERVAL:-$TRAIN_ITERS}"
SEED="${SEED:-42}"
LR_DECAY_STYLE="${LR_DECAY_STYLE:-linear}"
EXTRA_ARGS="${EXTRA_ARGS:-}" # further flags of the command, such as: --no-save-optim

if [[ -z "$INIT$CKPT_LOAD_DIR" ]]; then
    echo "> CKPT_LOAD_DIR is empty: a new run starts from random weights"
    INIT=random
fi
if [[ -n "$INIT" ]]; then
    WEIGHTS_ARGS=(--init "$INIT")
else
    WEIGHTS_ARGS=(--load "$CKPT_LOAD_DIR")
fi

DISTRIBUTED_ARGS=(
    --ai-framework "$AI_FRAMEWORK"
    --nproc-per-node "$NPUS_PER_NODE"
    --nnodes "$NNODES"
    --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR"
    --master-port "$MASTER_PORT"
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
)

TRAIN_ARGS=(
    --micro-batch-size "$MBS"
    --global-batch-size "$GBS"
    --train-iters "$TRAIN_ITERS"
    --lr "$LR"
    --lr-decay-style "$LR_DECAY_STYLE"
    --weight-decay 1e-1
    --clip-grad 1.0
    --adam-beta1 0.9
    --adam-beta2 0.95
    --seed "$SEED"
    --bf16
)

DATA_WORDS=("$DATA_PATH")
if [[ "$DATA_PATH" =~ ^[0-9.]+\  ]]; then # WEIGHT PREFIX WEIGHT PREFIX
    read -ra DATA_WORDS <<< "$DATA_PATH"
fi
DATA_ARGS=(
    --data-path "${DATA_WORDS[@]}"
    --split "100,0,0"
    --seq-length "$SEQ_LENGTH"
    --tokenizer-name-or-path "$TOKENIZER_PATH"
)

OUTPUT_ARGS=(
    --save "$CKPT_SAVE_DIR"
    --save-interval "$SAVE_INTERVAL"
    --eval-iters 0
    --log-interval 1
    --log-throughput
)

# Variables that a size may leave out.
add_value() { # VARIABLE FLAG
    if [[ -n "${!1:-}" ]]; then
        TRAIN_ARGS+=("$2" "${!1}")
    fi
}
add_switch() { # VARIABLE FLAG
    case "${!1:-false}" in
        true) TRAIN_ARGS+=("$2") ;;
        false) ;;
        *)
            echo "$SCRIPT: $1=${!1}: expected true or false" >&2
            exit 2
            ;;
    esac
}
if [[ "$LR_DECAY_STYLE" != constant ]]; then
    TRAIN_ARGS+=(--min-lr "${MIN_LR:-1.25e-7}")
fi
add_value EP --expert-model-parallel-size
add_value ETP --expert-tensor-parallel-size
add_value MOE_AUX_LOSS_COEFF --moe-aux-loss-coeff
add_value VPP --num-layers-per-virtual-pipeline-stage
add_value FFN_HIDDEN_SIZE --ffn-hidden-size
add_value LR_WARMUP_FRACTION --lr-warmup-fraction
add_value INIT_METHOD_STD --init-method-std
add_switch SEQUENCE_PARALLEL --sequence-parallel
add_switch USE_DISTRIBUTED_OPTIMIZER --use-distributed-optimizer

# shellcheck disable=SC2086 # EXTRA_ARGS holds several words
logged "$LOG" python -m tandem \
    "${COMMAND_ARGS[@]}" \
    "${DISTRIBUTED_ARGS[@]}" \
    "${WEIGHTS_ARGS[@]}" \
    "${TRAIN_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${OUTPUT_ARGS[@]}" \
    $EXTRA_ARGS
