"""`tandem preprocess`: text or instruction data into .bin/.idx files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tandem.cli.progress import byte_progress
from tandem.config.parsing import parse_dataclass
from tandem.config.upstream.flags import PREPROCESS_IGNORED, split_ignored
from tandem.data.preprocess.merge import merge_groups
from tandem.data.preprocess.options import PreprocessOptions, parse_map_keys
from tandem.data.preprocess.run import preprocess
from tandem.data.record import read_record
from tandem.data.statistics import DataView
from tandem.data.templates.catalog import THINKING_MODES
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import RunStopped, UserError
from tandem.report.page_file import check_page

DESCRIPTION = (
    "Turn text into PREFIX_text_document.bin/.idx, or instruction data into "
    "PREFIX_packed_{input_ids,attention_mask,labels}_document.bin/.idx, as Megatron-LM and MindSpeed-LLM read them."
)
MERGE_DESCRIPTION = "Merge .bin/.idx files that were preprocessed in parts."


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Options, named as in MindSpeed-LLM's preprocess_data.py."""

    input: tuple[str, ...]
    """Files (.json, .jsonl, .parquet, ...), folders or patterns; with LlamaFactoryInstructionHandler names in
    dataset_info.json, parted by commas."""
    output_prefix: str
    """Prefix of the files to write; its folder must exist."""
    tokenizer_name_or_path: str
    """Folder of the Hugging Face tokenizer."""
    tokenizer_type: Literal["PretrainedFromHF"] = "PretrainedFromHF"
    """Only PretrainedFromHF."""
    handler_name: str = ""
    """How a record is read, such as AlpacaStyleInstructionHandler; default: recognised by the first record's fields."""
    json_keys: tuple[str, ...] = ("text",)
    """Fields that hold plain text; one pair of files each."""
    map_keys: str | None = None
    """Other field names, as JSON: '{"prompt": "question", "response": "answer"}'."""
    dataset_dir: str | None = None
    """With LlamaFactoryInstructionHandler: folder of dataset_info.json and its files."""
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = "concat"
    """How the datasets of LlamaFactoryInstructionHandler are mixed: in turn until one is used up, or until all are."""
    interleave_probs: str | None = None
    """With interleaving: how often each dataset is next, as '0.7,0.3'; default: in turn."""
    max_samples: int | None = None
    """Read only so many rows, of each dataset."""
    seed: int = 1234
    """Seed of --interleave-probs."""
    prompt_type: str | None = None
    """Chat template of instruction data, such as qwen3."""
    enable_thinking: Literal["true", "false", "none"] = "none"
    """Thinking mode of the template."""
    train_turns: Literal["all", "last"] = "all"
    """Which answers of a conversation are trained."""
    seq_length: int | None = None
    """Longest conversation; with --pack, the exact length of a row."""
    over_long: Literal["trim", "drop", "stop"] = "trim"
    """What to do with conversations of --seq-length tokens or more: cut them turn by turn, leave them out, or stop with
    the place of the first. Pairs are never cut, but left out."""
    pad_to_multiple_of: int = 1
    """Plain text: pad each document to a multiple of this, with the id that follows the tokenizer's last one."""
    append_eod: bool = False
    """End each document with the end-of-document token."""
    pack: bool = False
    """Put several conversations into a row of --seq-length."""
    neat_pack: bool = False
    """With --pack: keep the conversations of a row apart in attention."""
    workers: int = 1
    """Processes that tokenise; the files do not depend on it."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with an unusable row; skip writes it to PREFIX.rejects.jsonl."""
    show: int = 0
    """Print so many samples of the result as text, with what is trained marked."""
    html: str | None = None
    """Write counts and the samples of --show as one HTML page to a file."""
    log_interval: int = 1000
    """Documents between two signs of progress."""


@dataclass(frozen=True, kw_only=True)
class MergeFlags:
    """Options of the merge of datasets that were preprocessed in parts."""

    input: str
    """Folder with the parts."""
    output_prefix: str
    """Each group becomes OUTPUT_PREFIX_KEY.bin/.idx."""
    merge_group_keys: tuple[str, ...]
    """Merge all pairs of files whose names hold the key, for each key."""


def run(argv: Sequence[str]) -> None:
    rest, notices = split_ignored(argv, PREPROCESS_IGNORED)
    if any(word.split("=")[0].replace("_", "-") == "--merge-group-keys" for word in rest):
        run_merge(rest)
        return
    flags = parse_dataclass(Flags, "preprocess", DESCRIPTION, rest)
    for notice in notices:
        print(f"> {notice}")
    if flags.html:
        check_page(flags.html)
    if flags.show < 0:
        raise UserError(f"--show {flags.show}: expected 0 or more")
    start = time.perf_counter()
    try:
        with byte_progress("tokenising") as progress:
            summary = preprocess(options_from(flags), lambda _, text_bytes: progress(text_bytes, None))
    except KeyboardInterrupt:
        raise RunStopped("interrupted; what is tokenised so far is kept: the same command goes on") from None
    seconds = time.perf_counter() - start
    dropped = "".join(f", {count:,} dropped ({reason})" for reason, count in summary.dropped.items())
    print(
        f"{summary.documents:,} documents: {summary.kept:,} kept, {summary.rejected:,} rejected, "
        f"{summary.trimmed:,} trimmed{dropped}"
    )
    if summary.trimmed_prompts:
        print(
            f"> {summary.trimmed_prompts:,} of the trimmed lost a part of a prompt, which the answer may be about; "
            f"--over-long drop leaves out what would have to be cut"
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
        path = next(iter(summary.prefixes.values())) if flags.prompt_type is None else flags.output_prefix
        show(flags, DataView(path), Tokenizer(flags.tokenizer_name_or_path))


def show(flags: Flags, view: DataView, tokenizer: Tokenizer) -> None:
    from tandem.cli.inspect_data import make_console, overview, show_samples
    from tandem.report.data_page import write_page  # here: both load `rich`, which takes a while

    console = make_console()
    console.print(overview(view.data_path, view.statistics()))
    show_samples(console, view, tokenizer, flags.show)
    if flags.html:
        write_page(flags.html, view, tokenizer, flags.show)
        print(f"wrote {flags.html}")


def run_merge(argv: Sequence[str]) -> None:
    flags = parse_dataclass(MergeFlags, "preprocess", MERGE_DESCRIPTION, argv)
    prefixes = merge_groups(flags.input, flags.merge_group_keys, flags.output_prefix)
    for prefix in prefixes:
        print(f"wrote {prefix}.bin and .idx")
    found = read_record(prefixes[0])
    print(
        f"wrote {found[0]}"
        if found
        else "no record: not all parts have one, not all of their files are merged, or a key does not end in _document"
    )


def options_from(flags: Flags) -> PreprocessOptions:
    values = {name: value for name, value in vars(flags).items() if name not in ("tokenizer_type", "show", "html")}
    values["map_keys"] = parse_map_keys(flags.map_keys)
    values["enable_thinking"] = THINKING_MODES[flags.enable_thinking]
    values["interleave_probs"] = _probabilities(flags.interleave_probs)
    return PreprocessOptions(**values)


def _probabilities(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--interleave-probs {text!r}: expected numbers parted by commas, as 0.7,0.3") from None
