"""One pretraining step at Qwen3-0.6B's shape, in fp32 on CPU: Tandem's PyTorch backend against transformers.

Both start from the same random weights and see the same tokens, so their losses must agree. The peer is used as its
documentation says: sdpa attention, the loss it computes from labels, clip_grad_norm_, AdamW(fused=True).

    python benchmarks/pretrain_step.py --config config.json --seq-length 512
    python benchmarks/pretrain_step.py --config config.json --seq-length 4096 --layers 4

A third side computes nothing but the products with weights, three for each, with the functions that Tandem computes
them with. What a step reaches of its tokens/s is what all else leaves.

Targets: at least 1.15x the tokens/s, at most 0.4x the peak memory above 16 bytes per parameter (weights, gradients and
two moments), and at least 85 % of the tokens/s of the products.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import turns
from weights import mean_weights

from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import IGNORE, Sample, collate
from tandem.models.config import ModelConfig
from tandem.models.hf_config import from_hf
from tandem.models.tensors import parameter_count

LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD, BETAS = 1e-4, 0.1, 1.0, (0.9, 0.95)


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    config = from_hf(json.loads(arguments.config.read_text()))
    return dataclasses.replace(config, num_layers=arguments.layers or config.num_layers)


def tokens_of(step: int, arguments: argparse.Namespace, config: ModelConfig) -> np.ndarray:
    generator = np.random.default_rng(step)
    return generator.integers(0, config.vocab_size, (arguments.batch, arguments.seq_length), dtype=np.int32)


def tandem(arguments: argparse.Namespace) -> turns.Step:
    from tandem.backends import create_engine
    from tandem.backends.interface import EngineSettings

    config = model_config(arguments)
    settings = EngineSettings(adam_beta1=BETAS[0], adam_beta2=BETAS[1], clip_grad=CLIP_GRAD, device="cpu")
    engine = create_engine("torch", config, settings)
    engine.load_weights(RandomSource(config, 0))
    positions = np.arange(arguments.seq_length, dtype=np.int32)

    def sample(row: np.ndarray) -> Sample:
        return Sample(row, np.append(row[1:], np.int32(IGNORE)), positions, (len(row),))

    def step(number: int) -> dict[str, float]:
        tokens = tokens_of(number, arguments, config)
        batches = [collate([sample(row) for row in tokens])]
        result = engine.train_step(batches, mean_weights(batches), LEARNING_RATE, WEIGHT_DECAY)
        return {"tokens": tokens.size, "loss": result.loss}

    return step


def transformers(arguments: argparse.Namespace) -> turns.Step:
    from peer import HuggingFaceTrainer

    config = model_config(arguments)
    trainer = HuggingFaceTrainer(RandomSource(config, 0), LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD, BETAS)

    def step(number: int) -> dict[str, float]:
        tokens = tokens_of(number, arguments, config).astype(np.int64)
        trained = tokens.shape[0] * (tokens.shape[1] - 1)
        return {"tokens": tokens.size, "loss": trainer.step([{"input_ids": tokens, "labels": tokens}], trained)}

    return step


def products(arguments: argparse.Namespace) -> turns.Step:
    import torch

    from tandem.backends.torch.compute.cpu import add_product, product

    config = model_config(arguments)
    qkv = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
    of_layer = [
        *((qkv, config.hidden_size), (config.hidden_size, config.num_attention_heads * config.kv_channels)),
        *((2 * config.ffn_hidden_size, config.hidden_size), (config.hidden_size, config.ffn_hidden_size)),
    ]
    shapes = [*of_layer * config.num_layers, (config.vocab_size, config.hidden_size)]
    weights = [torch.randn(shape) for shape in shapes]
    gradients = [torch.zeros(shape) for shape in shapes]

    def step(number: int) -> dict[str, float]:
        tokens = arguments.batch * arguments.seq_length
        for weight, gradient in zip(weights, gradients):
            x, dy = (torch.ones(tokens, size) for size in weight.shape[::-1])
            product(x, weight)
            product(dy, weight.t())
            add_product(gradient, True, dy, x, 1.0)
        return {"tokens": tokens, "loss": 0.0}

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a Hugging Face config.json")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, help="fewer layers than the config's, on both sides")
    turns.add_arguments(parser)
    arguments = parser.parse_args()
    summaries = turns.run({"tandem": tandem, "transformers": transformers, "products": products}, arguments)
    if summaries is None:
        return
    ours, theirs = summaries["tandem"], summaries["transformers"]
    floor = 16 * parameter_count(model_config(arguments))
    above = [(side["peak"] - floor) / 2**30 for side in (ours, theirs)]
    print(f"tokens/s: {ours['rate']:.1f} against {theirs['rate']:.1f}: {ours['rate'] / theirs['rate']:.2f}x")
    print(f"{ours['rate'] / summaries['products']['rate']:.0%} of the tokens/s of the products with weights alone")
    print(f"peak above {floor / 2**30:.2f} GiB: {above[0]:.2f} against {above[1]:.2f} GiB: {above[0] / above[1]:.2f}x")


if __name__ == "__main__":
    main()
