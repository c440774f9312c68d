#!/bin/bash
# Train on preferences (DPO): Qwen3-8B on MindSpore, or on PyTorch (AI_FRAMEWORK=torch). Variables: examples/README.md.
SIZE=8b
FFN_HIDDEN_SIZE="${FFN_HIDDEN_SIZE-12288}" # weights of another size are refused; empty: any
NPUS_PER_NODE="${NPUS_PER_NODE:-8}" # processes on this machine; TP x PP must divide them all
TP="${TP:-1}"
PP="${PP:-2}"
MBS="${MBS:-1}"
GBS="${GBS:-16}"
SEQUENCE_PARALLEL="${SEQUENCE_PARALLEL:-true}"
USE_DISTRIBUTED_OPTIMIZER="${USE_DISTRIBUTED_OPTIMIZER:-true}"
SAVE_INTERVAL="${SAVE_INTERVAL:-1000}"

# shellcheck source-path=SCRIPTDIR source=../../common/train_qwen3.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../common/train_qwen3.sh" dpo
