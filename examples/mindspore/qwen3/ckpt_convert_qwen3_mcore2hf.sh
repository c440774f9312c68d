#!/bin/bash
# Megatron-core layout -> Hugging Face weights. Every variable can be set from the environment.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../../common/logged.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common/logged.sh"

LOAD_DIR="${LOAD_DIR:-./model_weights/qwen3_mcore/}" # a converted checkpoint or a training run, of any TP and PP
SAVE_DIR="${SAVE_DIR:-./model_from_hf/qwen3_hf/}"    # a folder that already holds a model receives mg2hf/
PARAMS_DTYPE="${PARAMS_DTYPE:-bf16}"
MODEL_TYPE_HF="${MODEL_TYPE_HF:-qwen3}"
EXTRA_ARGS="${EXTRA_ARGS:-}" # further flags of `tandem convert`

CONVERT_ARGS=(
    --load-model-type mg
    --save-model-type hf
    --load-dir "$LOAD_DIR"
    --save-dir "$SAVE_DIR"
    --params-dtype "$PARAMS_DTYPE"
    --model-type-hf "$MODEL_TYPE_HF"
)

# shellcheck disable=SC2086 # EXTRA_ARGS holds several words
logged logs/ckpt_convert_qwen3_mcore2hf.log python -m tandem convert "${CONVERT_ARGS[@]}" $EXTRA_ARGS
