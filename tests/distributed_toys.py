"""Distributed checkpoints that torch itself writes, in the forms of Megatron's `torch_dist`. See also tests/peers."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tandem.checkpoints.folders import TRACKER, iteration_folder
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.megatron.args import to_args
from tandem.models.tensors import EMBEDDING, OUTPUT, layer_prefix, tensor_table
from tandem.parallel.layout import Layout

FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def as_torch(array: np.ndarray) -> Any:
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def by_layer(source: TensorSource, prefix: str = "") -> dict[str, Any]:
    """Every layer under a name of its own, as a plain distributed checkpoint of torch has it."""
    return {prefix + name: as_torch(source.read(name)) for name in tensor_table(source.config)}


def stacked(source: TensorSource, noop_layers: tuple[int, ...] = (), padding: int = 0) -> dict[str, Any]:
    """Layers stacked, and norms under Transformer Engine's names, as Megatron-core has them. Noop layers are zeros."""
    import torch

    result: dict[str, Any] = {}
    for name, spec in tensor_table(source.config).items():
        tensor = as_torch(source.read(name))
        if spec.layer is None:
            more = padding if name in (EMBEDDING, OUTPUT) else 0
            result[name] = torch.cat([tensor, torch.zeros(more, *tensor.shape[1:], dtype=tensor.dtype)])
        elif spec.layer == 0:
            own = name.removeprefix(layer_prefix(0))
            layers = iter(as_torch(source.read(layer_prefix(n) + own)) for n in range(source.config.num_layers))
            slots = range(source.config.num_layers + len(noop_layers))
            rows = [torch.zeros_like(tensor) if slot in noop_layers else next(layers) for slot in slots]
            result[f"decoder.layers.{FUSED.get(own, own)}"] = torch.stack(rows)
    return result


def write(
    folder: Path, state: dict[str, Any], source: TensorSource | None = None, layout: Layout | None = None, **args: Any
) -> Path:
    """A checkpoint of iteration 1, whose `common.pt` describes the model of `source`; none without it.

    Returns:
        The folder of the iteration.
    """
    import torch
    from torch.distributed import checkpoint

    iteration = iteration_folder(folder, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses a process group
        checkpoint.save(state, checkpoint_id=iteration, no_dist=True)
    if source is not None:
        rows = next(tensor for name, tensor in state.items() if name.endswith(EMBEDDING)).shape[0]
        stated = to_args(source.config, layout or Layout(), "float32", rows)
        common = {"args": argparse.Namespace(**{**vars(stated), **args}), "checkpoint_version": 3.0, "iteration": 1}
        torch.save(common, iteration / "common.pt")
        (iteration / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / TRACKER).write_text("1")
    return iteration
