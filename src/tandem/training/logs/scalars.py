"""A step as named scalars: the tags that Megatron-LM gives TensorBoard and W&B."""

from __future__ import annotations

from tandem.training.logs.log import VALIDATION, StepRecord, perplexity


def scalars(record: StepRecord) -> dict[str, float]:
    """Megatron's tags, and with them what it does not log. Validation sets other than the split's own have their
    name in the tag. The x axis is the iteration: Megatron's second axis, "vs samples", is `consumed-samples`."""
    values: dict[str, float | None] = {
        "lm loss": record.loss,
        "learning-rate": record.lr,
        "batch-size": record.batch_size,
        "grad-norm": record.grad_norm,
        "loss-scale": record.loss_scale,
        "world-size": record.devices,
        "iteration-time": record.seconds,
        "throughput": record.tflops_per_device,
        "mfu": record.mfu,
        "mem-max-allocated-bytes": record.memory,
        "tokens-per-second": record.tokens / record.seconds,
        "trained-tokens-per-second": record.trained_tokens / record.seconds,
        "consumed-samples": record.consumed_samples,
        "epoch": record.epoch,
    }
    for name, loss in record.validation.items():
        tag = "lm loss validation" if name == VALIDATION else f"lm loss validation {name}"
        values[tag] = loss
        values[f"{tag} ppl"] = perplexity(loss)
    return {tag: float(value) for tag, value in values.items() if value is not None}
