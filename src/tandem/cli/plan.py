"""`tandem plan MODEL`: what a layout needs on each rank and how fast it may be, or which layouts fit N devices."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from tandem.cli.arguments import parse
from tandem.errors import UserError
from tandem.models.tensors import parameter_count
from tandem.options import as_words
from tandem.parallel.layout import Layout
from tandem.planning.hardware import GIB
from tandem.planning.job import Job
from tandem.planning.memory import StageMemory
from tandem.planning.options import PlanOptions
from tandem.planning.run import LayoutPlan, Suggestions, plan
from tandem.planning.search import Plan
from tandem.planning.speed import ASSUMPTIONS, Speed, bubble_share
from tandem.planning.traffic import Traffic

DESCRIPTION = (
    "Plan a run without a device. Shows the memory of each rank, the communication, and an estimated step time of a "
    "layout. With --devices N, shows the layouts that fit N devices, fastest first."
)
PLAIN_WIDTH = 140  # columns when the output is not a terminal
PLAN_COLUMNS = (
    *("TP", "PP", "layers/chunk", "DP", "FSDP2", "micro-batch", "recompute"),
    *("peak GiB", "step s", "tokens/s", "MFU"),
)
SHORT = {"layers/chunk": "chunk", "micro-batch": "micro", "peak GiB": "GiB"}  # so that 80 columns hold them
PLAN_CAPTION = (
    "chunk: layers of an interleaved stage; micro: samples of a micro-batch; recompute: layers of a rank; GiB: peak of "
    "the fullest rank"
)
STAGES_IN_A_ROW = 5  # of the table of memory, which then fits 80 columns
SHOWN = 10  # most plans, and most sizes in one row of rejections


FIRST = (
    *("hardware", "devices", "tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"),
    *(
        "micro_batch_size",
        "global_batch_size",
        "seq_length",
        "bf16",
        "recompute_num_layers",
        "use_distributed_optimizer",
    ),
    "ai_framework",
)


def run(argv: Sequence[str]) -> None:
    options = parse(PlanOptions, "plan", DESCRIPTION, argv, first=FIRST)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    planned = plan(options)
    if isinstance(planned, LayoutPlan):
        show_layout(console, options, planned)
    else:
        show_suggestions(console, options, planned)
    console.print(
        f"Assumed: products and attention run at {planned.hardware.efficiency:.0%} of the peak; "
        f"the host launches a kernel in {planned.hardware.launch_seconds * 1e6:.0f} microseconds; {ASSUMPTIONS}."
    )
    console.print(f"Figures of {options.hardware}: {planned.hardware.source}.")


def headline(options: PlanOptions, job: Job, devices: int) -> str:
    size = parameter_count(job.config) / 1e9
    batch = f"sequences of {job.seq_length:,} tokens, global batch {job.global_batch_size}"
    precision = "fp16" if options.fp16 else "bf16" if options.bf16 else "fp32"
    return f"{options.model}, {size:.2f} billion parameters, on {devices} x {options.hardware}: {precision}, {batch}"


def show_layout(console: Console, options: PlanOptions, planned: LayoutPlan) -> None:
    job, hardware, speed = planned.job, planned.hardware, planned.speed
    console.print(headline(options, job, job.devices))
    for part in (*memory_tables(planned.memories), *notes_on_memory(planned.memories)):
        console.print(part)
    verdict = "fits" if planned.fits else "does not fit"
    console.print(
        f"{verdict}: {gib(planned.peak)} GiB of the {gib(hardware.capacity)} GiB that may be used "
        f"({hardware.usable:.0%} of {gib(hardware.memory)} GiB)\n"
    )
    console.print(traffic_table(planned.traffic))
    console.print(speed_table(speed))
    console.print(
        f"{speed.tokens_per_second:,.0f} tokens/s; micro-batches of a rank: {job.micro_batches}, "
        f"to which the bubble adds {bubble_share(job):.1%}\n"
    )


def memory_tables(memories: Sequence[StageMemory]) -> list[Table]:
    """A column for each stage, and a row for each part. Many stages take several tables."""
    parts = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "activations": "activations",
        "logits": "logits",
        "workspace": "workspace",
        "gathered": "gathered_at_peak",
        "peak": "peak",
    }
    tables = []
    for first in range(0, len(memories), STAGES_IN_A_ROW):
        shown = memories[first : first + STAGES_IN_A_ROW]
        titles = (f"stage {first + number}" for number in range(len(shown)))
        table = Table("GiB of a rank", *map(_right, titles), title="Memory of a rank")
        table.add_row("layers", *(str(memory.layers) for memory in shown))
        table.add_row("million parameters", *(f"{memory.parameters / 1e6:,.1f}" for memory in shown), end_section=True)
        for title, name in parts.items():
            table.add_row(title, *(gib(getattr(memory, name)) for memory in shown), end_section=title == "gathered")
        tables.append(table)
    return tables


def notes_on_memory(memories: Sequence[StageMemory]) -> list[str]:
    notes = ["logits and workspace are not needed at the same time; only the larger one counts"]
    if any(memory.gathered_at_peak for memory in memories):
        notes.append("gathered: what whole weights and gradients add to the peak, besides the rank's own rows")
    return notes


def traffic_table(stages: Sequence[Traffic]) -> Table:
    axes = ("tensor", "pipeline", "data", *(["experts"] if any(traffic.experts for traffic in stages) else []))
    table = Table("stage", *map(_right, axes), title="Sent by a rank in a step, GiB")
    for stage, traffic in enumerate(stages):
        table.add_row(str(stage), *(gib(getattr(traffic, axis)) for axis in axes))
    return table


def speed_table(speed: Speed) -> Table:
    table = Table("part", _right("seconds"), _right("share"), title="Estimated step")
    experts = ["experts"] if speed.experts else []
    for name in ("compute", "tensor", *experts, "pipeline", "bubble", "data", "optimizer"):
        seconds = getattr(speed, name)
        table.add_row(name, f"{seconds:.3g}", f"{seconds / speed.step:.1%}")
    table.add_row("step", f"{speed.step:.3g}", f"MFU {speed.mfu:.1%}")
    return table


def show_suggestions(console: Console, options: PlanOptions, suggestions: Suggestions) -> None:
    """Raises UserError when no layout fits."""
    assert options.devices is not None
    plans, rejected = suggestions.plans, suggestions.rejected
    console.print(headline(options, suggestions.job, options.devices))
    if plans:
        console.print(plans_table(plans[:SHOWN]))
        console.print(f"The first one: {command(options, plans[0].job)}\n", soft_wrap=True)
    console.print(rejected_table(rejected))
    if not plans:
        raise UserError(f"no layout of {options.devices} x {options.hardware} fits; the table says why")


def plans_table(plans: Sequence[Plan]) -> Table:
    titles = list(PLAN_COLUMNS)
    if plans[0].job.config.experts:
        titles.insert(titles.index("DP"), "EP")
    columns = [Column(SHORT.get(title, title), justify="right", no_wrap=True) for title in titles]
    table = Table(
        *columns, title="Layouts that fit, fastest first", caption=PLAN_CAPTION, box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for suggestion in plans:
        table.add_row(*plan_cells(suggestion))
    return table


def plan_cells(plan: Plan) -> list[str]:
    job, speed = plan.job, plan.speed
    chunk = job.layout.num_layers_per_virtual_pipeline_stage
    data = (job.data_parallel_size, "yes" if job.fully_sharded else "-")
    experts = (expert_ranks(job.layout),) if job.config.experts else ()
    sizes = (job.tensor_size, job.pipeline_size, chunk or "-", *experts, *data, job.micro_batch_size)
    return [
        *map(str, sizes),
        f"{job.recompute_layers} of {max(job.layers_of_stages)}",
        gib(plan.peak),
        f"{speed.step:.3g}",
        f"{speed.tokens_per_second:,.0f}",
        f"{speed.mfu:.1%}",
    ]


def expert_ranks(layout: Layout) -> str:
    """`4`; `4 x 1` where tensor ranks hold whole experts, in place of slices of them."""
    cut = layout.expert_tensor_parallel_size
    return str(layout.expert_model_parallel_size) + ("" if cut is None else f" x {cut}")


def rejected_table(rejected: dict[str, list[tuple[int, int]]]) -> Table:
    table = Table("TP x PP", "why not", title="Rejected")
    for reason, sizes in rejected.items():
        named = ", ".join(f"{tensor} x {pipeline}" for tensor, pipeline in sizes[:SHOWN])
        table.add_row(named + (f" and {len(sizes) - SHOWN} more" if len(sizes) > SHOWN else ""), reason)
    return table


def command(options: PlanOptions, job: Job) -> str:
    """The command that shows one suggested layout in full."""
    layout = job.layout
    chosen = dataclasses.replace(
        options,
        devices=None,
        tensor_model_parallel_size=job.tensor_size,
        pipeline_model_parallel_size=job.pipeline_size,
        num_layers_per_virtual_pipeline_stage=layout.num_layers_per_virtual_pipeline_stage,
        num_layer_list=",".join(map(str, layout.num_layer_list or ())) or None,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        data_parallel_size=job.data_parallel_size,
        sequence_parallel=job.sequence_parallel,
        use_distributed_optimizer=job.use_distributed_optimizer,
        use_torch_fsdp2=job.use_torch_fsdp2,
        micro_batch_size=job.micro_batch_size,
        recompute_num_layers=job.recompute_layers,
    )
    return shlex.join(["tandem", "plan", *as_words(chosen)])


def gib(size: float) -> str:
    """Bytes in GiB, with at least three digits."""
    value = size / GIB
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _right(title: str) -> Column:
    return Column(title, justify="right")
