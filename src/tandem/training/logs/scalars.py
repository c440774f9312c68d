"""A step as named numbers, with the tags that Megatron-LM uses for TensorBoard and W&B."""

from __future__ import annotations

from tandem.training.logs.log import VALIDATION, StepRecord, perplexity, validation_metrics


def scalars(record: StepRecord) -> dict[str, float]:
    """Megatron's tags, and more that Megatron does not log.

    The tag of a validation set contains its name, unless it is the set from --split. The x axis is the iteration;
    instead of Megatron's second axis, "vs samples", there is the tag `consumed-samples`.
    """
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
        if not record.validation_metrics.get(name):  # else the loss is not one of tokens
            values[f"{tag} ppl"] = perplexity(loss)
    values |= {**record.metrics, **validation_metrics(record)}
    for name, metrics in record.tasks.items():
        values |= {f"tasks/{name}/{metric}": value for metric, value in metrics.items()}
    return {tag: float(value) for tag, value in values.items() if value is not None}
