"""Tokens per second with a key/value cache, of the shape of Qwen3-0.6B, against transformers.generate. CPU.

All sides have the same random weights and prompt, and take the most likely token. The sum of their tokens' ids stands
in place of a loss: it must agree.

- `tandem`, `mindspore`: one text. `sixteen`: sixteen at once.
- `dynamic`, `static`: transformers with either cache, not compiled.
- `reading`: the weights are read once for each token, and nothing else is done.
- `--long` also writes one text of 512 tokens, and compares its last 32 with its first 32.

    python benchmarks/generate.py --new-tokens 32

On a shared machine the processor time with `--threads 1` tells more than the time.

Targets: 1.2x transformers' tokens/s with either cache, 60 % of `reading`, 5x with sixteen texts, MindSpore's time at
most 1.3x PyTorch's, the last tokens of 512 at most 1.3x the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable

import numpy as np
import turns

from tandem.backends.interface import Engine
from tandem.checkpoints.random_init import RandomSource
from tandem.models.config import ModelConfig
from tandem.models.published import qwen3_config
from tandem.models.tensors import parameter_count

PROMPT = [1000]  # so that hardly anything but single tokens is computed
LONG, PART = 512, 32


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    config = qwen3_config("0.6B")
    return dataclasses.replace(config, num_layers=arguments.layers or config.num_layers)


def engine_of(arguments: argparse.Namespace, framework: str) -> Engine:
    from tandem.backends import create_engine
    from tandem.backends.interface import EngineSettings

    source = RandomSource(model_config(arguments), 0)
    settings = EngineSettings(training=False, device="cpu", bf16=arguments.bf16)
    engine = create_engine(framework, source.config, settings)
    engine.load_weights(source)
    return engine


def written(engine: Engine, texts: int, tokens: int, on_step: Callable[[], None] = lambda: None) -> int:
    """The sum of the ids of the first text's tokens."""
    from tandem.inference.sampling import Sampling
    from tandem.inference.scheduler import Scheduler

    with Scheduler(engine, texts, room=texts * (len(PROMPT) + tokens)) as scheduler:
        requests = [scheduler.submit(PROMPT, Sampling(max_new_tokens=tokens), (), logprobs=False) for _ in range(texts)]
        while scheduler.step():
            on_step()
    return sum(requests[0].tokens)


def of_tandem(framework: str, texts: int) -> turns.Side:
    def side(arguments: argparse.Namespace) -> turns.Step:
        engine = engine_of(arguments, framework)

        def step(_: int) -> dict[str, float]:
            total = written(engine, texts, arguments.new_tokens)
            return {"tokens": texts * arguments.new_tokens, "loss": total}

        return step

    return side


def of_transformers(cache: str) -> turns.Side:
    def side(arguments: argparse.Namespace) -> turns.Step:
        import torch
        from peer import model_of

        model = model_of(RandomSource(model_config(arguments), 0)).eval()
        if arguments.bf16:
            model = model.to(torch.bfloat16)
        model.generation_config.eos_token_id = None
        more = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
        prompt = torch.tensor([PROMPT])

        def step(_: int) -> dict[str, float]:
            made = model.generate(prompt, max_new_tokens=arguments.new_tokens, do_sample=False, pad_token_id=0, **more)
            return {"tokens": arguments.new_tokens, "loss": int(made[0, len(PROMPT) :].sum())}

        return step

    return side


def reading(arguments: argparse.Namespace) -> turns.Step:
    import torch

    rows = parameter_count(model_config(arguments)) // 1024
    weights = torch.ones(rows, 1024, dtype=torch.bfloat16 if arguments.bf16 else torch.float32)

    def step(_: int) -> dict[str, float]:
        for _ in range(4):
            weights.view(torch.int32).sum(dtype=torch.int32)
        return {"tokens": 4, "loss": 0.0}

    return step


def long(arguments: argparse.Namespace) -> turns.Step:
    engine = engine_of(arguments, "torch")

    def step(_: int) -> dict[str, float]:
        times = [time.process_time() if arguments.threads == 1 else time.perf_counter()]
        clock = time.process_time if arguments.threads == 1 else time.perf_counter
        total = written(engine, 1, LONG, lambda: times.append(clock()))
        spent = np.diff(times)[1:]  # without the prompt
        return {"tokens": LONG, "loss": total, "ratio": float(np.median(spent[-PART:]) / np.median(spent[:PART]))}

    return step


SIDES = {
    "tandem": of_tandem("torch", 1),
    "dynamic": of_transformers("dynamic"),
    "static": of_transformers("static"),
    "sixteen": of_tandem("torch", 16),
    "mindspore": of_tandem("mindspore", 1),
    "reading": reading,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="fewer layers than the model's, on all sides")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES), help="some of the sides; also tandem")
    parser.add_argument("--long", action="store_true", help="also write one long text, once")
    turns.add_arguments(parser)
    arguments = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = str(arguments.threads)
    chosen = {name: side for name, side in SIDES.items() if name in {"tandem", *arguments.only} or arguments.side}
    found = turns.run({**chosen, **({"long": long} if arguments.long or arguments.side else {})}, arguments)
    if found is None:
        return
    for name in chosen:
        ours, other = found["tandem"], found[name]
        time_of = {side: found[side]["processor"] / found[side]["last"]["tokens"] for side in ("tandem", name)}
        print(
            f"{name:>12}: {other['rate']:.2f} tokens/s, {ours['rate'] / other['rate']:.2f}x by tandem; in processor "
            f"time {time_of[name] / time_of['tandem']:.2f}x by tandem"
        )
    if arguments.long:
        print(f"the last of {LONG} tokens take {found['long']['last']['ratio']:.2f}x the first")


if __name__ == "__main__":
    main()
