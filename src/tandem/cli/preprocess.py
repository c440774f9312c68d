"""`tandem preprocess`: turn text or instruction data into .bin/.idx files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

from tandem.cli.arguments import parse
from tandem.cli.progress import byte_progress
from tandem.config.upstream.flags import PREPROCESS_IGNORED, split_ignored
from tandem.data.preprocess.merge import merge_groups
from tandem.data.preprocess.noticed import told
from tandem.data.preprocess.options import MergeOptions, PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.record import read_record
from tandem.data.statistics import DataView
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import RunStopped
from tandem.options import PathText
from tandem.report.page_file import check_page

DESCRIPTION = (
    "Turn text into PREFIX_text_document.bin/.idx, or instruction data into "
    "PREFIX_packed_{input_ids,attention_mask,labels}_document.bin/.idx. Megatron-LM and MindSpeed-LLM read the same "
    "files."
)
MERGE_DESCRIPTION = "Merge .bin/.idx files that were preprocessed in parts."


FIRST = (
    *("input", "output_prefix", "tokenizer_name_or_path", "handler_name", "json_keys", "prompt_type"),
    *("enable_thinking", "seq_length", "append_eod", "pack", "workers", "on_bad", "show"),
)


@dataclass(frozen=True)
class PreprocessFlags(PreprocessOptions):
    """The options of preprocessing, and what to show of the result."""

    _: KW_ONLY
    show: int = 0
    """Print this many samples of the result as text, with the trained text marked."""
    html: PathText | None = None
    """Write an HTML page with counts and the samples of --show to this file."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.show < 0:
            yield f"--show {self.show}: expected 0 or more"


def run(argv: Sequence[str]) -> None:
    rest, notices, problems = split_ignored(argv, PREPROCESS_IGNORED)
    if any(word.split("=")[0].replace("_", "-") == "--merge-group-keys" for word in rest):
        run_merge(rest, problems)
        return
    flags = parse(PreprocessFlags, "preprocess", DESCRIPTION, rest, first=FIRST, problems=problems)
    for notice in notices:
        print(f"> {notice}")
    if flags.html:
        check_page(flags.html)
    start = time.perf_counter()
    try:
        with byte_progress("tokenising") as progress:
            summary = preprocess(flags, lambda _, text_bytes: progress(text_bytes, None))
    except KeyboardInterrupt:
        raise RunStopped("interrupted; what is tokenised so far is kept: the same command goes on") from None
    seconds = time.perf_counter() - start
    for handler in dict.fromkeys(summary.handlers):
        recognised = "" if flags.handler_name else ", recognised by the first record"
        template = f", with prompt type {summary.template}" if summary.template else ""
        print(f"> read with {handler}{recognised}{template}")
    dropped = "".join(f", {count:,} dropped ({reason})" for reason, count in summary.dropped.items())
    print(
        f"{summary.documents:,} documents: {summary.kept:,} kept, {summary.rejected:,} rejected, "
        f"{summary.trimmed:,} trimmed{dropped}"
    )
    if summary.eod:
        print(f"> each document ends with {summary.eod}")
    for line in told(summary.unread, summary.readers, summary.noticed):
        print(f"> {line}")
    if summary.trimmed_prompts:
        print(
            f"> {summary.trimmed_prompts:,} of the trimmed lost a part of a prompt, which their answers may need; "
            f"--over-long drop leaves out all that are too long"
        )
    print(
        f"{summary.sequences:,} sequences, {summary.tokens:,} tokens, {summary.trained_tokens:,} of them trained; "
        f"{summary.documents / seconds:,.0f} documents/s, "
        f"{summary.text_bytes / seconds / 1e6:.1f} MB/s "
        f"({summary.engine})"
    )
    for prefix in summary.prefixes.values():
        print(f"wrote {prefix}.bin and .idx")
    if summary.rejects:
        print(f"wrote {summary.rejects}")
    if flags.show or flags.html:
        show(flags, DataView(summary.data_paths[0]), Tokenizer(flags.tokenizer_name_or_path))


def show(flags: PreprocessFlags, view: DataView, tokenizer: Tokenizer) -> None:
    from tandem.cli.inspect_data import make_console, overview, show_samples
    from tandem.report.data_page import write_page  # imported late: both load `rich`, which takes a while

    console = make_console()
    console.print(overview(view.data_path, view.statistics()))
    show_samples(console, view, tokenizer, flags.show)
    if flags.html:
        write_page(flags.html, view, tokenizer, flags.show)
        print(f"wrote {flags.html}")


def run_merge(argv: Sequence[str], problems: Sequence[str]) -> None:
    flags = parse(MergeOptions, "preprocess", MERGE_DESCRIPTION, argv, problems=problems)
    prefixes = merge_groups(flags.input, flags.merge_group_keys, flags.output_prefix)
    for prefix in prefixes:
        print(f"wrote {prefix}.bin and .idx")
    path_and_record = read_record(prefixes[0])
    print(
        f"wrote {path_and_record[0]}"
        if path_and_record
        else "wrote no record: a part has none, not all files of the parts are merged, or a key does not end in "
        "_document"
    )
