#!/bin/bash
# Text -> OUTPUT_PREFIX_text_document.bin/.idx. Every variable can be set from the environment.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../../common/logged.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common/logged.sh"

INPUT="${INPUT:-./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}" # a file, a folder or a pattern
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf/}"
OUTPUT_PREFIX="${OUTPUT_PREFIX:-./dataset/alpaca}"
WORKERS="${WORKERS:-4}"
EXTRA_ARGS="${EXTRA_ARGS:-}" # further flags of `tandem preprocess`, such as: --append-eod

DATA_ARGS=(
    --input "$INPUT"
    --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path "$TOKENIZER_PATH"
    --handler-name GeneralPretrainHandler
    --output-prefix "$OUTPUT_PREFIX"
    --json-keys text
    --workers "$WORKERS"
    --log-interval 1000
)

mkdir -p "$(dirname "$OUTPUT_PREFIX")"
# shellcheck disable=SC2086 # EXTRA_ARGS holds several words
logged logs/data_convert_qwen3_pretrain.log python -m tandem preprocess "${DATA_ARGS[@]}" $EXTRA_ARGS
