"""One full fine-tuning step on real instruction data: Tandem packs, its peer pads. PyTorch on CPU in fp32.

Both train the same random samples of GSM8K in Qwen3's template, with the prompt masked, from the same random weights of
Qwen3-0.6B's shape, so their losses must agree. Tandem lays the samples of a micro-batch end to end as isolated
documents.
Transformers pads them on the right: to the longest of the micro-batch, as `DataCollatorForSeq2Seq` does by default, or
to `--pad-to` tokens, as MindSpeed-LLM does without packing.

    python benchmarks/finetune_step.py --folder qwen3-0.6b --data gsm8k_train_alpaca.json --layers 4

Target: at least 3x the trained tokens/s.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import turns
from tokenizers import Tokenizer
from weights import mean_weights

from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import IGNORE, Sample, collate
from tandem.models.config import ModelConfig
from tandem.models.hf_config import from_hf, load_hf_config

LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD, BETAS = 1e-5, 0.0, 1.0, (0.9, 0.95)
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
ANSWER = "{}<|im_end|>\n"


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    config = from_hf(load_hf_config(arguments.folder))
    return dataclasses.replace(config, num_layers=arguments.layers or config.num_layers)


def micro_batches(step: int, arguments: argparse.Namespace) -> list[list[Sample]]:
    """The step's samples, drawn at random."""
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    rows = json.loads(arguments.data.read_text(encoding="utf-8"))
    chosen = np.random.default_rng(step).choice(len(rows), arguments.samples, replace=False)
    samples = [_sample(tokenizer, rows[number]) for number in chosen]
    return [samples[i : i + arguments.micro_batch] for i in range(0, len(samples), arguments.micro_batch)]


def _sample(tokenizer: Tokenizer, row: dict[str, str]) -> Sample:
    prompt = tokenizer.encode(PROMPT.format(row["instruction"])).ids
    answer = tokenizer.encode(ANSWER.format(row["output"])).ids
    tokens = np.array(prompt + answer, dtype=np.int32)
    labels = np.append(tokens[1:], np.int32(IGNORE))
    labels[: len(prompt) - 1] = IGNORE
    return Sample(tokens, labels, np.arange(len(tokens), dtype=np.int32), (len(tokens),))


def _trained(samples: list[Sample]) -> int:
    return sum(int(np.count_nonzero(sample.labels != IGNORE)) for sample in samples)


def tandem(arguments: argparse.Namespace) -> turns.Step:
    from tandem.backends import create_engine
    from tandem.backends.interface import EngineSettings

    config = model_config(arguments)
    settings = EngineSettings(adam_beta1=BETAS[0], adam_beta2=BETAS[1], clip_grad=CLIP_GRAD, device="cpu")
    engine = create_engine("torch", config, settings)
    engine.load_weights(RandomSource(config, 0))

    def step(number: int) -> dict[str, float]:
        batches = [collate(samples) for samples in micro_batches(number, arguments)]
        result = engine.train_step(batches, mean_weights(batches), LEARNING_RATE, WEIGHT_DECAY)
        return {"tokens": result.trained_tokens, "loss": result.loss}

    return step


def padding_to_the_longest(arguments: argparse.Namespace) -> turns.Step:
    return _transformers(arguments, pad_to=None)


def padding_to_a_fixed_length(arguments: argparse.Namespace) -> turns.Step:
    return _transformers(arguments, pad_to=arguments.pad_to)


def _transformers(arguments: argparse.Namespace, pad_to: int | None) -> turns.Step:
    from peer import HuggingFaceTrainer

    config = model_config(arguments)
    trainer = HuggingFaceTrainer(RandomSource(config, 0), LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD, BETAS)

    def step(number: int) -> dict[str, float]:
        batches = micro_batches(number, arguments)
        trained = sum(_trained(samples) for samples in batches)
        return {"tokens": trained, "loss": trainer.step(_padded(batches, pad_to), trained)}

    return step


def _padded(batches: list[list[Sample]], pad_to: int | None) -> Iterator[dict[str, np.ndarray]]:
    """What a collator hands to the model: [samples, length] each; the labels are not shifted, the model does that."""
    for samples in batches:
        length = pad_to or max(len(sample.tokens) for sample in samples)
        inputs = {
            "input_ids": np.zeros((len(samples), length), dtype=np.int64),
            "attention_mask": np.zeros((len(samples), length), dtype=np.int64),
            "labels": np.full((len(samples), length), IGNORE, dtype=np.int64),
        }
        for row, sample in enumerate(samples):
            tokens = len(sample.tokens)
            inputs["input_ids"][row, :tokens] = sample.tokens
            inputs["attention_mask"][row, :tokens] = 1
            inputs["labels"][row, 1:tokens] = sample.labels[:-1]
        yield inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Qwen3's config.json and tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca records with instruction and output")
    parser.add_argument("--samples", type=int, default=16, help="per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples per forward pass, on both sides")
    parser.add_argument("--pad-to", type=int, default=1024, help="0 leaves the side with a fixed length out")
    parser.add_argument("--layers", type=int, help="fewer layers than the config's, on all sides")
    turns.add_arguments(parser)
    arguments = parser.parse_args()
    sides: dict[str, turns.Side] = {"tandem": tandem, "padded to the longest": padding_to_the_longest}
    if arguments.pad_to:
        sides[f"padded to {arguments.pad_to}"] = padding_to_a_fixed_length
    summaries = turns.run(sides, arguments)
    if summaries is None:
        return
    ours = summaries.pop("tandem")
    for name, theirs in summaries.items():
        ratio = ours["rate"] / theirs["rate"]
        print(f"trained tokens/s: {ours['rate']:.1f}, transformers {name} {theirs['rate']:.1f}: {ratio:.2f}x")


if __name__ == "__main__":
    main()
