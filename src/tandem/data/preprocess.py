"""Raw records to `.bin/.idx`: read, render, tokenise, pack, write, and record what was done."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tandem import __version__
from tandem.data.engine import TokenizersEngine, choose_engine
from tandem.data.handlers import GeneralPretrainHandler, detect_handler, make_handler
from tandem.data.indexed import IndexedDataset, IndexedWriter
from tandem.data.naming import sft_prefix, text_prefix
from tandem.data.packing import packed_rows
from tandem.data.readers import expand_input, iter_blocks, parse_row
from tandem.data.record import remove_record, require_own, source_entry, template_entry, tokenizer_entry, write_record
from tandem.data.spool import Spool, fingerprint
from tandem.data.templates import Template, check_prompt_type, get_template
from tandem.data.tokenize import ChunkTokenizer, InstructionTokenizer, PretrainTokenizer
from tandem.data.tokenizer import Tokenizer
from tandem.data.workers import tokenize_blocks
from tandem.errors import UserError

Progress = Callable[[int, int], None]
_SAMPLED_FILES, _SAMPLED_CHARACTERS = 8, 1 << 16  # of each file; what the engines are compared on


@dataclass(frozen=True)
class PreprocessOptions:
    """Settings of `preprocess`, by upstream's flag names.

    Attributes:
        input: files, directories and glob patterns.
        output_prefix: of the files written; its folder must exist.
        tokenizer_name_or_path: a Hugging Face folder.
        handler_name: how a record is read; "" looks at the fields of the first record.
        json_keys: fields of plain text, one `.bin/.idx` pair each.
        map_keys: other field names for an instruction handler.
        prompt_type: the template of fine-tuning data.
        enable_thinking: thinking mode of that template.
        train_turns: which answers of a conversation are trained: "all" or only the "last".
        seq_length: fine-tuning: conversations are cut to one token less, and packed rows have exactly this length.
            None cuts nothing.
        append_eod: put the end-of-document token after each document.
        pack: fill rows of seq_length with several conversations.
        neat_pack: and number them in the attention mask, so that they do not see each other.
        workers: processes that tokenise; the output does not depend on it.
        on_bad: "stop" at the first unusable row, or "skip" it into `{output_prefix}.rejects.jsonl`.
        log_interval: documents between calls of the progress callback.
    """

    input: tuple[str, ...]
    output_prefix: str
    tokenizer_name_or_path: str
    handler_name: str = ""
    json_keys: tuple[str, ...] = ("text",)
    map_keys: Mapping[str, Any] | None = None
    prompt_type: str | None = None
    enable_thinking: bool | None = None
    train_turns: str = "all"
    seq_length: int | None = None
    append_eod: bool = False
    pack: bool = False
    neat_pack: bool = False
    workers: int = 1
    on_bad: str = "stop"
    log_interval: int = 1000

    def __post_init__(self) -> None:
        if self.handler_name:
            make_handler(self.handler_name, self.json_keys, self.map_keys)
        if self.prompt_type is not None:
            check_prompt_type(self.prompt_type)
        _require(bool(self.input), "input is empty; name at least one file, directory or pattern")
        _require(bool(self.json_keys), "json_keys is empty; name at least one field, usually text")
        _require(self.workers >= 1, f"workers is {self.workers}; expected 1 or more")
        _require(self.log_interval >= 1, f"log_interval is {self.log_interval}; expected 1 or more")
        _require(self.train_turns in ("all", "last"), f"train_turns is {self.train_turns!r}; expected 'all' or 'last'")
        _require(self.on_bad in ("stop", "skip"), f"on_bad is {self.on_bad!r}; expected 'stop' or 'skip'")
        _require(
            self.seq_length is None or self.seq_length >= 2, f"seq_length is {self.seq_length}; expected 2 or more"
        )
        _require(not self.neat_pack or self.pack, "neat_pack needs pack; give both")
        _require(not self.pack or self.seq_length is not None, "pack needs seq_length, the length of a packed row")
        _require(
            self.enable_thinking is None or self.prompt_type is not None,
            "enable_thinking needs prompt_type, the template whose thoughts it governs",
        )


@dataclass(frozen=True)
class PreprocessSummary:
    """What `preprocess` did.

    Attributes:
        prefixes: of the `.bin/.idx` pairs, by key.
        documents: rows read.
        kept: those that gave a sequence.
        rejected: unusable rows.
        trimmed: conversations that were cut to seq_length.
        dropped: documents left out, by reason.
        sequences: written for the first key (packed rows with `pack`).
        tokens: in all keys of plain text; in conversations, padding not counted.
        trained_tokens: those with a label; of plain text all.
        text_bytes: UTF-8 bytes tokenised.
        rejects: file of rejected rows, if any.
        engine: what tokenised: gigatoken or tokenizers, with the same result.
    """

    prefixes: dict[str, str]
    documents: int
    kept: int
    rejected: int
    trimmed: int
    dropped: dict[str, int]
    sequences: int
    tokens: int
    trained_tokens: int
    text_bytes: int
    rejects: str | None
    engine: str


def preprocess(options: PreprocessOptions, progress: Progress | None = None) -> PreprocessSummary:
    """Write `{output_prefix}_{key}_document.bin/.idx` per json key, or for conversations the triple
    `{output_prefix}_packed_{input_ids,attention_mask,labels}_document.bin/.idx`, and the record `{output_prefix}.json`.

    Nothing appears under a final name before all is tokenised; the record comes last.

    Args:
        progress: called with (documents done, bytes of text done).

    Raises:
        UserError: an option does not fit the data, a row is unusable and `on_bad` is "stop", or nothing was kept.
    """
    files = expand_input(options.input)
    _require_output_folder(options.output_prefix)
    tokenizer = Tokenizer(options.tokenizer_name_or_path)
    job, template, handler_name = _job(options, files, tokenizer)
    name = sft_prefix if template else text_prefix
    prefixes = {key: name(options.output_prefix, key) for key in job.output_keys}
    names = {key: os.path.basename(prefix) for key, prefix in prefixes.items()}
    require_own(options.output_prefix, names)
    rejects = Path(f"{options.output_prefix}.rejects.jsonl")

    keys = ("input_ids", "labels") if options.pack else job.output_keys
    spool = Spool(options.output_prefix, keys, _identity(options, tokenizer, template, handler_name, files))
    try:
        job.engine = choose_engine(tokenizer, job.engine, _sample(job, files))
        with ThreadPoolExecutor(1) as background:
            sources = background.submit(lambda: [source_entry(file) for file in files])
            _tokenize(job, files, options, spool, progress)
        spool.publish_rejects(rejects)
        _require_kept(spool, files)
        remove_record(options.output_prefix, names)  # an old record must never meet the new data
        if options.pack:
            _pack(spool, prefixes, tokenizer, options)
        else:
            spool.publish(prefixes)
    except UserError:
        spool.remove()  # the same run would fail again
        raise
    spool.remove()

    counts = spool.counts
    summary = PreprocessSummary(
        prefixes=prefixes,
        documents=counts["documents"],
        kept=counts["kept"],
        rejected=spool.rejected,
        trimmed=counts["trimmed"],
        dropped=dict(spool.dropped),
        sequences=len(IndexedDataset(prefixes[job.output_keys[0]])),
        tokens=counts["tokens"],
        trained_tokens=counts["trained_tokens"] if template else counts["tokens"],
        text_bytes=counts["text_bytes"],
        rejects=str(rejects) if spool.rejected else None,
        engine=job.engine.name,
    )
    write_record(
        options.output_prefix, names, _record(options, handler_name, tokenizer, template, sources.result(), summary)
    )
    return summary


def _job(
    options: PreprocessOptions, files: Sequence[Path], tokenizer: Tokenizer
) -> tuple[ChunkTokenizer, Template | None, str]:
    """What the workers do, the template if conversations are rendered, and the handler's name."""
    name = options.handler_name or _detect(options, files)
    handler = make_handler(name, options.json_keys, options.map_keys)
    if isinstance(handler, GeneralPretrainHandler):
        for option in ("prompt_type", "seq_length", "pack"):
            _require(not getattr(options, option), f"{option} is for conversations, but {name} reads plain text")
        _require(
            not options.append_eod or tokenizer.eos_id is not None,
            f"append_eod: {tokenizer.folder} names no end-of-sequence token; set eos_token in tokenizer_config.json",
        )
        reference = TokenizersEngine(tokenizer, add_special_tokens=True)
        return PretrainTokenizer(reference, handler, tokenizer.eos_id if options.append_eod else None), None, name
    _require(options.prompt_type is not None, f"{name} needs prompt_type, the template of its conversations (qwen3)")
    assert options.prompt_type is not None
    template = get_template(options.prompt_type, options.enable_thinking, tokenizer)
    stop = tokenizer.token_to_id(template.stop_word)
    _require(
        stop is not None,
        f"prompt_type {template.name} ends messages with {template.stop_word}, which is no token of "
        f"{tokenizer.folder}; choose the prompt_type of this model",
    )
    _require(
        not options.pack or tokenizer.pad_id is not None,
        f"pack: {tokenizer.folder} names no padding token; set pad_token in tokenizer_config.json",
    )
    eod = stop if options.append_eod else None
    reference = TokenizersEngine(tokenizer, add_special_tokens=False)
    return (
        InstructionTokenizer(reference, handler, template, options.seq_length, eod, options.train_turns),
        template,
        name,
    )


def _detect(options: PreprocessOptions, files: Sequence[Path]) -> str:
    """The handler that fits the first readable row; unreadable ones are reported when their turn comes."""
    for block in iter_blocks(files):
        for index, row in enumerate(block.rows()):
            readable = False
            try:
                record = parse_row(row)
                readable = True
                return detect_handler(record, options.json_keys, options.map_keys)
            except UserError as error:
                if readable or options.on_bad == "stop":
                    raise UserError(f"{block.place(index)}: {error}") from None
    raise UserError(f"{', '.join(map(str, files))}: no readable record")


def _sample(job: ChunkTokenizer, files: Sequence[Path]) -> list[str]:
    """Some texts from the beginning of some of the files, as the job sees them."""
    texts: list[str] = []
    for file in files[:: -(-len(files) // _SAMPLED_FILES)]:
        size = 0
        for row in (row for block in islice(iter_blocks([file]), 1) for row in block.rows()):
            try:
                found = job.texts(job.read(parse_row(row)))
            except UserError:
                continue  # reported when its turn comes
            texts += found
            size += sum(map(len, found))
            if size >= _SAMPLED_CHARACTERS:
                break
    return texts


def _tokenize(
    job: ChunkTokenizer, files: Sequence[Path], options: PreprocessOptions, spool: Spool, progress: Progress | None
) -> None:
    """Bring what is left of the input into the spool."""
    reported = 0
    for chunk in tokenize_blocks(job, islice(iter_blocks(files), spool.blocks, None), options.workers):
        if chunk.rejects and options.on_bad == "stop":
            raise UserError(f"{chunk.rejects[0].reason} (on_bad=skip leaves such rows out)")
        spool.add(chunk)
        documents = spool.counts["documents"]
        if progress and documents - reported >= options.log_interval:
            reported = documents
            progress(documents, spool.counts["text_bytes"])


def _require_kept(spool: Spool, files: Sequence[Path]) -> None:
    first = f"; first: {spool.first_reason}" if spool.rejected else ""
    _require(
        bool(spool.counts["kept"]),
        f"{', '.join(map(str, files))}: nothing kept of {spool.counts['documents']} documents; "
        f"rejected {spool.rejected}, dropped {dict(spool.dropped)}{first}",
    )


def _pack(spool: Spool, prefixes: Mapping[str, str], tokenizer: Tokenizer, options: PreprocessOptions) -> None:
    assert options.seq_length is not None
    assert tokenizer.pad_id is not None
    unpacked = spool.datasets()
    rows = packed_rows(
        unpacked["input_ids"], unpacked["labels"], options.seq_length, tokenizer.pad_id, options.neat_pack
    )
    with ExitStack() as stack:
        writers = {key: stack.enter_context(IndexedWriter(prefix, np.int32)) for key, prefix in prefixes.items()}
        for row in rows:
            for key, writer in writers.items():
                writer.add_document(row[key])


def _identity(
    options: PreprocessOptions,
    tokenizer: Tokenizer,
    template: Template | None,
    handler_name: str,
    files: Sequence[Path],
) -> str:
    """Of all that the output is a function of. Whole inputs are not read for it: size and time stand for them."""
    return fingerprint(
        {
            "version": __version__,
            "options": _recorded_options(options, handler_name),
            "tokenizer": tokenizer_entry(tokenizer),
            "template": template_entry(template) if template else None,
            "sources": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        }
    )


def _recorded_options(options: PreprocessOptions, handler_name: str) -> dict[str, Any]:
    recorded = asdict(options)
    for name in ("workers", "log_interval"):  # they leave no trace in the data
        del recorded[name]
    return {**recorded, "handler_name": handler_name}


def _record(
    options: PreprocessOptions,
    handler_name: str,
    tokenizer: Tokenizer,
    template: Template | None,
    sources: list[dict[str, Any]],
    summary: PreprocessSummary,
) -> dict[str, Any]:
    counts = asdict(summary)
    del counts["prefixes"], counts["rejects"], counts["engine"]
    return {
        "tokenizer": tokenizer_entry(tokenizer),
        "template": template_entry(template) if template else None,
        "options": _recorded_options(options, handler_name),
        "sources": sources,
        "counts": counts,
    }


def _require_output_folder(output_prefix: str) -> None:
    folder = Path(output_prefix).absolute().parent
    _require(folder.is_dir(), f"output_prefix {output_prefix}: the folder {folder} does not exist; create it first")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
