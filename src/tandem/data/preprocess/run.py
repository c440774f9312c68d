"""Preprocessing: read raw records, render, tokenise and pack them, write `.bin/.idx` and a record."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tandem.data.handlers.conversations import InstructionHandler
from tandem.data.handlers.registry import LLAMA_FACTORY
from tandem.data.indexed import IndexedDataset, IndexedWriter, part_of
from tandem.data.kinds import REJECTS_SUFFIX, Kind
from tandem.data.packing import Sequences, packed_rows
from tandem.data.preprocess.chunks import ChunkTokenizer, TokenizedChunk, mapped_key
from tandem.data.preprocess.jobs import job_of
from tandem.data.preprocess.mixing import Selection, interleaved
from tandem.data.preprocess.options import PreprocessOptions, require
from tandem.data.preprocess.spool import Spool, fingerprint
from tandem.data.preprocess.workers import tokenize_blocks
from tandem.data.record import (
    remove_record,
    require_no_other_record,
    source_entries,
    template_entry,
    tokenizer_entry,
    write_record,
)
from tandem.data.sources.readers import iter_blocks
from tandem.data.sources.sources import DATASET_INFO, Source, iter_source_blocks, open_sources
from tandem.data.statistics import DataView
from tandem.data.templates.messages import Template
from tandem.data.tokens.encoder import Engine, choose_engine
from tandem.data.tokens.special import SpellingEngine
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError, nearest
from tandem.files.publish import check_writable, nearest_folder
from tandem.version import __version__

Progress = Callable[[int, int], None]
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAMPLED_FILES, _SAMPLED_CHARACTERS = 8, 1 << 16  # the sample of texts on which the engines are compared


@dataclass(frozen=True)
class PreprocessSummary:
    """What `preprocess` did.

    Attributes:
        prefixes: prefixes of the `.bin/.idx` pairs, by key.
        data_paths: what to give to `--data-path`.
        documents: rows that were read.
        kept: documents that became a sequence.
        rejected: unusable rows.
        trimmed: conversations that were cut to seq_length.
        trimmed_prompts: trimmed conversations in which a prompt was cut.
        dropped: documents left out, by reason.
        unread: rows by the name of a column that holds something and is not read. Of plain text a part of the rows
            counts.
        readers: by such a column, the option that would read it.
        noticed: other things that change what is learned, by the names of `noticed.py`.
        sequences: sequences written for the first key; with `pack`, rows.
        tokens: tokens of all keys, without the padding of packed rows.
        trained_tokens: tokens with a label; all tokens of plain text.
        text_bytes: UTF-8 bytes of text that were tokenised.
        rejects: the file with the rejected rows, if there are any.
        engine: the library that tokenised, gigatoken or tokenizers; both give the same result.
        handlers: the handler of each source.
        template: the prompt type of conversations; None for plain text.
        eod: the token that ends each document; None without `append_eod`.
    """

    prefixes: dict[str, str]
    data_paths: tuple[str, ...]
    documents: int
    kept: int
    rejected: int
    trimmed: int
    trimmed_prompts: int
    dropped: dict[str, int]
    unread: dict[str, int]
    readers: dict[str, str]
    noticed: dict[str, int]
    sequences: int
    tokens: int
    trained_tokens: int
    text_bytes: int
    rejects: str | None
    engine: str
    handlers: tuple[str, ...]
    template: str | None
    eod: str | None


def preprocess(options: PreprocessOptions, progress: Progress | None = None) -> PreprocessSummary:
    """Preprocess raw data. Writes pairs of `.bin/.idx` files, and the record `{output_prefix}.json`:

    - plain text: `{output_prefix}_{key}_document` for each json key
    - conversations: `{output_prefix}_packed_{input_ids,attention_mask,labels}_document`
    - preferences: `{output_prefix}_packed_{chosen,rejected}_{input_ids,labels}_document`
    - unpaired preferences: `{output_prefix}_packed_completion_{input_ids,labels,desirable}_document`

    Files get their final names only when everything is tokenised; the record comes last.

    Args:
        progress: called with (documents done, bytes of text done).

    Raises:
        UserError: an option does not fit the data, a row is unusable and `on_bad` is "stop", or no row was usable.
    """
    _require_output_folder(options.output_prefix)
    sources = _open(options)
    with source_entries([file for source in sources for file in source.files]) as entries:
        try:
            return _preprocess(options, sources, entries, progress)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise UserError(
                f"{options.output_prefix}: {error.strerror}; make room and run the same command again. It continues "
                f"with what is tokenised so far"
            ) from None


def try_first_rows(options: PreprocessOptions) -> tuple[TokenizedChunk, Source]:
    """Tokenise the first block of the input, about a megabyte, to see whether `preprocess` would work.

    Writes nothing. Returns the block, and the source that it is of.

    Raises:
        UserError: as `preprocess`.
    """
    sources = _open(options)
    job, _ = job_of(options, sources, Tokenizer(options.tokenizer_name_or_path))
    for block in iter_source_blocks(sources, options.max_samples):
        return _checked(job(block), options), sources[block.source]
    raise UserError(f"{_files(sources)}: no rows")


def kind_of_input(options: PreprocessOptions) -> Kind:
    """The kind of the input, recognised by the first record.

    Raises:
        UserError: as `preprocess`.
    """
    return _open(options)[0].handler.kind


def readers_of(
    unread: Iterable[str], held: Collection[str], sources: Sequence[Source], options: PreprocessOptions
) -> dict[str, str]:
    """By column that is not read, the option that would read it. `held` are columns as in `TokenizedChunk`."""
    readers = {}
    handlers = [source.handler for source in sources if isinstance(source.handler, InstructionHandler)]
    for handler in handlers:
        for column in unread:
            if key := handler.reader_of(column, held):
                names = json.dumps({**(options.map_keys or {}), key: column}, ensure_ascii=False)
                is_listed = options.handler_name == LLAMA_FACTORY
                readers[column] = f'"columns": {names} in {DATASET_INFO}' if is_listed else f"--map-keys '{names}'"
    return readers


def _open(options: PreprocessOptions) -> list[Source]:
    return open_sources(
        options.input,
        options.handler_name,
        options.json_keys,
        options.map_keys,
        options.dataset_dir,
        skip_bad=options.on_bad == "skip",
    )


def _preprocess(
    options: PreprocessOptions,
    sources: Sequence[Source],
    entries: Callable[[], list[dict[str, Any]]],
    progress: Progress | None,
) -> PreprocessSummary:
    tokenizer = Tokenizer(options.tokenizer_name_or_path)
    job, template = job_of(options, sources, tokenizer)
    kind = sources[0].handler.kind
    prefixes = {key: kind.pair(options.output_prefix, key) for key in job.output_keys}
    names = {key: os.path.basename(prefix) for key, prefix in prefixes.items()}
    rejects = Path(f"{options.output_prefix}{REJECTS_SUFFIX}")
    _require_names(options.output_prefix, names, rejects, sources)

    keys = ("input_ids", "labels") if options.pack else job.output_keys
    spool = Spool(options.output_prefix, keys, _identity(options, tokenizer, template, sources))
    try:
        job.engine = _engine(job, tokenizer, sources, options)
        _tokenize(job, sources, options, spool, progress)
        _require_kept(spool, sources)
        _require_mapped(spool, sources)
        noticed = {**spool.counters["noticed"], "repeated": spool.repeated()}
        order = _order(spool, sources, options)
        remove_record(options.output_prefix, names)  # an old record must never meet the new data
        spool.publish_rejects(rejects)
        if options.pack or order is not None:
            _rewrite(spool, order, prefixes, tokenizer, options)
        else:
            spool.publish(prefixes)
    except UserError:
        spool.remove()  # the same command would fail again
        raise
    spool.remove()

    counts = spool.counts
    if order is not None:  # samples were left out or repeated
        written = DataView(options.output_prefix, options.pack).statistics()
        counts.update(tokens=written.tokens - counts["tokens"])
        counts.update(trained_tokens=written.trained_tokens - counts["trained_tokens"])
    summary = PreprocessSummary(
        prefixes=prefixes,
        data_paths=kind.data_paths(options.output_prefix, job.output_keys),
        documents=counts["documents"],
        kept=counts["kept"],
        rejected=spool.rejected,
        trimmed=counts["trimmed"],
        trimmed_prompts=counts["trimmed_prompts"],
        dropped=dict(spool.dropped),
        unread=dict(spool.counters["unread"]),
        readers=readers_of(spool.counters["unread"], spool.counters["held"], sources, options),
        noticed={name: count for name, count in noticed.items() if count},
        sequences=len(IndexedDataset(prefixes[job.output_keys[0]])),
        tokens=counts["tokens"],
        trained_tokens=counts["trained_tokens"],
        text_bytes=counts["text_bytes"],
        rejects=str(rejects) if spool.rejected else None,
        engine=job.engine.name,
        handlers=tuple(source.handler_name for source in sources),
        template=template.name if template else None,
        eod=None if job.eod is None else tokenizer.decode([job.eod]),
    )
    write_record(options.output_prefix, names, _record(options, sources, tokenizer, template, entries(), summary))
    return summary


def _engine(job: ChunkTokenizer, tokenizer: Tokenizer, sources: Sequence[Source], options: PreprocessOptions) -> Engine:
    """The fastest engine that gives the job's ids."""
    engine = choose_engine(tokenizer, job.engine, _sample(job, sources), options.workers)
    if not options.spells:
        return engine
    return SpellingEngine(engine, tokenizer, job.special, job.adds_special_tokens)


def _sample(job: ChunkTokenizer, sources: Sequence[Source]) -> list[str]:
    """Some texts from the beginning of some of the files, as the job tokenises them."""
    files = [(number, file) for number, source in enumerate(sources) for file in source.files]
    texts: list[str] = []
    for number, file in files[:: -(-len(files) // _SAMPLED_FILES)]:
        size = 0
        for row in (row for block in islice(iter_blocks([file]), 1) for row in block.rows()):
            try:
                _, document = job.read_row(row, number, str(file))
                texts_of_row = [text[:_SAMPLED_CHARACTERS] for text in job.texts(document)]
            except UserError:
                continue  # reported later, when the row is tokenised
            texts += texts_of_row
            size += sum(map(len, texts_of_row))
            if size >= _SAMPLED_CHARACTERS:
                break
    return texts


def _tokenize(
    job: ChunkTokenizer, sources: Sequence[Source], options: PreprocessOptions, spool: Spool, progress: Progress | None
) -> None:
    """Tokenise the rest of the input into the spool."""
    reported = 0
    blocks = iter_source_blocks(sources, options.max_samples)
    for chunk in tokenize_blocks(job, islice(blocks, spool.blocks, None), options.workers):
        spool.add(_checked(chunk, options))
        documents = spool.counts["documents"]
        if progress and documents - reported >= options.log_interval:
            reported = documents
            progress(documents, spool.counts["text_bytes"])


def _checked(chunk: TokenizedChunk, options: PreprocessOptions) -> TokenizedChunk:
    if chunk.rejects and options.on_bad == "stop":
        raise UserError(f"{chunk.rejects[0].reason} (`tandem preprocess --on-bad skip` leaves such rows out)")
    return chunk


def _require_kept(spool: Spool, sources: Sequence[Source]) -> None:
    first = f"; first rejected row: {spool.first_reason}" if spool.rejected else ""
    require(
        bool(spool.counts["kept"]),
        f"{_files(sources)}: none of the {spool.counts['documents']} documents can be used; "
        f"rejected {spool.rejected}, dropped {dict(spool.dropped)}{first}",
    )


def _require_mapped(spool: Spool, sources: Sequence[Source]) -> None:
    """Raise UserError for a column that `map_keys` names and no row has. A row alone may lack it: it is then empty."""
    for number, source in enumerate(sources):
        handler = source.handler
        for column in handler.mapped_columns if isinstance(handler, InstructionHandler) else ():
            require(
                bool(spool.counters["mapped"][mapped_key(number, column)] or not spool.kept_of[str(number)]),
                f"{_files([source])}: no row has the field {column!r}, which --map-keys or dataset_info.json names"
                f"{nearest(column, list(spool.counters['unread']))}",
            )


def _order(spool: Spool, sources: Sequence[Source], options: PreprocessOptions) -> np.ndarray | None:
    """The order of the spool's sequences when sources are interleaved; None: as they are stored."""
    if options.mix_strategy == "concat" or len(sources) == 1:
        return None
    kept = [spool.kept_of[str(number)] for number in range(len(sources))]
    for source, count in zip(sources, kept):
        require(count > 0, f"{_files([source])}: no row can be used, so it cannot be interleaved; leave it out")
    probabilities = options.interleave_probs
    if probabilities is not None and len(probabilities) != len(sources):
        given = ",".join(map(str, probabilities))
        raise UserError(f"--interleave-probs {given}: expected one for each of the {len(sources)} datasets")
    return interleaved(kept, probabilities, options.seed, options.mix_strategy == "interleave_over")


def _files(sources: Sequence[Source]) -> str:
    return ", ".join(str(file) for source in sources for file in source.files)


def _rewrite(
    spool: Spool,
    order: np.ndarray | None,
    prefixes: Mapping[str, str],
    tokenizer: Tokenizer,
    options: PreprocessOptions,
) -> None:
    """Write the sequences in another order, packed or not."""
    stored = spool.datasets()
    columns: Mapping[str, Sequences] = stored
    if order is not None:
        columns = {key: Selection(dataset, order) for key, dataset in stored.items()}
    if options.pack:
        assert options.seq_length is not None
        assert tokenizer.pad_id is not None
        rows = packed_rows(
            columns["input_ids"], columns["labels"], options.seq_length, tokenizer.pad_id, options.neat_pack
        )
    else:
        count = len(next(iter(columns.values())).lengths)
        rows = ({key: columns[key][index] for key in columns} for index in range(count))
    with ExitStack() as stack:
        writers = {key: stack.enter_context(IndexedWriter(prefix, np.int32)) for key, prefix in prefixes.items()}
        for row in rows:
            for key, writer in writers.items():
                writer.add_document(row[key])


def _identity(
    options: PreprocessOptions, tokenizer: Tokenizer, template: Template | None, sources: Sequence[Source]
) -> str:
    """A hash of everything that decides the output. For input files it takes size and time, not their content."""
    files = [file for source in sources for file in source.files]
    return fingerprint(
        {
            "version": __version__,
            "options": _recorded_options(options, sources),
            "handlers": [str(source.handler) for source in sources],
            "limits": [source.max_samples for source in sources],
            "tokenizer": tokenizer_entry(tokenizer),
            "template": template_entry(template) if template else None,
            "sources": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        }
    )


def _recorded_options(options: PreprocessOptions, sources: Sequence[Source]) -> dict[str, Any]:
    recorded = options.recorded()
    # Whoever reads the record later may stand in another folder.
    recorded["tokenizer_name_or_path"] = os.path.abspath(options.tokenizer_name_or_path)
    for name in ("workers", "log_interval"):  # they do not change the data
        del recorded[name]
    if not options.handler_name:  # record the handler that was recognised
        recorded |= {"handler_name": sources[0].handler_name, "map_keys": sources[0].map_keys}
    return recorded


def _record(
    options: PreprocessOptions,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    template: Template | None,
    hashes: list[dict[str, Any]],
    summary: PreprocessSummary,
) -> dict[str, Any]:
    counts = asdict(summary)
    for name in ("prefixes", "data_paths", "rejects", "readers", "engine", "handlers", "template", "eod"):
        del counts[name]
    return {
        "tokenizer": tokenizer_entry(tokenizer),
        "template": template_entry(template) if template else None,
        "options": _recorded_options(options, sources),
        "sources": hashes,
        "counts": counts,
    }


def _require_output_folder(output_prefix: str) -> None:
    check_writable(_folder(output_prefix))
    require(
        bool(os.path.basename(output_prefix)),
        f"--output-prefix {output_prefix}: is a folder; add a name for the files, such as {output_prefix}data",
    )


def _require_names(output_prefix: str, names: Mapping[str, str], rejects: Path, sources: Sequence[Source]) -> None:
    """Raise UserError where the output files cannot have these names."""
    longest = os.pathconf(nearest_folder(_folder(output_prefix)), "PC_NAME_MAX")
    for pair in names.values():
        over = len(os.fsencode(part_of(Path(f"{pair}.idx")).name)) - longest
        require(
            over <= 0,
            f"--output-prefix {output_prefix}: file names would be {over} bytes too long; choose a shorter one",
        )
    require_no_other_record(output_prefix, names)
    for file in (file for source in sources for file in source.files):
        require(
            file.resolve() != rejects.resolve(),
            f"{file}: is the input, but rejected rows would be written to this file; choose another --output-prefix",
        )


def _folder(output_prefix: str) -> Path:
    return Path(os.path.abspath(os.path.dirname(output_prefix)))
