#!/bin/bash
# Fine-tune all weights of Qwen3-30B-A3B on MindSpore, or on PyTorch (AI_FRAMEWORK=torch). Variables: examples/README.md.
SIZE=30b_a3b
NPUS_PER_NODE="${NPUS_PER_NODE:-8}" # processes on this machine; TP x PP must divide them all
NNODES="${NNODES:-2}"
TP="${TP:-4}"
PP="${PP:-2}"
EP="${EP:-2}"
MBS="${MBS:-1}"
GBS="${GBS:-64}"
MOE_AUX_LOSS_COEFF="${MOE_AUX_LOSS_COEFF-0.001}"
SEQUENCE_PARALLEL="${SEQUENCE_PARALLEL:-true}"
USE_DISTRIBUTED_OPTIMIZER="${USE_DISTRIBUTED_OPTIMIZER:-true}"

# shellcheck source-path=SCRIPTDIR source=../../common/train_qwen3.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common/train_qwen3.sh" finetune
