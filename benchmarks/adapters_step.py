"""One step of adapters (LoRA) of the shape of Qwen3-0.6B, against PEFT on transformers. CPU, fp32.

Both train adapters of the same rank on all linear layers, with the same tokens and the same random weights, so their
losses must agree. By default all sequences are equally long and every token is trained: neither side computes anything
in vain. With `--conversations` lengths and prompts are like those of gsm8k: from a quarter of --seq-length to all of
it, and the first 40 % of each is not trained. PEFT's side pads them to the longest, as TRL does.

A third side is the frozen model: one adapter of rank 1 in the first layer, so that everything is computed forward and
backward, and almost nothing for adapters.

    python benchmarks/adapters_step.py --layers 8

On a shared machine the processor time with `--threads 1` tells more than the time.

Targets: at least 1.3x PEFT's tokens/s, at most 0.6x its memory above the weights, and adapters of rank 16 cost at most
15 % of the frozen model's time.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import turns
from weights import mean_weights

from tandem.checkpoints.adapters.fresh import FreshAdapters
from tandem.checkpoints.adapters.views import Adapted
from tandem.checkpoints.random_init import RandomSource
from tandem.data.batch import IGNORE, MicroBatch, Sample, collate
from tandem.models.config import ModelConfig
from tandem.models.lora import Lora
from tandem.models.published import qwen3_config
from tandem.models.tensors import parameter_count

LEARNING_RATE, WEIGHT_DECAY, BETAS = 1e-4, 0.0, (0.9, 0.95)


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    config = qwen3_config("0.6B")
    return dataclasses.replace(config, num_layers=arguments.layers or config.num_layers)


def batch(step: int, arguments: argparse.Namespace) -> MicroBatch:
    """One micro-batch."""
    random = np.random.default_rng(step)
    samples = []
    for number in range(arguments.samples):
        length = arguments.seq_length
        if arguments.conversations and number:
            length = int(random.integers(length // 4, length))
        tokens = random.integers(0, 150_000, length + 1, dtype=np.int32)
        labels = tokens[1:].copy()
        if arguments.conversations:
            labels[: int(0.4 * length)] = IGNORE
        samples.append(Sample(tokens[:-1], labels, np.arange(length, dtype=np.int32), (length,)))
    return collate(samples)


def padded(batch: MicroBatch) -> dict[str, np.ndarray]:
    """The documents of a batch as rows of one length: their tokens, their labels and which tokens are no padding."""
    begins, ends = batch.cu_seqlens[:-1], batch.cu_seqlens[1:]
    shape = (len(begins), int((ends - begins).max()))
    rows = {"input_ids": np.zeros(shape, np.int64), "shift_labels": np.full(shape, IGNORE, np.int64)}
    rows["attention_mask"] = np.zeros(shape, np.int64)
    for row, (begin, end) in enumerate(zip(begins, ends)):
        rows["input_ids"][row, : end - begin] = batch.tokens[begin:end]
        rows["shift_labels"][row, : end - begin] = batch.labels[begin:end]
        rows["attention_mask"][row, : end - begin] = 1
    return rows


def tandem(arguments: argparse.Namespace) -> turns.Step:
    return _tandem(arguments, Lora(r=arguments.rank, lora_alpha=2 * arguments.rank))


def frozen(arguments: argparse.Namespace) -> turns.Step:
    return _tandem(arguments, Lora(r=1, target_modules=("q_proj",), layers_to_transform=(0,)))


def _tandem(arguments: argparse.Namespace, lora: Lora) -> turns.Step:
    from tandem.backends import create_engine
    from tandem.backends.interface import EngineSettings

    config = dataclasses.replace(model_config(arguments), lora=lora)
    base = RandomSource(config.without_adapters, 0)
    engine = create_engine(arguments.framework, config, EngineSettings(adam_beta2=BETAS[1], device="cpu"))
    engine.load_weights(Adapted(FreshAdapters(base, config, 0), base, base))

    def step(number: int) -> dict[str, float]:
        batches = [batch(number, arguments)]
        result = engine.train_step(batches, mean_weights(batches), LEARNING_RATE, WEIGHT_DECAY)
        return {"tokens": len(batches[0].tokens), "loss": result.loss}

    return step


def peft(arguments: argparse.Namespace) -> turns.Step:
    import torch
    from peer import model_of
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear")
    model = get_peft_model(model_of(RandomSource(model_config(arguments), 0)), adapters)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True)

    def step(number: int) -> dict[str, float]:
        tokens = batch(number, arguments)
        inputs = {name: torch.from_numpy(rows) for name, rows in padded(tokens).items()}
        loss = model(**inputs, labels=inputs["shift_labels"], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"tokens": len(tokens.tokens), "loss": loss.item()}

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="fewer layers than the model's, on all sides")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--samples", type=int, default=2, help="sequences of a step")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--conversations", action="store_true", help="other lengths, and prompts that are not trained")
    parser.add_argument("--framework", default="torch", choices=("torch", "mindspore"), help="of Tandem's sides")
    turns.add_arguments(parser)
    arguments = parser.parse_args()
    summaries = turns.run({"tandem": tandem, "frozen": frozen, "peft": peft}, arguments)
    if summaries is None:
        return
    weights = 4 * parameter_count(model_config(arguments))
    ours, still, theirs = (summaries[name] for name in ("tandem", "frozen", "peft"))
    above, peers = (summary["peak"] - weights for summary in (ours, theirs))
    for name, of_side in (("time", lambda side: 1 / side["rate"]), ("processor time", lambda side: side["processor"])):
        mine, base, peers_time = map(of_side, (ours, still, theirs))
        print(f"{name}: {peers_time / mine:.2f}x peft's tokens/s; adapters take {100 * (mine / base - 1):.1f} %")
    print(f"memory above the weights: {above / 2**30:.2f} GiB, peft {peers / 2**30:.2f} GiB: {above / peers:.2f}x")


if __name__ == "__main__":
    main()
