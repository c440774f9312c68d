"""`tandem convert`: choose a source and a sink, and copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem.checkpoints.adapters.views import merged
from tandem.checkpoints.copy import Progress, copy
from tandem.checkpoints.detect import open_adapters, open_source
from tandem.checkpoints.hf.companions import companions_of
from tandem.checkpoints.hf.record import RECORD, recorded
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import DTYPE_ALIASES, Companions, TensorSink, TensorSource, dtype_name
from tandem.checkpoints.megatron.sink import MegatronSink, pad_vocab_size
from tandem.checkpoints.native.sink import NativeSink
from tandem.checkpoints.prompt import PROMPT_FILE
from tandem.checkpoints.random_init import RandomSource
from tandem.checkpoints.views import Cast, Described, FirstLayers, FirstRows, LargerVocabulary
from tandem.conversion.adapters import Adapt, describe_merge, export_adapters
from tandem.conversion.lacking import what_lacks
from tandem.conversion.options import ConvertOptions
from tandem.conversion.result import Converted
from tandem.errors import UserError
from tandem.files.lock import publishing
from tandem.models.config import DESCRIPTIVE, ModelConfig
from tandem.models.hf_config import from_hf, hf_dtype
from tandem.models.tensors import EMBEDDING, tensor_table

MCORE_ITERATION = 1  # the iteration that a converted checkpoint carries, as upstream's converters write it

# called with the source and with what was written, before the result becomes visible; raises when they differ
Check = Callable[[TensorSource, TensorSource], None]


def convert(
    options: ConvertOptions, progress: Progress | None = None, check: Check | None = None, adapt: Adapt | None = None
) -> Converted:
    """Read the source and write the target. The target appears whole or not at all.

    Args:
        check: compares source and result. When it raises, the target does not appear.
        adapt: changes the companions of a Hugging Face folder so that they fit the model's training.

    Raises:
        UserError: bad options, a source that is incomplete or damaged, or a target that exists.
    """
    folder, origin = _target(options)
    source = _open(options, origin)
    if options.save_lora_to_hf:
        return export_adapters(source, folder, adapt)
    notices = [*source.notices, *left_out(source), *describe_merge(source)]
    source, companions, more = with_origin(merged(source), origin)
    notices += more
    if options.save_model_type == "hf":
        companions = recorded(companions)
    if options.save_model_type == "hf" and adapt:
        companions, more = adapt(source, companions)
        notices += more
    if options.num_layers is not None:
        source = FirstLayers(source, options.num_layers)
    if options.resize_vocab is not None:
        companions = recorded(companions, resize=(source.config.vocab_size, options.resize_vocab))
        source = LargerVocabulary(source, options.resize_vocab)
    source = with_one_dtype(source, options.params_dtype)
    if options.save_model_type == "hf":
        notices = [*notices, *notices_of_dtype(source, companions, options.params_dtype)]
    write_checked(folder, source, lambda work: _sink(work, options, source, companions), progress, check)
    iteration = None if options.save_model_type == "hf" else MCORE_ITERATION
    return Converted.of(folder, iteration, source.config, [*notices, *what_lacks(companions, source.config)])


def left_out(source: TensorSource) -> list[str]:
    """A notice when a source holds an optimizer's state, of which nothing is written."""
    places = source.unread_optimizer()
    return [f"only weights are converted; the optimizer's state ({', '.join(places)}) is left out"] if places else []


def write_checked(
    folder: Path,
    source: TensorSource,
    make_sink: Callable[[Path], TensorSink],
    progress: Progress | None,
    check: Check | None,
) -> None:
    """Copy `source` into `folder`, which does not appear when `check` raises."""
    with publishing(folder) as work:
        copy(source, make_sink(work), progress=progress)
        if check:
            check(source, open_source(work))


def with_one_dtype(source: TensorSource, params_dtype: str | None) -> TensorSource:
    """The weights of `source` in `params_dtype`, or, when that is None, in their own dtype.

    Raises:
        UserError: `params_dtype` is None and the source has several dtypes.
    """
    dtypes = sorted({dtype_name(source.dtype(name)) for name in tensor_table(source.config)})
    if params_dtype is None and len(dtypes) > 1:
        raise UserError(f"{source.location} holds {' and '.join(dtypes)}: choose one with --params-dtype")
    dtype = DTYPE_ALIASES[params_dtype or dtypes[0]]
    if (dtypes, source.kinds()) == ([dtype], ("model",)):
        return source
    return Cast(source, dtype)


def notices_of_dtype(source: TensorSource, companions: Companions, params_dtype: str | None) -> list[str]:
    """A notice when a Hugging Face folder gets wider numbers than its config has, and nobody asked for that.

    A run in bf16 on a device without bf16 computes in fp32, and so are its checkpoints.
    """
    written, original = dtype_name(source.dtype(EMBEDDING)), hf_dtype(companions.hf_config or {})
    if params_dtype is not None or written != "float32" or original not in ("bfloat16", "float16"):
        return []
    short = next(alias for alias, name in DTYPE_ALIASES.items() if name == original)
    return [
        f"{source.location} holds float32, and the model was {original}: the folder is written in float32 and takes "
        f"twice the room; --params-dtype {short} writes {original}"
    ]


def with_origin(source: TensorSource, origin: str | None) -> tuple[TensorSource, Companions, list[str]]:
    """The source with the config and the companions of the folder `origin`, and notices for the user.

    None keeps the source's.

    Raises:
        UserError: the config describes another model.
    """
    if origin is None:
        return source, source.companions, []
    config = config_of(origin)
    notices, rows = [], source.config.vocab_size - config.vocab_size
    if rows > 0:  # as a Megatron checkpoint is padded, and what was converted from one without its config.json
        source = FirstRows(source, config.vocab_size)
        notices.append(
            f"the last {rows} rows of the embedding are left out: vocab_size is {config.vocab_size} in {origin}"
        )
    in_folder, in_source = config.to_dict(), source.config.to_dict()
    different = {name: value for name, value in in_folder.items() if value != in_source[name]}
    if contradictions := different.keys() - DESCRIPTIVE:
        texts = [f"{name} is {in_folder[name]} there, {in_source[name]} in the checkpoint" for name in contradictions]
        raise UserError(f"{origin}/config.json contradicts {source.location}: {'; '.join(sorted(texts))}")
    notices += [
        f"{name} is {value}, of {origin}; {in_source[name]} in {source.location}" for name, value in different.items()
    ]
    return Described(source, config) if different else source, companions_of(origin), notices


def config_of(folder: str) -> ModelConfig:
    """The model that a Hugging Face folder describes."""
    return from_hf(companions_of(folder).hf_config or {}, where=f"{folder}/config.json")


def _target(options: ConvertOptions) -> tuple[Path, str | None]:
    """Where to write, and the folder that config and tokenizer come from (None: the source's).

    Of upstream's converters, the first takes the original model in the target as its template, and the second writes
    into the target itself.

    Raises:
        UserError: an earlier conversion wrote the target. As a template it would stay there, out of date.
    """
    folder = Path(options.save_dir)
    if options.save_model_type != "hf" or options.hf_cfg_dir or not (folder / "config.json").exists():
        return folder, options.hf_cfg_dir
    if (folder / RECORD).exists():
        raise UserError(
            f"--save-dir {folder} holds what an earlier conversion wrote ({RECORD}): remove it to convert again, or "
            f"choose another folder"
        )
    return folder / "mg2hf", str(folder)


def _open(options: ConvertOptions, origin: str | None) -> TensorSource:
    source = _open_random(options) if options.load_model_type == "random" else _open_stored(options, origin)
    if options.lora_load is not None:
        source = open_adapters(options.lora_load, source, lora_alpha=options.lora_alpha)
    options.check_adapters(source.config.lora, options.lora_load or options.load_dir)
    options.check_work(source)
    if (options.model_type_hf or source.config.model_type).replace("-", "_") != source.config.model_type:
        raise UserError(f"--model-type-hf {options.model_type_hf}: {options.load_dir} holds {source.config.model_type}")
    options.stated.check(source.config, options.load_dir)
    return source


def _open_random(options: ConvertOptions) -> TensorSource:
    companions = companions_of(options.load_dir)
    hf: dict[str, Any] = companions.hf_config or {}
    dtype = DTYPE_ALIASES.get(options.params_dtype or hf_dtype(hf) or "float32", "float32")
    return RandomSource(config_of(options.load_dir), options.seed, dtype, companions)


def _open_stored(options: ConvertOptions, origin: str | None) -> TensorSource:
    noop_layers, num_layer_list = options.source_layers()
    source = open_source(
        options.load_dir,
        options.ckpt_step,
        config=config_of(origin) if origin else None,
        noop_layers=noop_layers,
        num_layer_list=num_layer_list,
        lora_alpha=options.lora_alpha if options.lora_load is None else None,
    )
    if options.load_model_type != source.format.load_model_type:
        raise UserError(
            f"--load-model-type {options.load_model_type}: {options.load_dir} holds {source.format.holder}: give "
            f"--load-model-type {source.format.load_model_type}"
        )
    return source


def _sink(work: Path, options: ConvertOptions, source: TensorSource, companions: Companions) -> TensorSink:
    config = source.config
    dtype = dtype_name(source.dtype(next(iter(tensor_table(config)))))
    if options.save_model_type == "hf":
        return HFSink(work, config, dtype, companions)
    options.check_layout(config)
    layout = options.target_layout()
    if options.ckpt_format == "native":
        documents = {} if (prompt := source.document(PROMPT_FILE)) is None else {PROMPT_FILE: prompt}
        return NativeSink(work, config, layout, {"model": dtype}, MCORE_ITERATION, companions, documents)
    return MegatronSink(
        work,
        config,
        layout,
        dtype,
        MCORE_ITERATION,
        companions,
        _padded_vocab_size(options, config),
        transformer_engine=options.transformer_impl == "transformer_engine",
        moe_grouped_gemm=options.moe_grouped_gemm,
    )


def _padded_vocab_size(options: ConvertOptions, config: ModelConfig) -> int | None:
    if options.make_vocab_size_divisible_by is None:
        return options.padded_vocab_size
    size = pad_vocab_size(config.vocab_size, options.make_vocab_size_divisible_by, options.target_tensor_parallel_size)
    return max(size, options.padded_vocab_size or 0)
