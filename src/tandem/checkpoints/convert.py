"""`tandem convert` and `tandem export`: choose a source and a sink, and copy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.checkpoints.copy import Progress, copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf import HFSink, companions_of
from tandem.checkpoints.interface import DTYPE_ALIASES, Companions, TensorSink, TensorSource, dtype_name
from tandem.checkpoints.megatron import MegatronSink
from tandem.checkpoints.native import NativeSink
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.models.config import from_hf, hf_dtype
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.parallel.layout import Layout

MCORE_ITERATION = 1  # the iteration that a converted checkpoint carries, as upstream's converters write it


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of `tandem convert`, named as the flags of MindSpeed-LLM's converters."""

    load_model_type: Literal["hf", "mg", "random"] = "hf"
    """What --load-dir holds: hf, mg (native or torch, recognised), or random: random weights for a config.json."""
    save_model_type: Literal["mg", "hf"] = "mg"
    """What to write: mg (Megatron-core layout) or hf."""
    load_dir: str
    """Source folder; with random, the folder that holds config.json and the tokenizer."""
    save_dir: str
    """Target folder; must not hold anything yet. For hf, a folder with a model is taken as the origin of config and
    tokenizer, and the weights go to its subfolder mg2hf, as upstream does."""
    target_tensor_parallel_size: int = 1
    """Tensor-parallel ranks to write for."""
    target_pipeline_parallel_size: int = 1
    """Pipeline stages to write for."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk, for interleaved stages."""
    num_layer_list: str | None = None
    """Layers of each stage, such as 10,18; excludes virtual stages and noop layers."""
    noop_layers: str | None = None
    """Slots left empty, such as 0,29, counted in the stack that they lengthen."""
    params_dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype to write; default: the source's."""
    ckpt_format: Literal["native", "torch"] = "native"
    """mg layout on disk: native (safetensors) or torch (Megatron-LM's and MindSpeed's pickles)."""
    model_type_hf: str | None = None
    """Family that the source must have, such as qwen3."""
    hf_cfg_dir: str | None = None
    """For hf: take config and tokenizer files from this folder."""
    seed: int = 1234
    """Seed of random weights."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did: where the result lies, its iteration (None for Hugging Face), and its size."""

    folder: Path
    iteration: int | None
    tensors: int
    parameters: int


def convert(options: ConvertOptions, progress: Progress | None = None) -> Converted:
    """Read the source, write the target; it appears whole or not at all.

    Raises:
        UserError: bad options, a source that is incomplete or damaged, or a target that exists.
    """
    if (options.load_model_type, options.save_model_type) == ("hf", "hf"):
        raise UserError("--load-model-type hf --save-model-type hf: nothing to convert")
    source = _open(options)
    if options.model_type_hf not in (None, source.config.model_type):
        raise UserError(f"--model-type-hf {options.model_type_hf}: {options.load_dir} holds {source.config.model_type}")
    dtype = DTYPE_ALIASES[options.params_dtype] if options.params_dtype else dtype_name(source.dtype(EMBEDDING))
    table = tensor_table(source.config)
    sink, folder = _sink(options, source, dtype)
    copy(source, sink, progress=progress)
    iteration = None if options.save_model_type == "hf" else MCORE_ITERATION
    return Converted(folder, iteration, len(table), sum(spec.numel for spec in table.values()))


def layout_of(options: ConvertOptions) -> Layout:
    """The target layout that the flags describe."""
    return Layout(
        tensor_model_parallel_size=options.target_tensor_parallel_size,
        pipeline_model_parallel_size=options.target_pipeline_parallel_size,
        num_layers_per_virtual_pipeline_stage=options.num_layers_per_virtual_pipeline_stage,
        num_layer_list=_numbers("--num-layer-list", options.num_layer_list),
        noop_layers=_numbers("--noop-layers", options.noop_layers) or (),
    )


def _open(options: ConvertOptions) -> TensorSource:
    if options.load_model_type == "random":
        companions = companions_of(options.load_dir)
        hf: dict[str, Any] = companions.hf_config or {}
        dtype = DTYPE_ALIASES.get(options.params_dtype or hf_dtype(hf) or "float32", "float32")
        config = from_hf(hf, where=f"{options.load_dir}/config.json")
        return RandomSource(config, options.seed, dtype, companions)
    source = open_source(options.load_dir)
    is_hf = (Path(options.load_dir) / "config.json").exists()
    if is_hf != (options.load_model_type == "hf"):
        found = "a Hugging Face folder" if is_hf else "a Megatron-core checkpoint"
        raise UserError(f"--load-model-type {options.load_model_type}: {options.load_dir} holds {found}")
    return source


def _sink(options: ConvertOptions, source: TensorSource, dtype: str) -> tuple[TensorSink, Path]:
    folder, companions = Path(options.save_dir), source.companions
    if options.save_model_type == "hf":
        origin = options.hf_cfg_dir
        if (folder / "config.json").exists():
            origin, folder = origin or str(folder), folder / "mg2hf"
        return HFSink(folder, source.config, dtype, companions_for(source, origin)), folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--save-dir {folder} is not empty: remove it or choose another place")
    layout = layout_of(options)
    if options.ckpt_format == "torch":
        return MegatronSink(folder, source.config, layout, dtype, MCORE_ITERATION, companions), folder
    return NativeSink(folder, source.config, layout, {"model": dtype}, MCORE_ITERATION, companions), folder


def companions_for(source: TensorSource, origin: str | None) -> Companions:
    """The source's companions, or those of the folder `origin`, whose config must describe the same model."""
    if origin is None:
        return source.companions
    companions = companions_of(origin)
    config = from_hf(companions.hf_config or {}, where=f"{origin}/config.json")
    given, actual = config.to_dict(), source.config.to_dict()
    different = [
        f"{name} is {given[name]} there, {actual[name]} in the checkpoint"
        for name in given
        if given[name] != actual[name] and name != "init_method_std"
    ]
    if different:
        raise UserError(f"{origin}/config.json contradicts {source.location}: {'; '.join(different)}")
    return companions


def _numbers(flag: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text!r}: expected numbers separated by commas, such as 4,4") from None
