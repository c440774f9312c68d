"""A rank of Megatron-core: loads its part of each checkpoint, computes, and saves its part again.

Run by torchrun: python mcore_job.py TOKENS CHECKPOINT...    In each checkpoint's folder the last stage's tensor ranks
leave `logits_RANK.npy`, and all ranks together the checkpoints `again`, `distributed` and `by_layer`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mcore_model
import numpy as np
import torch
from megatron.core import parallel_state

from tandem.checkpoints.folders import find_iteration
from tandem.checkpoints.megatron.names import FILE
from tandem.launch.member import exit_with


def one(folder: Path, tokens: torch.Tensor) -> None:
    args = mcore_model.read(next(find_iteration(folder).glob(f"*/{FILE}")))["args"]
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    chunks = mcore_model.load(folder)
    logits = mcore_model.logits(chunks, tokens)
    if logits is not None:
        np.save(folder / f"logits_{parallel_state.get_tensor_model_parallel_rank()}.npy", logits.numpy())
    mcore_model.save(folder / "again", chunks, args)
    mcore_model.save_distributed(folder / "distributed", chunks, args)
    mcore_model.save_distributed(folder / "by_layer", chunks, args, singleton_local_shards=True)
    parallel_state.destroy_model_parallel()


def main() -> None:
    torch.distributed.init_process_group("gloo")
    with mcore_model.on_cpu():
        for path in sys.argv[2:]:
            one(Path(path), torch.from_numpy(np.load(sys.argv[1])))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    exit_with(main)
