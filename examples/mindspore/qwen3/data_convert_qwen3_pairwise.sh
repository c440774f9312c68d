#!/bin/bash
# Pairs of answers -> OUTPUT_PREFIX_packed_{chosen,rejected}_{input_ids,labels}_document.bin/.idx.
# Every variable can be set from the environment.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../../common/logged.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common/logged.sh"

INPUT="${INPUT:-./dataset/orca_rlhf.jsonl}" # a file, a folder or a pattern
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}"
OUTPUT_PREFIX="${OUTPUT_PREFIX:-./finetune_dataset/orca_rlhf}"
HANDLER_NAME="${HANDLER_NAME:-AlpacaStylePairwiseHandler}"
ENABLE_THINKING="${ENABLE_THINKING:-true}"
WORKERS="${WORKERS:-4}"
ORCA='{"prompt":"question","query":"","system":"system"}' # the fields of orca_rlhf.jsonl
MAP_KEYS="${MAP_KEYS-$ORCA}"                              # empty: those of the handler
EXTRA_ARGS="${EXTRA_ARGS:-}" # further flags of `tandem preprocess`, such as: --seq-length 4096

DATA_ARGS=(
    --input "$INPUT"
    --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path "$TOKENIZER_PATH"
    --handler-name "$HANDLER_NAME"
    --prompt-type qwen3
    --enable-thinking "$ENABLE_THINKING"
    --output-prefix "$OUTPUT_PREFIX"
    --workers "$WORKERS"
    --log-interval 1000
)

if [[ -n "$MAP_KEYS" ]]; then
    DATA_ARGS+=(--map-keys "$MAP_KEYS")
fi

mkdir -p "$(dirname "$OUTPUT_PREFIX")"
# shellcheck disable=SC2086 # EXTRA_ARGS holds several words
logged logs/data_convert_qwen3_pairwise.log python -m tandem preprocess "${DATA_ARGS[@]}" $EXTRA_ARGS
