"""Megatron-core's GPTModel opens what is written here and computes the same, and what it saves is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from ours import our_logits
from toy_work import toy_batch, toy_weights

from runs import run
from tandem.__main__ import main
from tandem.backends import transformers_logits
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.megatron.args import to_args
from tandem.data.batch import MicroBatch
from tandem.models.config import RotaryScaling
from tandem.parallel.layout import Layout
from toys import DENSE_TOYS, TOYS, moe_config
from workspace import Workspace

SCALED = {
    "llama-linear": dataclasses.replace(DENSE_TOYS["llama"], rotary_scaling=RotaryScaling("linear", 4.0)),
    "llama-llama3": dataclasses.replace(DENSE_TOYS["llama"], rotary_scaling=RotaryScaling("llama3", 8.0)),
}
YARN = RotaryScaling("yarn", 4.0, original_max_position_embeddings=50, mscale=1.0, mscale_all_dim=0.6, truncate=False)
SCALED["qwen3-yarn"] = dataclasses.replace(DENSE_TOYS["qwen3-tied"], rotary_scaling=YARN)
MODELS = TOYS | SCALED | {"qwen3-moe-raw": moe_config(norm_topk_prob=False, moe_router_topk=3)}
LENGTH = 200  # far enough for scaled rotary embeddings to differ from plain ones
TOLERANCE = 1e-4


def convert(source: Path, target: Path, *more: str) -> Path:
    assert main(["convert", "--load-dir", str(source), "--save-dir", str(target), "--no-verify", *more]) == 0
    return target


def to_megatron(source: Path, target: Path, source_type: str) -> Path:
    padded = ("--make-vocab-size-divisible-by", "128")
    return convert(source, target, "--load-model-type", source_type, "--ckpt-format", "torch", *padded)


def megatron_logits(mcore: ModuleType, folder: Path, batch: MicroBatch, vocab_size: int) -> np.ndarray:
    return mcore.logits(mcore.load(folder), torch.from_numpy(batch.tokens).long())[:, :vocab_size].numpy()


@pytest.mark.parametrize("model", MODELS)
def test_megatron_computes_what_a_converted_model_computes(mcore: ModuleType, model: str, tmp_path: Path) -> None:
    """From a Hugging Face folder to Megatron's logits, against transformers' of that folder."""
    config = MODELS[model]
    copy(toy_weights(config), HFSink(tmp_path / "hf", config, "float32", Companions()))
    batch = toy_batch(config, (LENGTH,))
    logits = megatron_logits(mcore, to_megatron(tmp_path / "hf", tmp_path / "mg", "hf"), batch, config.vocab_size)
    np.testing.assert_allclose(logits, transformers_logits(tmp_path / "hf", "float32", batch), atol=TOLERANCE, rtol=0)


def test_megatron_computes_what_a_trained_model_computes(
    mcore: ModuleType, framework: str, workspace: Workspace, tmp_path: Path
) -> None:
    run(workspace, framework, save=str(tmp_path / "run"), train_iters=4)
    source = open_source(tmp_path / "run")
    batch = toy_batch(source.config, (LENGTH,))
    converted = to_megatron(tmp_path / "run", tmp_path / "mg", "mg")
    logits = megatron_logits(mcore, converted, batch, source.config.vocab_size)
    np.testing.assert_allclose(logits, our_logits(source, batch, framework), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_what_megatron_saves_is_read(mcore: ModuleType, framework: str, model: str, tmp_path: Path) -> None:
    """By an engine, and converted to Hugging Face by transformers."""
    config = MODELS[model]
    args = to_args(config, Layout(), "float32", config.vocab_size)
    del args.model_type_hf, args.true_vocab_size, args.num_key_value_heads  # Megatron has no such flags
    (chunk,) = chunks = mcore.build(args)
    with torch.no_grad():
        for parameter in chunk.parameters():  # biases begin at 0 and norms at 1
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    args.layernorm_epsilon = vars(args).pop("norm_epsilon")  # its name since Megatron-LM 0.16
    mcore.save(tmp_path / "mg", chunks, args)
    batch = toy_batch(config, (LENGTH,))
    expected = mcore.logits(chunks, torch.from_numpy(batch.tokens).long()).numpy()
    source = open_source(tmp_path / "mg")
    assert source.config == config
    np.testing.assert_allclose(our_logits(source, batch, framework), expected, atol=TOLERANCE, rtol=0)
    convert(tmp_path / "mg", tmp_path / "hf", "--load-model-type", "mg", "--save-model-type", "hf")
    np.testing.assert_allclose(transformers_logits(tmp_path / "hf", "float32", batch), expected, atol=TOLERANCE, rtol=0)
