"""Rotary frequencies, computed once in NumPy, so that both backends use the same angles."""

from __future__ import annotations

import numpy as np

from tandem.models.config import ModelConfig, RotaryScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each channel pair, fp32 [kv_channels / 2].

    rotary_base ** (-2i / kv_channels), after "RoFormer" (arXiv 2104.09864), scaled as the config asks.
    """
    exponents = np.arange(0, config.kv_channels, 2, dtype=np.float32) / np.float32(config.kv_channels)
    frequencies = (1.0 / np.float32(config.rotary_base) ** exponents).astype(np.float32)
    scaling = config.rotary_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    return _llama3(frequencies, scaling)


def cos_sin(config: ModelConfig, position_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of each position's angles, fp32 [n, kv_channels]; channel i pairs with i + kv_channels / 2."""
    angles = np.outer(position_ids.astype(np.float32), inverse_frequencies(config))
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles), np.sin(angles)


def _llama3(frequencies: np.ndarray, scaling: RotaryScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    context = scaling.original_max_position_embeddings
    wavelengths = 2 * np.pi / frequencies
    smooth = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequencies / scaling.factor + smooth * frequencies).astype(np.float32)
