"""Megatron-core's own GPTModel on CPU: built from the `args` of a checkpoint, loaded from it, saved again."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import distributed

from tandem.checkpoints.folders import TRACKER, find_iteration, iteration_folder
from tandem.checkpoints.megatron.names import CHECKPOINT_VERSION, FILE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it misses Apex and Transformer Engine
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.safe_globals import SAFE_GLOBALS
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

FLOAT = torch.float32
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # its router asks for it also where there is no Transformer Engine


@contextmanager
def on_cpu() -> Iterator[None]:
    """Megatron asks for CUDA's device and random state and moves tied embeddings, wherever its weights are."""
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    with (
        mock.patch("torch.cuda.current_device", return_value="cpu"),
        mock.patch("torch.Tensor.cuda", lambda tensor, *_, **__: tensor),
        mock.patch("torch.cuda.synchronize"),
    ):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """A group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()


def build(args: argparse.Namespace, first_stage: int | None = None) -> list[GPTModel]:
    """This rank's chunks, as Megatron-LM makes them of `args`: where names are the same, the value is taken.

    `first_stage` is the number of its layers, where interleaved stages are uneven.
    """
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    values = {name: value for name, value in vars(args).items() if name in names}
    if args.num_layer_list:
        first, *_, last = map(int, args.num_layer_list.split(","))
        values |= {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    config = TransformerConfig(
        **{
            "num_layers_in_first_pipeline_stage": first_stage,
            **values,
            "num_moe_experts": getattr(args, "num_experts", None),
            "layernorm_epsilon": args.norm_epsilon,
            "layernorm_zero_centered_gamma": args.apply_layernorm_1p,
            "gated_linear_unit": args.swiglu,
            "activation_func": torch.nn.functional.silu,
            "params_dtype": FLOAT,
            "pipeline_dtype": FLOAT,
            "use_cpu_initialization": True,
            "cuda_graph_scope": [],
        }
    )
    for name, value in vars(args).items():
        if name.startswith("yarn_"):  # Megatron-core reads them there; Megatron Bridge sets them
            setattr(config, name, value)
    virtual = args.virtual_pipeline_model_parallel_size
    return [_chunk(args, config, stage) for stage in (range(virtual) if virtual else [None])]


def _chunk(args: argparse.Namespace, config: TransformerConfig, stage: int | None) -> GPTModel:
    spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization)
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        vp_stage=stage,
    )


def read(path: Path) -> dict:
    """A rank's file, as Megatron-core's trainer reads it: no object but those that it lists."""
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        return torch.load(path, weights_only=True)


def rank_file(folder: Path) -> Path:
    """This rank's file below an iteration's folder, under Megatron's name."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return folder / name / FILE


def load(folder: Path) -> list[GPTModel]:
    """This rank's chunks with the weights of the checkpoint; `strict` names every key but `_extra_state`."""
    content = read(rank_file(find_iteration(folder)))
    chunks = build(content["args"], uneven_first_stage(folder, content["args"]))
    for key, chunk in zip(_keys(chunks), chunks):
        chunk.load_state_dict(content[key], strict=True)
    assert {key for key in content if key.startswith("model")} == set(_keys(chunks))
    return chunks


def uneven_first_stage(folder: Path, args: argparse.Namespace) -> int | None:
    """Layers of the first stage, when its interleaved chunks are uneven: the flag that Megatron-LM wants then."""
    if not args.virtual_pipeline_model_parallel_size or args.num_layers_per_virtual_pipeline_stage:
        return None
    first = read(find_iteration(folder) / "mp_rank_00_000" / FILE)
    return sum(name.endswith("linear_fc2.weight") for key in first if key.startswith("model") for name in first[key])


def save(folder: Path, chunks: list[GPTModel], args: argparse.Namespace) -> None:
    """What Megatron-LM's trainer saves of this rank, but for optimizer and random state."""
    path = rank_file(iteration_folder(folder, 1))
    path.parent.mkdir(parents=True)
    states = {key: chunk.state_dict_for_save_checkpoint() for key, chunk in zip(_keys(chunks), chunks)}
    torch.save({"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 1, **states}, path)
    (folder / TRACKER).write_text("1")


def save_distributed(folder: Path, chunks: list[GPTModel], args: argparse.Namespace, **metadata: bool) -> None:
    """The `torch_dist` checkpoint of all ranks, with the weights once more as one of the optimizer's moments.

    `metadata` chooses among the forms that Megatron-core writes.
    """
    path = iteration_folder(folder, 1)
    path.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    content = {**metadata, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    states = {key: chunk.sharded_state_dict(metadata=content) for key, chunk in zip(_keys(chunks), chunks)}
    weights = extract_sharded_tensors_and_factories(copy.copy(states))[0]
    moments = {
        (key, name): make_sharded_optimizer_tensor(tensor, tensor.data + 1, "optimizer.state.exp_avg")
        for key, tensors in weights.items()
        for name, tensor in tensors.items()
    }
    common = {
        "args": args,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 1,
        "opt_param_scheduler": {"lr": 0.1},
    }
    dist_checkpointing.save({**common, **states, "moments": moments}, str(path), content_metadata=metadata)
    (folder / TRACKER).write_text("1")


def _keys(chunks: list[GPTModel]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]


@torch.no_grad()
def logits(chunks: list[GPTModel], tokens: torch.Tensor) -> torch.Tensor | None:
    """Of one document, [t, this rank's share of the padded vocabulary] on the last stage; what the others compute is
    passed on."""
    inputs = tokens[None], torch.arange(len(tokens))[None], torch.ones(1, 1, len(tokens), len(tokens)).triu(1).bool()
    for chunk in chunks:
        chunk.eval()  # it trains no experts on tensor ranks without sequence parallelism
        if not chunk.pre_process:
            hidden = torch.empty(len(tokens), 1, chunk.config.hidden_size)
            distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(hidden)
        output = chunk(*inputs)
        if chunk.post_process:
            return output[0]
        distributed.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
    return None
