"""`tandem plan MODEL`: what a layout needs on each rank and how fast it may be, or which layouts fit N devices."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Column, Table

from tandem.config.parsing import parse_dataclass
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.hf_config import from_hf, load_hf_config
from tandem.models.published import QWEN3_SIZES, qwen3_config
from tandem.models.tensors import parameter_count
from tandem.parallel.layout import Layout, parse_layers
from tandem.planning.hardware import GIB, HARDWARE, Hardware
from tandem.planning.job import Job
from tandem.planning.memory import StageMemory, stage_memories
from tandem.planning.search import Plan, suggest
from tandem.planning.speed import ASSUMPTIONS, Speed, bubble_share, estimate
from tandem.planning.traffic import stage_traffic

DESCRIPTION = (
    "Plan a run before a device is there: per-rank memory, communication, and an estimated step time of one layout; "
    "or, with --devices N, the layouts that fit N devices, fastest first."
)
PLAIN_WIDTH = 140  # columns where the output is no terminal
PLAN_COLUMNS = (
    *("TP", "PP", "layers/chunk", "DP", "FSDP2", "micro-batch", "recompute"),
    *("peak GiB", "step s", "tokens/s", "MFU"),
)
SHOWN = 10  # plans, and sizes of one rejection


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `tandem plan`. Those that training has, too, mean what they mean there."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Hugging Face folder, or a published model such as qwen3-8B."""
    hardware: Literal["h100", "910b", "a3", "cpu"] = "h100"
    """Device to plan for."""
    devices: int | None = None
    """Suggest layouts for so many devices; excludes every option that fixes the layout."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each tensor."""
    pipeline_model_parallel_size: int = 1
    """Stages of layers."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk, for interleaved stages."""
    num_layer_list: str | None = None
    """Layers of each stage, such as 10,18."""
    data_parallel_size: int = 1
    """Ranks that share a global batch."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    use_torch_fsdp2: bool = False
    """Shard weights and gradients over data-parallel ranks, too (PyTorch only)."""
    micro_batch_size: int = 1
    """Samples of one forward pass."""
    recompute_num_layers: int = 0
    """Layers of a rank, from the first, that keep only their input (in training, with --recompute-granularity full and
    --recompute-method block)."""
    global_batch_size: int | None = None
    """Samples of one step; default: one micro-batch on each data-parallel rank. Needed with --devices."""
    seq_length: int = 4096
    """Tokens of a sample."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 masters."""
    fp16: bool = False
    """Compute in float16 with fp32 masters and a loss scale: as large and as fast as bfloat16."""
    ai_framework: Literal["torch", "mindspore"] = "torch"
    """Backend."""
    efficiency: float | None = None
    """Share of the device's peak that matrix products reach; default: the device's assumption."""


# what `--devices` chooses itself
CHOSEN = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_layer_list",
    "data_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "use_torch_fsdp2",
    "micro_batch_size",
    "recompute_num_layers",
)


def run(argv: Sequence[str]) -> None:
    options = parse_dataclass(PlanOptions, "plan", DESCRIPTION, argv)
    hardware = chosen_hardware(options)
    job = requested_job(options)
    hardware.flops(job.half)  # ends here where half precision is not planned for
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    if options.devices is None:
        job.check()
        show_job(console, options, job, hardware)
    else:
        show_suggestions(console, options, job, hardware)
    console.print(f"Assumed: products and attention run at {hardware.efficiency:.0%} of the peak; {ASSUMPTIONS}.")
    console.print(f"Figures of {options.hardware}: {hardware.source}.")


def chosen_hardware(options: PlanOptions) -> Hardware:
    hardware = HARDWARE[options.hardware]
    if options.efficiency is None:
        return hardware
    if not 0 < options.efficiency <= 1:
        raise UserError(f"--efficiency {options.efficiency}: expected a share of the peak, above 0 and at most 1")
    return dataclasses.replace(hardware, efficiency=options.efficiency)


def requested_job(options: PlanOptions) -> Job:
    """The job that the options describe; with `--devices`, what its layouts have in common.

    Raises:
        UserError: the model is unknown, a number is not positive, or options exclude each other.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(PlanOptions)}
    for name, value in vars(options).items():
        least = 0 if name == "recompute_num_layers" else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if options.bf16 and options.fp16:
        raise UserError("--fp16 and --bf16 exclude each other: give one")
    if options.devices is not None:
        fixed = [f"--{name.replace('_', '-')}" for name in CHOSEN if getattr(options, name) != defaults[name]]
        if fixed:
            raise UserError(f"--devices chooses the layout, and {' '.join(fixed)} would fix it: give one or the other")
        if options.global_batch_size is None:
            raise UserError("--devices needs --global-batch-size: how many samples the devices share in a step")
    layout = Layout(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        num_layers_per_virtual_pipeline_stage=options.num_layers_per_virtual_pipeline_stage,
        num_layer_list=parse_layers("--num-layer-list", options.num_layer_list),
    )
    config = model_config(options.model)
    return Job(
        config=config,
        layout=layout.balanced(config.num_layers),
        data_parallel_size=options.data_parallel_size,
        sequence_parallel=options.sequence_parallel,
        use_distributed_optimizer=options.use_distributed_optimizer,
        use_torch_fsdp2=options.use_torch_fsdp2,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=options.global_batch_size or options.micro_batch_size * options.data_parallel_size,
        seq_length=options.seq_length,
        recompute_layers=options.recompute_num_layers,
        half=options.bf16 or options.fp16,
        ai_framework=options.ai_framework,
    )


def model_config(model: str) -> ModelConfig:
    """Of a Hugging Face folder, or of a published model's name."""
    if Path(model).is_dir():
        return from_hf(load_hf_config(model), f"{model}/config.json")
    family, _, size = model.partition("-")
    if family.lower() != "qwen3":
        published = ", ".join(f"qwen3-{size}" for size in QWEN3_SIZES)
        raise UserError(f"{model}: no such folder, and no published model; published: {published}")
    return qwen3_config(size.upper())


def headline(options: PlanOptions, job: Job, devices: int) -> str:
    size = parameter_count(job.config) / 1e9
    batch = f"sequences of {job.seq_length:,} tokens, global batch {job.global_batch_size}"
    precision = "fp16" if options.fp16 else "bf16" if options.bf16 else "fp32"
    return f"{options.model}, {size:.2f} billion parameters, on {devices} x {options.hardware}: {precision}, {batch}"


def show_job(console: Console, options: PlanOptions, job: Job, hardware: Hardware) -> None:
    memories, speed = stage_memories(job, hardware), estimate(job, hardware)
    console.print(headline(options, job, job.devices))
    console.print(memory_table(memories))
    peak = max(memory.peak for memory in memories)
    verdict = "fits" if peak <= hardware.capacity else "does not fit"
    console.print(
        f"{verdict}: {gib(peak)} GiB of the {gib(hardware.capacity)} GiB that may be used "
        f"({hardware.usable:.0%} of {gib(hardware.memory)} GiB)\n"
    )
    console.print(traffic_table(job))
    console.print(speed_table(speed))
    console.print(
        f"{speed.tokens_per_second:,.0f} tokens/s; micro-batches of a rank: {job.micro_batches}, "
        f"to which the bubble adds {bubble_share(job):.1%}\n"
    )


def memory_table(memories: Sequence[StageMemory]) -> Table:
    columns = (
        "layers",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "workspace",
        "gathered_at_peak",
        "peak",
    )
    titles = (name.replace("_at_peak", "") for name in columns)
    table = Table("stage", *map(_right, titles), title="Memory of a rank, GiB (parameters in millions)")
    for stage, memory in enumerate(memories):
        sizes = (getattr(memory, name) for name in columns[2:])
        table.add_row(str(stage), str(memory.layers), f"{memory.parameters / 1e6:,.1f}", *map(gib, sizes))
    table.caption = "logits and workspace are not there together; the larger counts"
    if any(memory.gathered_at_peak for memory in memories):
        table.caption += "\ngathered: what whole weights and gradients beside the rank's rows add to the peak"
    return table


def traffic_table(job: Job) -> Table:
    table = Table("stage", *map(_right, ("tensor", "pipeline", "data")), title="Sent by a rank in a step, GiB")
    for stage in range(job.pipeline_size):
        traffic = stage_traffic(job, stage)
        table.add_row(str(stage), gib(traffic.tensor), gib(traffic.pipeline), gib(traffic.data))
    return table


def speed_table(speed: Speed) -> Table:
    table = Table("part", _right("seconds"), _right("share"), title="Estimated step")
    for name in ("compute", "tensor", "pipeline", "bubble", "data", "optimizer"):
        seconds = getattr(speed, name)
        table.add_row(name, f"{seconds:.3g}", f"{seconds / speed.step:.1%}")
    table.add_row("step", f"{speed.step:.3g}", f"MFU {speed.mfu:.1%}")
    return table


def show_suggestions(console: Console, options: PlanOptions, job: Job, hardware: Hardware) -> None:
    """Raises UserError when nothing fits."""
    assert options.devices is not None
    plans, rejected = suggest(job, hardware, options.devices)
    console.print(headline(options, job, options.devices))
    if plans:
        console.print(plans_table(plans[:SHOWN]))
        console.print(f"The first one: {command(options, plans[0].job)}\n", soft_wrap=True)
    console.print(rejected_table(rejected))
    if not plans:
        raise UserError(f"no layout of {options.devices} x {options.hardware} fits; the table says why")


def plans_table(plans: Sequence[Plan]) -> Table:
    table = Table(*map(_right, PLAN_COLUMNS), title="Layouts that fit, fastest first")
    for plan in plans:
        table.add_row(*plan_cells(plan))
    return table


def plan_cells(plan: Plan) -> list[str]:
    job, speed = plan.job, plan.speed
    chunk = job.layout.num_layers_per_virtual_pipeline_stage
    data = (job.data_parallel_size, "yes" if job.fully_sharded else "-")
    sizes = (job.tensor_size, job.pipeline_size, chunk or "-", *data, job.micro_batch_size)
    return [
        *map(str, sizes),
        f"{job.recompute_layers} of {max(job.layers_of_stages)}",
        gib(plan.peak),
        f"{speed.step:.3g}",
        f"{speed.tokens_per_second:,.0f}",
        f"{speed.mfu:.1%}",
    ]


def rejected_table(rejected: dict[str, list[tuple[int, int]]]) -> Table:
    table = Table("TP x PP", "why not", title="Rejected")
    for reason, sizes in rejected.items():
        named = ", ".join(f"{tensor} x {pipeline}" for tensor, pipeline in sizes[:SHOWN])
        table.add_row(named + (f" and {len(sizes) - SHOWN} more" if len(sizes) > SHOWN else ""), reason)
    return table


def command(options: PlanOptions, job: Job) -> str:
    """The command that shows one suggestion in full."""
    words = ["tandem plan", options.model, "--hardware", options.hardware]
    values = {
        "tensor-model-parallel-size": job.tensor_size,
        "pipeline-model-parallel-size": job.pipeline_size,
        "num-layers-per-virtual-pipeline-stage": job.layout.num_layers_per_virtual_pipeline_stage,
        "num-layer-list": ",".join(map(str, job.layout.num_layer_list or ())),
        "data-parallel-size": job.data_parallel_size,
        "micro-batch-size": job.micro_batch_size,
        "recompute-num-layers": job.recompute_layers,
        "global-batch-size": job.global_batch_size,
        "seq-length": job.seq_length,
        "ai-framework": job.ai_framework,
    }
    words += [f"--{name} {value}" for name, value in values.items() if value]
    switches = {
        "sequence-parallel": job.sequence_parallel,
        "use-distributed-optimizer": job.use_distributed_optimizer,
        "use-torch-fsdp2": job.use_torch_fsdp2,
        "bf16": options.bf16,
        "fp16": options.fp16,
    }
    return " ".join([*words, *(f"--{name}" for name, given in switches.items() if given)])


def gib(size: float) -> str:
    """Bytes in GiB, three digits at least."""
    value = size / GIB
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _right(title: str) -> Column:
    return Column(title, justify="right")
