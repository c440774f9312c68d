"""`tandem inspect checkpoint PATH`: show what a folder contains. `tandem inspect data PREFIX` is in `inspect_data`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from tandem.checkpoints.adapters.describe import AdapterSummary, summaries_of, summaries_of_folder
from tandem.checkpoints.adapters.peft import is_peft, notices_of
from tandem.checkpoints.describe import Description, describe, with_integrity
from tandem.checkpoints.hf.record import resizes_of
from tandem.cli import inspect_data
from tandem.cli.arguments import parse
from tandem.cli.progress import byte_progress
from tandem.errors import UserError, nearest
from tandem.models.lora import Lora
from tandem.models.tensors import parameter_count
from tandem.options import Options, PathText, positional

DESCRIPTION = "Show the contents of a Hugging Face folder or of a checkpoint of any format, and check for damage."
SUBJECTS = ("checkpoint", "data")
PLAIN_WIDTH = 140  # columns when the output is not a terminal


@dataclass(frozen=True)
class InspectOptions(Options):
    """Options of `tandem inspect checkpoint`."""

    path: PathText = field(metadata=positional("PATH", flag_too=True, also=("--load",)))
    """Hugging Face folder or checkpoint folder."""
    _: KW_ONLY
    ckpt_step: int | None = None
    """Iteration to show; default: the newest."""
    quick: bool = False
    """Check only headers and shapes. Do not read tensors."""


def run(argv: Sequence[str]) -> None:
    subject = argv[0] if argv else ""
    if subject not in SUBJECTS and subject not in ("-h", "--help"):
        raise UserError(
            f"inspect {subject}: expected inspect checkpoint PATH, or inspect data PREFIX"
            f"{nearest(subject, list(SUBJECTS))}"
        )
    if subject == "data":
        inspect_data.run(argv[1:])
        return
    words = argv[1:] if subject in SUBJECTS else argv
    options = parse(InspectOptions, "inspect checkpoint", DESCRIPTION, words)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if is_peft(Path(options.path)):
        lora, summaries = summaries_of_folder(Path(options.path))
        console.print(adapters_table(lora, summaries))
        for notice in notices_of(Path(options.path)):
            print(f"> {notice}")
        return
    description = describe(options.path, options.ckpt_step)
    if not options.quick:
        with byte_progress("reading") as progress:
            description = with_integrity(description, progress)
    console.print(overview(description))
    if description.config.lora is not None:
        console.print(adapters_table(description.config.lora, summaries_of(description.source)))
    console.print(contents(description))
    console.print(files(description))


def adapters_table(lora: Lora, summaries: list[AdapterSummary]) -> Table:
    table = Table(
        "module", "layers", "rank", "alpha", "B is zero in", title=f"{lora.kind} adapters", title_justify="left"
    )
    for row in summaries:
        ranks, alphas = (", ".join(f"{value:g}" for value in values) for values in (row.ranks, row.alphas))
        table.add_row(
            row.module, str(row.layers), ranks, alphas, f"{row.unchanged} layers" if row.unchanged else "none"
        )
    return table


def overview(description: Description) -> Table:
    config, layout = description.config, description.layout
    table = Table("", "", show_header=False, title=str(description.folder), title_justify="left")
    table.add_row("format", description.format)
    if description.iteration:
        others = f" (also here: {', '.join(description.others)})" if description.others else ""
        table.add_row("iteration", description.iteration + others)
    table.add_row("family", f"{config.model_type}, embeddings {'tied' if config.tied else 'untied'}")
    table.add_row("parameters", f"{parameter_count(config):,}")
    table.add_row("layers", str(config.num_layers))
    table.add_row("hidden, ffn", f"{config.hidden_size}, {config.ffn_hidden_size}")
    if experts := config.experts:
        sparse = config.num_layers - config.dense_layers
        table.add_row(
            "experts",
            f"{experts.num_experts} in {sparse} layers, {experts.moe_router_topk} for each token, width "
            f"{experts.moe_ffn_hidden_size}",
        )
    heads = f"{config.num_attention_heads} queries, {config.num_query_groups} keys, {config.kv_channels} channels"
    table.add_row("heads", heads)
    table.add_row("vocabulary", f"{config.vocab_size:,}{_added_rows(description)}")
    if layout:
        table.add_row("layout", ", ".join(f"{name} {value}" for name, value in vars(layout).items() if value))
    if description.weights:
        table.add_row("weights", description.weights)
    table.add_row("optimizer", description.optimizer)
    if description.trainer_state:
        table.add_row("other files", ", ".join(description.trainer_state))
    table.add_row("integrity", description.integrity)
    for notice in description.source.notices:
        table.add_row("note", notice)
    return table


def _added_rows(description: Description) -> str:
    """In words, the rows that `tandem convert --resize-vocab` added."""
    steps = resizes_of(description.source.companions)
    return "".join(f"; rows from {step['from']:,} on were added as {step['new_rows']}" for step in steps)


def contents(description: Description) -> Table:
    table = Table("tensors of", "dtype", *(_right(title) for title in ("tensors", "numbers", "bytes")))
    for content in description.contents:
        counts = (f"{count:,}" for count in (content.tensors, content.numbers, content.bytes))
        table.add_row(content.kind, content.dtype, *counts)
    return table


def files(description: Description) -> Table:
    digests = description.digests
    table = Table("file", _right("bytes"), *(["sha256"] if digests else []))
    for file, size in description.files.items():
        table.add_row(file, f"{size:,}", *([digests[file]] if digests else []))
    return table


def _right(title: str) -> Column:
    return Column(title, justify="right")
