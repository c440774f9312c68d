"""What a step costs besides products and attention, as tests count it on tensors without memory.

`tests/backends/test_kernel_budget.py` and `test_ascend_kernels.py` count whole steps of dense Qwen3 models and compare
them with this table. Nothing here was measured on a device.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Kernels that a step launches, and bytes that those move which are no products.

    Attributes:
        layer: kernels of a layer in a micro-batch, forward and backward.
        experts: more of them where the layer has experts in place of an MLP.
        adapters: more of them where all its linear layers have adapters.
        again: more of them where the layer is recomputed, which are also those of a forward pass alone.
        chunk: kernels of a chunk of rows in head and loss.
        micro_batch: kernels of a micro-batch outside of layers and chunks.
        update: kernels of a step for a layer's weights, after all micro-batches.
        step: all other kernels of a step.
        passes: bytes that a layer moves, over the bytes that it keeps (`memory.layer_activations`).
        passes_again: the same of what is recomputed.
        gradient_bytes: bytes that a micro-batch moves for each number of the weights in layers, to add gradients up.
        logit_bytes, head_bytes: bytes that head and loss move for each logit, and for each number of the head's weight
            in each chunk.
    """

    layer: int
    experts: int
    adapters: int
    again: int
    chunk: int
    micro_batch: int
    update: int
    step: int
    passes: float
    passes_again: float
    gradient_bytes: float
    logit_bytes: float
    head_bytes: float


# Framework and maker of the device -> counts.
COUNTED = {
    ("torch", "nvidia"): Counted(
        layer=46,
        experts=44,
        adapters=69,
        again=12,
        chunk=12,
        micro_batch=18,
        update=0,
        step=44,
        passes=6.3,
        passes_again=2.0,
        gradient_bytes=0,
        logit_bytes=4,
        head_bytes=0.6,
    ),
    ("torch", "ascend"): Counted(
        layer=61,
        experts=73,
        adapters=65,
        again=16,
        chunk=20,
        micro_batch=18,
        update=4,
        step=40,
        passes=9.4,
        passes_again=2.6,
        gradient_bytes=10,
        logit_bytes=44,
        head_bytes=10.6,
    ),
    ("mindspore", "ascend"): Counted(
        layer=58,
        experts=64,
        adapters=116,
        again=17,
        chunk=22,
        micro_batch=21,
        update=20,
        step=17,
        passes=8.4,
        passes_again=2.7,
        gradient_bytes=18,
        logit_bytes=40,
        head_bytes=26.7,
    ),
}
# On a CPU, where the work is what takes time, and not its start. Assumed, not counted.
ON_CPU = Counted(
    layer=0,
    experts=0,
    adapters=0,
    again=0,
    chunk=0,
    micro_batch=0,
    update=0,
    step=0,
    passes=6,
    passes_again=2,
    gradient_bytes=0,
    logit_bytes=0,
    head_bytes=0,
)


def counted(framework: str, maker: str) -> Counted:
    """The counts of a framework on a maker's devices.

    MindSpore has no kernels of its own for NVIDIA: a plan for it takes those of Ascend.
    """
    if maker == "cpu":
        return ON_CPU
    return COUNTED.get((framework, maker), COUNTED["mindspore", "ascend"])
