#!/bin/bash
# Hugging Face weights -> Megatron-core layout. Every variable can be set from the environment.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=../../common/logged.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common/logged.sh"

LOAD_DIR="${LOAD_DIR:-./model_from_hf/qwen3_hf/}"
SAVE_DIR="${SAVE_DIR:-./model_weights/qwen3_mcore/}"
PARAMS_DTYPE="${PARAMS_DTYPE:-bf16}"
MODEL_TYPE_HF="${MODEL_TYPE_HF:-qwen3}"
TP="${TP:-1}" # training loads any TP and PP, so these need not be those of the training script
PP="${PP:-1}"
EXTRA_ARGS="${EXTRA_ARGS:-}" # further flags of `tandem convert`, such as: --ckpt-format torch

CONVERT_ARGS=(
    --load-model-type hf
    --save-model-type mg
    --target-tensor-parallel-size "$TP"
    --target-pipeline-parallel-size "$PP"
    --load-dir "$LOAD_DIR"
    --save-dir "$SAVE_DIR"
    --params-dtype "$PARAMS_DTYPE"
    --model-type-hf "$MODEL_TYPE_HF"
)

# shellcheck disable=SC2086 # EXTRA_ARGS holds several words
logged logs/ckpt_convert_qwen3_hf2mcore.log python -m tandem convert "${CONVERT_ARGS[@]}" $EXTRA_ARGS
