#!/bin/bash
# The same as ../qwen3/ckpt_convert_qwen3_hf2mcore.sh, for mixtures of experts.
export MODEL_TYPE_HF="${MODEL_TYPE_HF:-qwen3-moe}"
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../qwen3/ckpt_convert_qwen3_hf2mcore.sh"
