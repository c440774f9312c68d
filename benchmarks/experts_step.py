"""One pretraining step of a slice of Qwen3-30B-A3B's shape, in fp32 on CPU: Tandem against transformers.

Widths, heads and experts per token are the model's. Layers, experts and vocabulary are fewer, for memory. Tandem and
transformers start from the same random weights and see the same tokens, so their losses must agree. transformers runs
with each of its implementations of experts that a CPU has, and the faster one counts. Another side of Tandem's is a
dense model of the same width whose MLPs have as many active parameters.

    python benchmarks/experts_step.py
    python benchmarks/experts_step.py --layers 1 --experts 16 --vocabulary 512 --seq-length 128 --steps 1 --rounds 1

On a shared machine the processor time with `--threads 1` tells more than the time.

Targets: at least 1.5x the tokens/s of transformers, at most 0.6x its peak memory above 16 bytes per parameter (weights,
gradients and two moments), and at most 1.3x the dense model's time.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import turns
from weights import mean_weights

from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import IGNORE, Sample, collate
from tandem.models.config import ModelConfig
from tandem.models.published import qwen3_config
from tandem.models.tensors import parameter_count

LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD, BETAS = 1e-4, 0.1, 1.0, (0.9, 0.95)
IMPLEMENTATIONS = ("eager", "grouped_mm")  # of transformers; batched_mm copies an expert's weights for each token


def sparse_config(arguments: argparse.Namespace) -> ModelConfig:
    config = qwen3_config("30B-A3B")
    assert config.experts is not None
    experts = dataclasses.replace(config.experts, num_experts=arguments.experts)
    return dataclasses.replace(config, num_layers=arguments.layers, vocab_size=arguments.vocabulary, experts=experts)


def dense_config(arguments: argparse.Namespace) -> ModelConfig:
    """MLPs as wide as the experts of a token together."""
    config = sparse_config(arguments)
    assert config.experts is not None
    width = config.experts.moe_router_topk * config.experts.moe_ffn_hidden_size
    return dataclasses.replace(config, model_type="qwen3", ffn_hidden_size=width, experts=None)


def tokens_of(step: int, arguments: argparse.Namespace) -> np.ndarray:
    return np.random.default_rng(step).integers(0, arguments.vocabulary, (1, arguments.seq_length), dtype=np.int32)


def tandem(arguments: argparse.Namespace) -> turns.Step:
    return _tandem(arguments, sparse_config(arguments))


def dense(arguments: argparse.Namespace) -> turns.Step:
    return _tandem(arguments, dense_config(arguments))


def _tandem(arguments: argparse.Namespace, config: ModelConfig) -> turns.Step:
    from tandem.backends import create_engine
    from tandem.backends.interface import EngineSettings

    settings = EngineSettings(adam_beta1=BETAS[0], adam_beta2=BETAS[1], clip_grad=CLIP_GRAD, device="cpu")
    engine = create_engine(arguments.framework, config, settings)
    engine.load_weights(RandomSource(config, 0))
    positions = np.arange(arguments.seq_length, dtype=np.int32)

    def step(number: int) -> dict[str, float]:
        (row,) = tokens_of(number, arguments)
        batches = [collate([Sample(row, np.append(row[1:], np.int32(IGNORE)), positions, (len(row),))])]
        result = engine.train_step(batches, mean_weights(batches), LEARNING_RATE, WEIGHT_DECAY)
        return {"tokens": len(row), "loss": result.loss}

    return step


def eager(arguments: argparse.Namespace) -> turns.Step:
    return _transformers(arguments, "eager")


def grouped_mm(arguments: argparse.Namespace) -> turns.Step:
    return _transformers(arguments, "grouped_mm")


def _transformers(arguments: argparse.Namespace, implementation: str) -> turns.Step:
    from peer import HuggingFaceTrainer

    source = RandomSource(sparse_config(arguments), 0)
    trainer = HuggingFaceTrainer(source, LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD, BETAS, implementation)

    def step(number: int) -> dict[str, float]:
        tokens = tokens_of(number, arguments).astype(np.int64)
        loss = trainer.step([{"input_ids": tokens, "labels": tokens}], tokens.size - 1)
        return {"tokens": tokens.size, "loss": loss}

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=32, help="of a layer; a token goes through 8")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--framework", default="torch", choices=("torch", "mindspore"), help="of Tandem's sides")
    turns.add_arguments(parser)
    arguments = parser.parse_args()
    sides = {"tandem": tandem, "dense": dense, **dict(zip(IMPLEMENTATIONS, (eager, grouped_mm)))}
    summaries = turns.run(sides, arguments)
    if summaries is None:
        return
    ours, as_wide = summaries["tandem"], summaries["dense"]
    fastest = max(IMPLEMENTATIONS, key=lambda name: summaries[name]["rate"])
    theirs = summaries[fastest]
    floor = 16 * parameter_count(sparse_config(arguments))
    above = [(side["peak"] - floor) / 2**30 for side in (ours, theirs)]
    print(f"transformers' faster implementation: {fastest}")
    for name, of_side in (("time", lambda side: 1 / side["rate"]), ("processor time", lambda side: side["processor"])):
        mine, peers, base = map(of_side, (ours, theirs, as_wide))
        print(f"{name}: {peers / mine:.2f}x transformers' tokens/s; {mine / base:.2f}x the dense model's time")
    print(f"peak above {floor / 2**30:.2f} GiB: {above[0]:.2f} against {above[1]:.2f} GiB: {above[0] / above[1]:.2f}x")


if __name__ == "__main__":
    main()
