"""Rotary frequencies, computed once in NumPy, so that both backends use the same angles."""

from __future__ import annotations

import math

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
    return KINDS[scaling.kind](frequencies, scaling, config)


def cos_sin(config: ModelConfig, position_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of each position's angles, fp32 [n, kv_channels]; channel i pairs with i + kv_channels / 2.

    With YaRN both are longer than 1 by its amplitude.
    """
    angles = np.outer(position_ids.astype(np.float32), inverse_frequencies(config))
    angles = np.concatenate([angles, angles], axis=-1)
    amplitude = np.float32(1.0 if config.rotary_scaling is None else config.rotary_scaling.amplitude)
    return np.cos(angles) * amplitude, np.sin(angles) * amplitude


def _linear(frequencies: np.ndarray, scaling: RotaryScaling, config: ModelConfig) -> np.ndarray:
    return (frequencies / np.float32(scaling.factor)).astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: RotaryScaling, config: ModelConfig) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    context = scaling.original_max_position_embeddings
    wavelengths = 2 * np.pi / frequencies
    smooth = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequencies / scaling.factor + smooth * frequencies).astype(np.float32)


def _yarn(frequencies: np.ndarray, scaling: RotaryScaling, config: ModelConfig) -> np.ndarray:
    """YaRN: channels that turn often within the original length are kept, those that hardly turn divided by `factor`.

    Between them the share of the divided frequency grows in a line. The order of the operations is transformers', so
    that far positions get the same angles.
    """
    first, last = _yarn_range(scaling, config)
    places = np.arange(len(frequencies), dtype=np.float32)
    divided = np.clip((places - np.float32(first)) / np.float32(last - first), 0, 1)
    kept = 1 - divided
    periods = np.float32(config.rotary_base) ** (2 * places / np.float32(config.kv_channels))
    stretched = 1.0 / (np.float32(scaling.factor) * periods)
    return (stretched * (1 - kept) + frequencies * kept).astype(np.float32)


def _yarn_range(scaling: RotaryScaling, config: ModelConfig) -> tuple[float, float]:
    """Where the line begins and ends: the channels that turn `beta_fast` and `beta_slow` times."""
    length, channels = scaling.original_max_position_embeddings, config.kv_channels

    def channel(turns: float) -> float:
        return channels * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    return first, last if last != first else last + 0.001


KINDS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
