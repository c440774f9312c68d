"""`tandem export --gguf`: weights, tokenizer and chat template in one file, for llama.cpp and what builds on it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tandem.checkpoints.copy import Progress, copy
from tandem.checkpoints.gguf.encoding import Encoding
from tandem.checkpoints.gguf.library import gguf
from tandem.checkpoints.gguf.read_back import read_back
from tandem.checkpoints.gguf.sink import GGUFSink
from tandem.checkpoints.gguf.tensors import check_supported
from tandem.checkpoints.hf.companions import write_companions
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.conversion.gguf_vocabulary import set_vocabulary, vocabulary_of
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.files.publish import final_place
from tandem.models.config import ModelConfig, RotaryScaling
from tandem.models.tensors import parameter_count

FILE_TYPES = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def file_name(folder: Path, encoding: Encoding) -> str:
    """The name of the file in an exported folder.

    >>> file_name(Path("run/tuned"), "q8_0")
    'tuned-Q8_0.gguf'
    """
    return f"{final_place(folder.resolve()).name}-{encoding.upper()}.gguf"


def write_gguf(
    work: Path, source: TensorSource, companions: Companions, encoding: Encoding, progress: Progress | None = None
) -> list[str]:
    """Write the file into `work`, a folder that is not yet published. Returns notices for the user.

    Raises:
        UserError: the package `gguf` is missing, the model is not supported, there is no tokenizer, or it is no
            byte-level BPE.
    """
    gguf()
    check_supported(source.config)
    if companions.tokenizer_folder is None:
        raise UserError(
            f"--gguf: {source.location} has no tokenizer.json, and a GGUF file holds one: give --hf-cfg-dir"
        )
    path = work / file_name(work, encoding)
    config = source.config
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_companions(folder, companions, config, "float32")
        vocabulary = vocabulary_of(folder / "tokenizer.json", config.model_type, config.vocab_size)
        ends = Tokenizer(folder).end_ids

        def set_fields(writer: Any) -> None:
            set_model(writer, config, encoding, path.stem)
            set_vocabulary(writer, folder, vocabulary, ends)

        copy(source, GGUFSink(path, config, encoding, set_fields), progress=progress)
    notices = [vocabulary.notice] if vocabulary.notice else []
    if len(ends) > 2:
        texts = ", ".join(vocabulary.tokens[token] for token in ends[2:])
        notices.append(f"a GGUF file names two end tokens; llama.cpp stops at others only if it knows them: {texts}")
    return notices


def check_gguf(work: Path, source: TensorSource, encoding: Encoding) -> str:
    """Read the file back with `gguf`'s reader and compare every tensor. Returns what was found, in words.

    Raises:
        UserError: as `read_back`.
    """
    count, largest = read_back(work / file_name(work, encoding), source, encoding)
    return f"verified with gguf: {count} tensors read back, largest difference {largest:.2e}"


def set_rotary_scaling(writer: Any, scaling: RotaryScaling | None) -> None:
    """Tell how frequencies are stretched. Llama 3's way is a tensor.

    Raises:
        UserError: llama.cpp computes YaRN with other numbers than the model's.
    """
    if scaling is None or scaling.kind == "llama3":
        return
    kinds = {"linear": gguf().RopeScalingType.LINEAR, "yarn": gguf().RopeScalingType.YARN}
    writer.add_rope_scaling_type(kinds[scaling.kind])
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind != "yarn":
        return
    usual = RotaryScaling(
        "yarn", scaling.factor, original_max_position_embeddings=scaling.original_max_position_embeddings
    )
    if scaling != usual:
        raise UserError(
            "a GGUF file tells of YaRN its factor and original length alone; this model's config.json also has "
            "attention_factor, mscale, beta_fast, beta_slow or truncate. Export as a Hugging Face folder"
        )
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)


def set_model(writer: Any, config: ModelConfig, encoding: Encoding, name: str) -> None:
    """Tell a `gguf.GGUFWriter` the model's hyper-parameters."""
    count = parameter_count(config)
    writer.add_type(gguf().GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf().size_label(count, count, 0, 0))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_query_groups)
    writer.add_key_length(config.kv_channels)
    writer.add_value_length(config.kv_channels)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.kv_channels)
    set_rotary_scaling(writer, config.rotary_scaling)
    writer.add_file_type(int(gguf().LlamaFileType[FILE_TYPES[encoding]]))
    writer.add_quantization_version(gguf().GGML_QUANT_VERSION)


def set_scaling(writer: Any, scaling: RotaryScaling) -> None:
    """Tell a `gguf.GGUFWriter` how rotary frequencies are scaled. Llama 3's scaling is a tensor."""
    if scaling.kind == "llama3":
        return
    writer.add_rope_scaling_type(gguf().RopeScalingType[scaling.kind.upper()])
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
