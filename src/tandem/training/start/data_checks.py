"""Checks that data fit a run, from their files and their record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tandem.config.settings import DataSettings
from tandem.data.indexed import IndexedDataset
from tandem.data.kinds import Kind, dataset_of_pair, kind_of
from tandem.data.no_dataset import no_dataset
from tandem.data.preprocess.chunks import TOO_LONG
from tandem.data.record import check_record, read_record, record_of, template_entry
from tandem.data.templates.catalog import PROMPT_TYPES, THINKING_MODES, get_template, template_from_entry
from tandem.data.templates.messages import CHAT_TEMPLATE, Template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError

_CHECKED_ROWS = 8
_RESETS = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")  # flags that need end-of-document tokens


def check_data(
    prefix: str, kind: Kind, data: DataSettings, tokenizer: Tokenizer | None
) -> tuple[list[str], dict[str, Any] | None]:
    """Check the data of a prefix.

    Returns:
        Notices for the user, and the chat template in the record; without a record, the template of the flags.

    Raises:
        UserError: the data are missing, are of another kind, or do not fit the run.
    """
    check_files(prefix, kind)
    notices = _notice_of_cuts(prefix, kind, data)
    if tokenizer is None:
        return [*notices, f"{prefix}: without a tokenizer nothing shows that the data belong to the model"], None
    template = _named_template(prefix, data, tokenizer)
    notice = check_record(prefix, tokenizer, template, data.seq_length)
    if notice:
        if not kind.has_labels:
            return [*notices, notice], None
        notices += _notices_of_unrecorded_rows(prefix, kind, data)
        if template is None:
            notice += "; give --prompt-type to store the chat template in the checkpoint, for `tandem generate`"
        return [*notices, notice], template_entry(template) if template else None
    path_and_record = read_record(prefix)
    assert path_and_record is not None, "without a record there is a notice"
    path, record = path_and_record
    _require_recorded_size(prefix, kind, path, record)
    if kind.has_labels:
        _require_borders_between_answers(prefix, record, data, tokenizer)
    return [*notices, *_notices_of_record(prefix, kind, record, data)], record["template"] if kind.has_labels else None


def _require_recorded_size(prefix: str, kind: Kind, path: Path, record: dict[str, Any]) -> None:
    """Raise UserError when the record belongs to other data."""
    if not kind.has_labels and len(record["files"]) > 1:
        return  # the record has only one number of texts, but several json keys may have different numbers
    sequences = len(IndexedDataset(kind.first_pair(prefix)))
    recorded = record["counts"]["sequences"]
    if sequences != recorded:
        raise UserError(
            f"{path}: counts.sequences is {recorded}, but {prefix} has {sequences}: the record belongs to other data; "
            f"preprocess again, or remove the record"
        )


def _require_borders_between_answers(
    prefix: str, record: dict[str, Any], data: DataSettings, tokenizer: Tokenizer
) -> None:
    """Raise UserError when --reset-attention-mask or --reset-position-ids would cut answers from their prompts."""
    resets = [name for name in ("reset_attention_mask", "reset_position_ids") if getattr(data, name)]
    made = record["options"]
    if not (resets and made["pack"] and not made["neat_pack"]) or names_end(prefix):
        return
    template = template_of(prefix, tokenizer)
    if template is not None and template.stop_word in template.answer_header:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in resets)
        raise UserError(
            f"{prefix}: packed without --neat-pack, and {template.stop_word} of prompt type {template.name} ends "
            f"prompts as well as answers, so {flags} would cut answers from their prompts; leave the flags out, or "
            f"preprocess again with --pack --neat-pack, which stores the borders"
        )


def _notices_of_record(prefix: str, kind: Kind, record: dict[str, Any], data: DataSettings) -> list[str]:
    """Notices about how the data were preprocessed.

    Raises:
        UserError: --neat-pack must keep conversations apart, and the data do not show where they end.
    """
    made, counts = record["options"], record["counts"]
    notices = []
    resets = [name for name in _RESETS if getattr(data, name)]
    if resets and made.get("eod_token"):
        notices.append(
            f"{prefix}: each document ends with {made['eod_token']}, as --eod-token said when they were made"
        )
    if resets and not kind.has_labels and not made["append_eod"]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in resets)
        notices.append(
            f"{prefix}: made without --append-eod, so nothing shows where a document ends, unless the texts contain "
            f"the end-of-document token: {flags} find no other borders, and documents see each other"
        )
    if kind.has_labels and not made["pack"] and (data.reset_attention_mask or data.reset_position_ids):
        notices.append(
            f"{prefix}: not packed, so conversations are already apart: --reset-attention-mask and "
            f"--reset-position-ids have no effect"
        )
    borders = made["neat_pack"] or (made["append_eod"] and (data.reset_attention_mask or data.reset_position_ids))
    if made["pack"] and not borders:
        problem = f"{prefix}: packed without --neat-pack, so nothing shows where the conversations of a row end"
        if data.neat_pack:
            raise UserError(
                f"{problem}, and --neat-pack cannot keep them apart; preprocess again with --pack --neat-pack, or "
                f"without --pack and let training pack them"
            )
        notices.append(f"{problem}: they see each other")
    cut = counts["trimmed"] + counts["dropped"].get(TOO_LONG, 0)
    if cut and made["seq_length"] < data.seq_length:
        notices.append(
            f"{prefix}: preprocessing cut or left out {cut:,} conversations to fit --seq-length "
            f"{made['seq_length']}; this run has room for {data.seq_length}"
        )
    return notices


def is_packed(prefix: str) -> bool | None:
    """Whether preprocessing packed these conversations; None without a record."""
    record = record_of(prefix)
    return bool(record["options"]["pack"]) if record else None


def names_end(prefix: str) -> bool:
    """Whether --eod-token named the token that ends the documents of these data."""
    record = record_of(prefix)
    return bool(record and record["options"].get("eod_token"))


def end_of_documents(prefix: str, tokenizer: Tokenizer | None) -> int | None:
    """The token that ends a document: the one of --eod-token, as the record has it, or the tokenizer's eos_token.

    Raises:
        UserError: the tokenizer does not have the token of the record.
    """
    record = record_of(prefix)
    named = record["options"].get("eod_token") if record else None
    if tokenizer is None or named is None:
        return tokenizer.eos_id if tokenizer else None
    return tokenizer.require_id(named)


def check_files(prefix: str, kind: Kind) -> None:
    """Raise UserError when there are no files of this kind, or training cannot use them. The error says what to do."""
    if (whole := dataset_of_pair(prefix)) is not None:
        raise UserError(f"{prefix}: one of several files that belong together: give {whole}, the prefix of all of them")
    if kind.command and kind.exists_at(prefix):
        return
    if other := kind_of(prefix):
        raise UserError(f"{prefix}: these data are {other.in_words}")
    raise no_dataset(prefix, kind.first_pair(prefix))


def _notice_of_cuts(prefix: str, kind: Kind, data: DataSettings) -> list[str]:
    """A notice about conversations, or pairs of them, that are longer than --seq-length, which training cuts."""
    if not kind.has_labels:
        return []
    lengths = np.max([IndexedDataset(kind.pair(prefix, columns.ids)).lengths for columns in kind.columns], axis=0)
    longer = int(np.count_nonzero(lengths > data.seq_length))
    if not longer:
        return []
    how = ", turn by turn" if len(kind.columns) == 1 else ", both answers to the same length"
    return [
        f"{prefix}: {longer:,} of {len(lengths):,} {kind.name} are longer than --seq-length {data.seq_length} (up to "
        f"{lengths.max():,} tokens) and are cut{how}; `tandem preprocess --seq-length {data.seq_length} "
        f"--over-long drop` leaves them out"
    ]


def _notices_of_unrecorded_rows(prefix: str, kind: Kind, data: DataSettings) -> list[str]:
    """Notices about data without a record. Rows of equal length may be packed.

    Raises:
        UserError: --seq-length would cut packed rows, and lose whole conversations.
    """
    segments = kind.columns[0].segments
    lengths = IndexedDataset(kind.first_pair(prefix)).lengths
    if segments is None or len(lengths) < 2 or lengths.min() != lengths.max():
        return []
    length = int(lengths[0])
    mask = IndexedDataset(kind.pair(prefix, segments))
    if any((mask[row] != 1).any() for row in range(min(len(mask), _CHECKED_ROWS))):
        if length > data.seq_length:
            raise UserError(
                f"{prefix}: the rows of {length:,} tokens are packed; --seq-length {data.seq_length} would cut them: "
                f"train with --seq-length {length}, or pack again"
            )
        return []
    return [
        f"{prefix}: all rows have {length:,} tokens and no borders: if they are packed, their conversations see each "
        f"other" + (f", and --seq-length {data.seq_length} cuts rows, not conversations" * (length > data.seq_length))
    ]


def template_of(prefix: str, tokenizer: Tokenizer | None) -> Template | None:
    """The template in the record of these conversations; None when there is no record, or the template is not known."""
    record = record_of(prefix)
    entry = record["template"] if record else None
    if tokenizer is None or entry is None or entry["prompt_type"] not in PROMPT_TYPES:
        return None
    if entry["prompt_type"] == CHAT_TEMPLATE and tokenizer.chat_template is None:
        return None
    template = template_from_entry(entry, tokenizer)
    return template if template and template.sha256 == entry["sha256"] else None


def _named_template(prefix: str, data: DataSettings, tokenizer: Tokenizer) -> Template | None:
    """The template of the flags; None when they name none. The record fills in a missing type or thinking mode."""
    if data.prompt_type is None and data.enable_thinking is None:
        return None
    record = record_of(prefix)
    recorded = (record["template"] if record else None) or {"prompt_type": None, "enable_thinking": None}
    prompt_type = data.prompt_type or recorded["prompt_type"]
    if prompt_type is None:
        return None
    mode = recorded["enable_thinking"] if data.enable_thinking is None else THINKING_MODES[data.enable_thinking]
    return get_template(prompt_type, mode, tokenizer)
