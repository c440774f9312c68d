#!/bin/bash
# Pretrain Qwen3-32B on MindSpore, or on PyTorch (AI_FRAMEWORK=torch). Variables: examples/README.md.
SIZE=32b
FFN_HIDDEN_SIZE="${FFN_HIDDEN_SIZE-25600}" # weights of another size are refused; empty: any
NPUS_PER_NODE="${NPUS_PER_NODE:-8}" # processes on this machine; TP x PP must divide them all
NNODES="${NNODES:-2}"
TP="${TP:-8}"
PP="${PP:-2}"
if [[ "$PP" != 1 ]]; then # one stage is not interleaved
    VPP="${VPP-4}"
fi
MBS="${MBS:-1}"
GBS="${GBS:-128}"
USE_DISTRIBUTED_OPTIMIZER="${USE_DISTRIBUTED_OPTIMIZER:-true}"
LR_DECAY_STYLE="${LR_DECAY_STYLE:-cosine}"
LR_WARMUP_FRACTION="${LR_WARMUP_FRACTION-0.01}"
INIT_METHOD_STD="${INIT_METHOD_STD-0.01}"

# shellcheck source-path=SCRIPTDIR source=../../common/train_qwen3.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common/train_qwen3.sh" pretrain
