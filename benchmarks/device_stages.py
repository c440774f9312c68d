"""The stages of `device.py`: what each measures on one device, next to transformers where that is installed.

Each is a function of a `Run`, which notes what it finds at once. Imports of frameworks are inside functions, so that
the parent needs none.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from device_probes import probes
from device_sides import (
    BF16_MOMENTS,
    GIB,
    STEPS,
    UNMEASURED,
    Ours,
    Run,
    Side,
    device_name,
    figures,
    free,
    held,
    in_turns,
    padded_arrays,
    peer_of,
    synchronise,
    timed,
)

from tandem.bench.batches import batch_of, weights_of
from tandem.models.config import ModelConfig
from tandem.models.flops import training_flops
from tandem.planning.hardware import HARDWARE
from tandem.planning.job import Job
from tandem.planning.memory import peak_memory


def machine(run: Run) -> None:
    """Versions, the rates of products and copies, and which operators are there."""
    import torch

    from tandem.bench.run import versions

    run.note({"versions": versions(), "cuda": torch.version.cuda})
    if run.device != "cpu":
        run.note({"device": getattr(torch, run.device).get_device_name(), "memory GiB": total_memory(run.device)})
    size = 256 if run.tiny else 8192
    x = torch.randn(size, size, device=run.device, dtype=torch.bfloat16)
    for _ in range(3):
        x @ x
    seconds, _ = timed(run, lambda: [x @ x for _ in range(10)])
    run.note({"bf16 product TFLOP/s": 20 * size**3 / seconds / 1e12, "size": size})
    y = torch.empty(2**20 if run.tiny else 2**30, dtype=torch.uint8, device=run.device)
    z = torch.empty_like(y)
    z.copy_(y)
    seconds, _ = timed(run, lambda: [z.copy_(y) for _ in range(10)])
    run.note({"copy GB/s, read and written": 20 * y.numel() / seconds / 1e9})
    for name, probe in probes(run.device).items():
        try:
            run.note({"probe": name, "result": probe() or "works"})
        except Exception as error:  # noqa: BLE001 - what is missing is the result
            run.note({"probe": name, "result": f"{type(error).__name__}: {str(error)[:300]}"})


def total_memory(device: str) -> float:
    import torch

    return float(getattr(torch, device).get_device_properties(0).total_memory / GIB)


def toys(run: Run) -> None:
    """Loss and gradients of toys on the device against the CPU, clipping and skipping."""
    from tandem.bench.parity import clipping_and_skipping, parity
    from tandem.bench.team import ALONE

    run.note(parity(run.options, ALONE))
    run.note(clipping_and_skipping(run.options, ALONE))


def bits(run: Run) -> None:
    """Whether a run gives the same bits twice, where that is asked for: in a process that computed nothing before."""
    from tandem.backends import make_deterministic
    from tandem.bench.parity import toy_config

    make_deterministic("torch")
    config, ends = toy_config(), []
    for _ in range(2):
        ours = Ours(run, config)
        losses = [ours.step(ours.new_batch((7, 1, 19, 12, 12, 5))) for _ in range(4)]
        ends.append((losses, [array.copy() for _, _, array in ours.engine.tensors()]))
    (first, weights), (second, others) = ends
    same = first == second and all(np.array_equal(a, b) for a, b in zip(weights, others))
    run.note({"two deterministic runs have the same bits": same})


def against_transformers(run: Run) -> None:
    """0.6B with the same random weights: loss and gradients, in fp32 and bf16, next to transformers in fp32."""
    from tandem.models.weight_map import WeightMap

    config = run.config("0.6B")
    length = min(512, run.seq_length)
    batch = batch_of(config, (length,))
    arrays = padded_arrays(batch, by_document=False)
    found: dict[str, tuple[float, dict[str, np.ndarray]]] = {}
    for name, bf16 in (("transformers fp32", False), ("transformers bf16", True)):
        peer = peer_of(run, config, bf16=bf16)
        found[name] = peer.gradients(arrays, batch.trained_tokens)
        del peer
        free(run.device)
    expected_loss, expected = found["transformers fp32"]
    weight_map = WeightMap(config)
    for name, bf16 in (("fp32", False), ("bf16", True)):
        ours = Ours(run, config, bf16=bf16)
        loss, gradients = ours.engine.loss_and_gradients([batch], weights_of([batch]))
        parts = {part: array for key in gradients for part, array in weight_map.to_hf(key, gradients[key]).items()}
        worst = {part: relative(parts[part], expected[part]) for part in parts}
        largest = max(worst, key=lambda part: worst[part])
        run.note(
            {
                "dtype": f"{name} (computed in {ours.engine.param_dtype})",
                "loss difference": abs(loss - expected_loss) / expected_loss,
                "gradient difference": worst[largest],
                "of": largest,
            }
        )
        del ours
        free(run.device)
    theirs = found["transformers bf16"]
    run.note(
        {
            "dtype": "transformers' own bf16",
            "loss difference": abs(theirs[0] - expected_loss) / expected_loss,
            "gradient difference": max(relative(theirs[1][part], expected[part]) for part in expected),
        }
    )


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() + 1e-12))


def pretraining(run: Run) -> None:
    """0.6B at the full length: micro-batches of 1, 4 and 8 next to transformers eager and then compiled, in turns."""
    config = run.config("0.6B")
    before = held(run.device)
    ours = Ours(run, config)
    run.note({"tandem holds GiB": held(run.device) - before, "bytes a parameter": 18})
    peer = None
    try:
        peer = peer_of(run, config)
    except Exception as error:  # noqa: BLE001 - not installed, or out of memory
        run.note({"peer": f"{type(error).__name__}: {str(error)[:300]}"})
    ways = [False] if peer is None else [False, True]
    for compiled in ways:  # compiling takes longest, so what needs it comes last
        for samples in (1, 4, 8):
            compare(run, ours, peer, samples, compiled=compiled)
        if not compiled:
            count_both(run, ours, peer)


def compare(run: Run, ours: Ours, peer: Any, samples: int, *, compiled: bool) -> None:
    sides = pretraining_sides(run, ours, peer, samples, compiled=compiled)
    in_turns(run, sides)
    flops = samples * training_flops(ours.config, (run.seq_length,))
    for side in sides:
        found = figures(side, samples * run.seq_length, flops, ours.engine.device_name)
        run.note({"size": "0.6B", "micro-batch": samples, **found})
    if not compiled:
        run.note({"micro-batch": samples, "planned GiB": planned(ours.config, samples, run)})
    free(run.device)


def count_both(run: Run, ours: Ours, peer: Any) -> None:
    """Kernels, copies and waits of a step of each side."""
    batch = ours.new_batch((run.seq_length,))
    run.note(counted(run, lambda: ours.step(batch), "tandem"))
    if peer is not None:
        arrays = padded_arrays(batch, by_document=False)
        run.note(counted(run, lambda: peer.step([arrays], batch.trained_tokens), "transformers"))


def pretraining_sides(run: Run, ours: Ours, peer: Any, samples: int, *, compiled: bool) -> list[Side]:
    """Both train on the same tokens in each step."""
    lengths = (run.seq_length,)
    batches = [ours.new_batch(lengths, samples) for _ in range(UNMEASURED + STEPS)]

    def theirs(number: int) -> float:
        peer.compile(compiled=compiled)
        arrays = padded_arrays(batches[number], by_document=False)
        return float(peer.step([arrays], batches[number].trained_tokens))

    sides = [Side("tandem", lambda number: ours.step(batches[number]))]
    if peer is not None:
        sides.append(Side("transformers compiled" if compiled else "transformers", theirs))
    return sides


def planned(config: ModelConfig, samples: int, run: Run, **moments: Any) -> float:
    job = Job(
        config=config,
        micro_batch_size=samples,
        global_batch_size=samples,
        seq_length=run.seq_length,
        half=True,
        **moments,
    )
    return peak_memory(job, HARDWARE["h100"]) / GIB


def counted(run: Run, step: Callable[[], Any], name: str) -> dict[str, Any]:
    """Kernels, copies and waits of a step."""
    from tandem.backends import start_profiler

    profiler = start_profiler("torch", run.folder / f"profile-{name}")
    step()
    synchronise(run.device)
    profiler.stop()
    return {"counted": name, **profiler.counts()}


def packed(run: Run) -> None:
    """Packed samples of 200 documents, of new lengths in each step; the peer pads them to the longest."""
    config = run.config("0.6B")
    ours = Ours(run, config)
    random = np.random.default_rng(0)
    count = UNMEASURED + 2 * STEPS
    batches = [ours.new_batch(cut(random, run.seq_length, run.documents)) for _ in range(count)]
    sides = [Side("tandem", lambda number: ours.step(batches[number]))]
    try:
        peer = peer_of(run, config)
        trained = [padded_arrays(batch, by_document=True) for batch in batches]
        sides.append(
            Side("transformers, padded", lambda number: peer.step([trained[number]], batches[number].trained_tokens))
        )
    except Exception as error:  # noqa: BLE001 - not installed
        run.note({"peer": f"{type(error).__name__}: {error}"})
    in_turns(run, sides, 2 * STEPS)
    flops = float(np.mean([training_flops(config, batch.lengths.tolist()) for batch in batches]))
    for side in sides:
        found = figures(side, run.seq_length, flops, ours.engine.device_name)
        flat = {"slowest over median": max(side.seconds) / statistics.median(side.seconds)} if side.seconds else {}
        run.note({"documents": run.documents, **found, **flat, "each": side.seconds})


def cut(random: np.random.Generator, total: int, count: int) -> tuple[int, ...]:
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return tuple(np.diff([0, *cuts, total]).tolist())


def large(run: Run) -> None:
    """4B, then the width of 8B with 18 layers."""
    for size, layers, micro_batches in (("4B", None, (1, 2)), ("8B", 18, (1, 4))):
        measure_alone(run, size, layers, micro_batches)
        free(run.device)


def large_peer(run: Run) -> None:
    """transformers at 4B: with fp32 weights, as its Trainer has them."""
    config = run.config("4B")
    peer = peer_of(run, config)
    batches = [batch_of(config, (run.seq_length,), seed=number) for number in range(UNMEASURED + STEPS)]
    arrays = [padded_arrays(batch, by_document=False) for batch in batches]
    for name, fast in (("transformers", False), ("transformers compiled", True)):
        peer.compile(compiled=fast)
        side = Side(name, lambda number: peer.step([arrays[number]], batches[number].trained_tokens))
        in_turns(run, [side])
        flops = training_flops(config, (run.seq_length,))
        run.note({"size": "4B", **figures(side, run.seq_length, flops, device_name(run.device))})


def whole_8b(run: Run) -> None:
    """8B with all layers, and Adam's moments in bf16."""
    measure_alone(run, "8B", None, (1, 2), **BF16_MOMENTS)


def measure_alone(run: Run, size: str, layers: int | None, micro_batches: tuple[int, ...], **settings: Any) -> None:
    config = run.config(size, layers)
    ours = Ours(run, config, **settings)
    run.note({"size": size, "layers": config.num_layers, "holds GiB": held(run.device), **settings})
    for samples in micro_batches:
        batches = [ours.new_batch((run.seq_length,), samples) for _ in range(UNMEASURED + STEPS)]
        side = Side("tandem", lambda number, batches=batches: ours.step(batches[number]))  # type: ignore[misc]
        in_turns(run, [side])
        flops = samples * training_flops(config, (run.seq_length,))
        found = figures(side, samples * run.seq_length, flops, ours.engine.device_name)
        run.note({"size": size, "layers": config.num_layers, "micro-batch": samples, **found})
    run.note(
        {"size": size, "planned GiB": [planned(config, samples, run, **moments(settings)) for samples in micro_batches]}
    )


def moments(settings: dict[str, Any]) -> dict[str, Any]:
    from tandem.moments import MomentSettings

    return {"moments": MomentSettings(**settings)} if settings else {}


def trace(run: Run) -> None:
    """A trace of one step of 0.6B, and the kernels that took longest."""
    from torch.profiler import profile, supported_activities

    ours = Ours(run, run.config("0.6B"))
    for _ in range(UNMEASURED):
        ours.step(ours.new_batch((run.seq_length,)))
    batch = ours.new_batch((run.seq_length,))
    with profile(activities=supported_activities()) as profiler:
        ours.step(batch)
        synchronise(run.device)
    profiler.export_chrome_trace(str(run.folder / "trace.json.gz"))
    on = "self_cpu_time_total" if run.device == "cpu" else "self_device_time_total"
    table = profiler.key_averages().table(sort_by=on, row_limit=40)
    (run.folder / "kernels.txt").write_text(table, encoding="utf-8")
    slowest = sorted(profiler.key_averages(), key=lambda event: -getattr(event, on))[:12]
    run.note({"slowest, ms": {event.key[:60]: round(getattr(event, on) / 1e3, 2) for event in slowest}})


@contextmanager
def replaced(device: str, **members: Any) -> Iterator[None]:
    """Inside, the device's table of kernels has other members."""
    from tandem.backends.torch.compute import sets

    before = sets.KERNELS[device]
    sets.KERNELS[device] = dataclasses.replace(before, **members)
    try:
        yield
    finally:
        sets.KERNELS[device] = before


def parts(run: Run) -> None:
    """What each part of the table of kernels brings: a step of 0.6B without it."""
    from tandem.backends.torch.attention import attention
    from tandem.backends.torch.compute import cpu
    from tandem.frameworks import TORCH

    pieces = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotary_heads", "rotary_heads_backward")
    variants: dict[str, dict[str, Any]] = {
        "as it is": {},
        "eager norms, heads and SwiGLU": {name: getattr(cpu, name) for name in pieces},
        "eager loss": {"losses_and_gradient": cpu.losses_and_gradient},
        "loss in chunks of 64 MiB": {"logits_chunk_bytes": TORCH.logits_chunk_bytes},
        "weight gradients in pieces": {"add_product": cpu.add_product},
        "copies when they are needed": {"early": cpu.early},
        "attention by runs of equal lengths": {"attention": attention, "documents": cpu.documents},
    }
    ours = Ours(run, run.config("0.6B"))
    random = np.random.default_rng(0)
    one = [ours.new_batch((run.seq_length,)) for _ in range(UNMEASURED + 3)]
    many = [ours.new_batch(cut(random, run.seq_length, run.documents)) for _ in range(UNMEASURED + 3)]
    for name, members in variants.items():
        for documents, batches in (("one document", one), ("many documents", many)):
            with replaced(run.device, **members):
                side = Side(name, lambda number, batches=batches: ours.step(batches[number]))  # type: ignore[misc]
                in_turns(run, [side], 3)
            seconds = statistics.median(side.seconds) if side.seconds else None
            run.note({"without": name, "batch": documents, "seconds": seconds, "failed": side.failed})


@dataclass(frozen=True)
class Stage:
    """A part of the measurement.

    Attributes:
        seconds: the most that it may take.
    """

    name: str
    seconds: float
    run: Callable[[Run], None]


# What says whether anything is right comes first, then what the aims speak of.
STAGES = (
    Stage("machine", 40, machine),
    Stage("toys", 60, toys),
    Stage("bits", 40, bits),
    Stage("pretraining", 170, pretraining),
    Stage("transformers", 60, against_transformers),
    Stage("large", 130, large),
    Stage("packed", 80, packed),
    Stage("whole-8b", 90, whole_8b),
    Stage("parts", 80, parts),
    Stage("trace", 50, trace),
    Stage("large-peer", 60, large_peer),
)
