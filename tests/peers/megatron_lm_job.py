"""Megatron-LM's own way to a checkpoint: it reads `args` and weights, computes, and saves again.

python megatron_lm_job.py MEGATRON_LM TOKENS CHECKPOINT FLAGS...

Leaves `logits.npy` and the checkpoint `again` next to the iteration. FLAGS are Megatron-LM's, for
what `--use-checkpoint-args` does not take from a file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

root, tokens, checkpoint, *flags = sys.argv[1:]
sys.path.insert(0, root)  # its megatron.core goes before an installed one
sys.modules["megatron.core.transformer.custom_layers.batch_invariant_kernels"] = mock.MagicMock()  # needs Triton

import mcore_model  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from gpt_builders import gpt_builder  # noqa: E402
from megatron.training.arguments import parse_args, validate_args  # noqa: E402
from megatron.training.checkpointing import load_args_from_checkpoint, load_checkpoint, save_checkpoint  # noqa: E402
from megatron.training.global_vars import set_global_variables  # noqa: E402

FLAGS = [
    *("--use-checkpoint-args", "--ckpt-format", "torch", "--exit-on-missing-checkpoint"),
    *("--no-load-optim", "--no-load-rng", "--no-save-optim", "--no-save-rng", "--save-interval", "1"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "1", "--seq-length", "64", "--micro-batch-size", "1"),
    *("--lr", "1", "--train-iters", "1"),
    # a CPU has no other
    *("--transformer-impl", "local", "--distributed-backend", "gloo", "--use-cpu-initialization"),
    *("--no-persist-layer-norm", "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"),
    *("--no-bias-swiglu-fusion", "--no-rope-fusion"),
]


def main() -> None:
    sys.argv[1:] = ["--load", checkpoint, "--save", str(Path(checkpoint) / "again"), *FLAGS, *flags]
    args, *_ = load_args_from_checkpoint(parse_args())
    validate_args(args)
    set_global_variables(args, build_tokenizer=False)
    with mcore_model.alone():
        model = gpt_builder(args, pre_process=True, post_process=True)
        load_checkpoint([model], None, None)
        logits = mcore_model.logits([model], torch.from_numpy(np.load(tokens)))
        np.save(Path(checkpoint) / "logits.npy", logits.numpy())
        save_checkpoint(1, [model], None, None, 0)


if __name__ == "__main__":
    tensor = torch.tensor
    with (
        mcore_model.on_cpu(),
        mock.patch("torch.tensor", lambda *values, device=None, **more: tensor(*values, **more)),
        mock.patch("torch.cuda.get_rng_state", torch.get_rng_state),
    ):
        main()
