"""A model's tensors under llama.cpp's names, and in its order of rows."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from tandem.checkpoints.gguf.encoding import Encoding, Stored, stored_as
from tandem.checkpoints.gguf.library import gguf
from tandem.errors import UserError
from tandem.models.config import ModelConfig, yarn_amplitude
from tandem.models.rotary import inverse_frequencies
from tandem.models.weight_map import WeightMap

ROPE_FACTORS = "rope_freqs.weight"
FAMILIES = ("qwen3", "qwen2", "llama")
# Families for which llama.cpp rotates neighbouring channels, and not channel i with i + head / 2.
NEIGHBOURS = {"llama"}
ROTATED = re.compile(r"self_attn\.(q|k)_proj\.weight$")


def stored_tensors(config: ModelConfig, encoding: Encoding) -> dict[str, Stored]:
    """By Hugging Face name, how each tensor is stored. In the order in which they are written."""
    names = gguf().get_tensor_name_map(architecture(config), config.num_layers)
    return {
        hf: stored_as(names.get_name(hf, try_suffixes=(".weight", ".bias")), shape, encoding)
        for hf, shape in WeightMap(config).hf_shapes().items()
    }


def check_supported(config: ModelConfig) -> None:
    """Raise UserError for a model that is not written here, or that llama.cpp would compute otherwise."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--gguf: model_type {config.model_type} is not supported; supported: {', '.join(FAMILIES)}. Export a "
            f"folder without --gguf, and give that to llama.cpp's convert_hf_to_gguf.py"
        )
    scaling = config.rotary_scaling
    if scaling is None or scaling.kind != "yarn":
        return
    if scaling.amplitude != yarn_amplitude(scaling.factor) or not scaling.truncate:
        raise UserError(
            "--gguf: llama.cpp computes YaRN with truncate, and with the attention factor that follows from factor; "
            "this model has another attention_factor, mscale or truncate"
        )


def architecture(config: ModelConfig) -> int:
    """llama.cpp's number of the family."""
    return int(gguf().MODEL_ARCH[config.model_type.upper()])


def rope_factors(config: ModelConfig) -> np.ndarray | None:
    """By what llama.cpp divides each frequency, fp32 [kv_channels / 2]: Llama 3's scaling; None without it."""
    if config.rotary_scaling is None or config.rotary_scaling.kind != "llama3":
        return None
    unscaled = inverse_frequencies(dataclasses.replace(config, rotary_scaling=None))
    return (unscaled / inverse_frequencies(config)).astype(np.float32)


def reordered(config: ModelConfig, hf_name: str, tensor: np.ndarray) -> np.ndarray:
    """Hugging Face's rows of a tensor, in llama.cpp's order.

    Of a head with channels 0 1 2 3, Hugging Face rotates 0 with 2, and 1 with 3. So they become 0 2 1 3.
    """
    if config.model_type not in NEIGHBOURS or not ROTATED.search(hf_name):
        return tensor
    halves = tensor.reshape(-1, 2, config.kv_channels // 2, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
