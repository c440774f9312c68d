"""Bytes between ranks and the estimated step, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from tandem.errors import UserError
from tandem.models.flops import training_flops
from tandem.models.tensors import parameter_count
from tandem.parallel.layout import Layout
from tandem.planning.counted import COUNTED
from tandem.planning.hardware import GB, GIB, HARDWARE
from tandem.planning.job import Job
from tandem.planning.memory import layer_activations
from tandem.planning.speed import bubble_share, estimate
from tandem.planning.traffic import stage_traffic
from toys import toy_config

CONFIG = toy_config(num_layers=4)
HIDDEN = 100 * 48 * 2  # bytes of the hidden states of 100 tokens in bf16


def test_one_rank_sends_nothing() -> None:
    traffic = stage_traffic(Job(config=CONFIG), 0)
    assert (traffic.tensor, traffic.pipeline, traffic.data) == (0, 0, 0)


@pytest.mark.parametrize(
    ("sequence_parallel", "recompute_layers", "passes"), [(False, 0, 32), (True, 0, 40), (True, 4, 56)]
)
def test_tensor_parallel(sequence_parallel: bool, recompute_layers: int, passes: int) -> None:
    job = Job(
        config=CONFIG,
        layout=Layout(tensor_model_parallel_size=2),
        sequence_parallel=sequence_parallel,
        recompute_layers=recompute_layers,
        global_batch_size=3,
        seq_length=100,
        half=True,
    )
    assert stage_traffic(job, 0).tensor == 3 * (passes + 4) * HIDDEN / 2  # and 4 for embedding and head


def test_pipeline_parallel() -> None:
    layout = Layout(pipeline_model_parallel_size=4)
    job = Job(config=CONFIG, layout=layout, global_batch_size=8, seq_length=100, half=True)
    embedding = 4 * CONFIG.vocab_size * CONFIG.hidden_size
    sent = [stage_traffic(job, stage).pipeline for stage in range(4)]
    assert sent == [8 * HIDDEN + embedding, 16 * HIDDEN, 16 * HIDDEN, 8 * HIDDEN + embedding]


@pytest.mark.parametrize(("distributed", "passes"), [(False, 8), (True, 6)])
def test_data_parallel(distributed: bool, passes: int) -> None:
    job = Job(
        config=CONFIG, data_parallel_size=4, global_batch_size=4, use_distributed_optimizer=distributed, half=True
    )
    assert stage_traffic(job, 0).data == passes * parameter_count(CONFIG) * 3 / 4


@pytest.mark.parametrize(("half", "element"), [(False, 4), (True, 2)])
def test_fully_sharded(half: bool, element: int) -> None:
    """Layers are gathered twice by each micro-batch and their gradients scattered, what is outside once in a step."""
    job = Job(config=CONFIG, data_parallel_size=4, global_batch_size=12, use_torch_fsdp2=True, half=half)
    layer = (6 + 2 * 2) * 16 * 48 + 48 * 6 * 16 + 3 * 80 * 48 + 2 * 48 + 2 * 16
    outside = 212 * 48 + 48  # a row of padding
    per_rank = 3 * (2 * element + 4) * 4 * layer + (element + 4) * outside
    assert stage_traffic(job, 0).data == per_rank * 3 / 4
    # A pipeline's bubble stretches what its micro-batches gather, but not what is summed after them.
    layout = Layout(pipeline_model_parallel_size=2)
    for fully_sharded in (True, False):
        staged = dataclasses.replace(job, layout=layout, use_torch_fsdp2=fully_sharded)
        speed = estimate(staged, HARDWARE["h100" if half else "cpu"])
        passes = speed.compute + speed.tensor + speed.pipeline + (speed.data if fully_sharded else 0)
        assert speed.bubble == pytest.approx(passes * bubble_share(staged))


def test_bubble() -> None:
    """(p - 1) / m, and divided by the number of virtual stages (arXiv 2104.04473, 2.2)."""
    config = toy_config(num_layers=16)
    plain = Job(config=config, layout=Layout(pipeline_model_parallel_size=4), global_batch_size=8)
    interleaved = Layout(pipeline_model_parallel_size=4, num_layers_per_virtual_pipeline_stage=2)
    assert bubble_share(plain) == 3 / 8
    assert bubble_share(dataclasses.replace(plain, layout=interleaved)) == 3 / 16


def test_speed_of_one_device_is_bounded_by_its_peak() -> None:
    hardware = dataclasses.replace(HARDWARE["h100"], memory_bandwidth=1e30, efficiency=0.5, launch_seconds=0)
    speed = estimate(Job(config=CONFIG, half=True, global_batch_size=2, seq_length=512), hardware)
    flops = 2 * training_flops(CONFIG, [512])
    assert speed.step == pytest.approx(flops / (0.5 * hardware.half_flops))
    assert speed.mfu == pytest.approx(0.5)
    recomputed = estimate(Job(config=CONFIG, half=True, seq_length=512, recompute_layers=4), hardware)
    assert 0.5 * 3 / 4 < recomputed.mfu < 0.5  # a fourth pass, but not of the head


def test_a_step_takes_at_least_as_long_as_its_launches() -> None:
    """Kernels of one 4-layer stage, by hand: layers, recomputed ones, chunks of the loss, and the rest."""
    hardware = dataclasses.replace(HARDWARE["h100"], memory_bandwidth=1e30, half_flops=1e30, launch_seconds=1e-3)
    counts = COUNTED["torch", "nvidia"]
    job = Job(config=CONFIG, half=True, global_batch_size=3, seq_length=512, recompute_layers=2)
    speed = estimate(job, hardware)
    kernels = 3 * (4 * counts.layer + 2 * counts.again + counts.chunk + counts.micro_batch)
    assert speed.compute == pytest.approx(1e-3 * kernels)
    assert speed.optimizer == pytest.approx(1e-3 * (4 * counts.update + counts.step))
    slower = estimate(dataclasses.replace(job, ai_framework="mindspore"), dataclasses.replace(hardware, maker="ascend"))
    assert slower.compute > speed.compute


def test_a_step_moves_what_was_counted() -> None:
    hardware = dataclasses.replace(HARDWARE["910b"], half_flops=1e30, launch_seconds=0)
    counts = COUNTED["torch", "ascend"]
    job = Job(config=CONFIG, half=True, global_batch_size=2, seq_length=512)
    weights = parameter_count(CONFIG) - 211 * 48 - 48  # those in layers
    moved = 4 * counts.passes * layer_activations(job) + counts.gradient_bytes * weights
    moved += (counts.logit_bytes * 512 + counts.head_bytes * CONFIG.hidden_size) * CONFIG.vocab_size
    assert estimate(job, hardware).compute == pytest.approx(2 * moved / hardware.memory_bandwidth)


# What nvidia-smi shows, in MiB.
SHOWN = {
    "h100": 81559,
    "h100-nvl": 95830,
    "h200": 143771,
    "h20": 97871,
    "a100": 81920,
    "b200": 183359,
    "rtx4090": 24564,
}


@pytest.mark.parametrize("device", list(SHOWN))
def test_devices_have_the_memory_that_their_driver_shows(device: str) -> None:
    assert HARDWARE[device].memory == pytest.approx(SHOWN[device] * GIB / 1024, rel=0.01)


def test_bandwidth_of_groups() -> None:
    h100, mesh = HARDWARE["h100"], HARDWARE["910b"]
    assert h100.bandwidth(8, 1) == 450 * GB
    assert h100.bandwidth(16, 1) == 8 * 50 * GB  # the ring leaves the node over all its adapters
    assert h100.bandwidth(4, 8) == 50 * GB
    assert mesh.bandwidth(2, 1) == pytest.approx(28 * GB)  # one link of seven
    assert mesh.bandwidth(8, 1) == 196 * GB


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="--global-batch-size 3 is not a multiple of --micro-batch-size 1 x 2"):
        Job(config=CONFIG, data_parallel_size=2, global_batch_size=3, seq_length=64).check()
    with pytest.raises(UserError, match="--seq-length 4096 is above the model's max_position_embeddings 512"):
        Job(config=CONFIG).check()
    layout = Layout(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    with pytest.raises(UserError, match=r"interleaved stages need a multiple .* 2 micro-batches, and a step has 3"):
        Job(config=CONFIG, layout=layout, global_batch_size=3, seq_length=64).check()
    with pytest.raises(UserError, match="--use-torch-fsdp2 needs torch, not mindspore"):
        Job(config=CONFIG, seq_length=64, use_torch_fsdp2=True, ai_framework="mindspore").check()
