"""The HTML page of `tandem inspect data`, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tandem.data.preprocess.noticed import told_by_record
from tandem.data.record import record_of
from tandem.data.statistics import DataView, Span, Statistics
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.files.publish import write_text_atomically
from tandem.report.style import STYLE

# In addition to the style of the report.
_STYLE = """
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border:1px solid var(--rule);border-radius:8px;
padding:14px;font-size:13px}
mark{color:inherit;background:color-mix(in srgb,var(--c2) 22%,transparent);border-bottom:1px solid var(--c2)}
h1{overflow-wrap:anywhere}
td.share{width:80%} td.share div{height:12px;margin-top:4px;background:var(--c0);border-radius:2px;min-width:1px}
summary{cursor:pointer} summary small{margin-left:14px}
@media (max-width:600px){td.share{width:auto} pre{padding:8px}}
"""
_SHOWN_ELSEWHERE = ("input", "output_prefix", "tokenizer_name_or_path", "prompt_type", "enable_thinking")


def write_page(path: str, view: DataView, tokenizer: Tokenizer | None, count: int) -> None:
    """Write a page with the counts, the record, and the first `count` samples with trained text marked."""
    samples = []
    for index in range(min(count, len(view))):
        assert tokenizer is not None
        samples.append(_sample(view, index, tokenizer))
    record = record_of(view.data_path)
    statistics = view.statistics()
    sections = {
        "Counts": _counts(statistics),
        "Tokens of a sequence": _histogram(statistics),
        "Made from": _record(record) if record else "",
        "Samples": "".join(samples),
    }
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections.items() if content)
    title = escape(view.data_path)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}{_STYLE}</style></head><body><header><h1>{title}</h1></header><main>{body}</main></body></html>\n"
    )
    write_text_atomically(Path(path), page)


def _counts(statistics: Statistics) -> str:
    share = statistics.trained_tokens / max(1, statistics.tokens)
    return _table(
        [
            ("sequences", f"{statistics.sequences:,}"),
            ("documents in them", f"{statistics.documents:,}"),
            ("tokens", f"{statistics.tokens:,}"),
            ("trained tokens", f"{statistics.trained_tokens:,} ({share:.1%})"),
            ("fill rate", f"{statistics.fill_rate:.2%}"),
        ]
    )


def _histogram(statistics: Statistics) -> str:
    most = max((count for *_, count in statistics.histogram), default=1)
    bars = "".join(
        f"<tr><td>{first:,} – {last:,}</td><td>{count:,}</td>"
        f'<td class="share"><div style="width:{count / max(1, most):.2%}"></div></td></tr>'
        for first, last, count in statistics.histogram
    )
    return f'<table class="settings">{bars}</table>'


def _record(record: Mapping[str, Any]) -> str:
    template, counts, options = record["template"], record["counts"], record["options"]
    others = {name: value for name, value in options.items() if value and name not in _SHOWN_ELSEWHERE}
    rows = [
        ("tokenizer", f"{options['tokenizer_name_or_path']}, sha256 {record['tokenizer']['sha256'][:16]}…"),
        *([("prompt type", template["prompt_type"]), ("thinking", template["enable_thinking"])] if template else []),
        ("options", ", ".join(f"{name}: {value}" for name, value in others.items())),
        ("documents read", f"{counts['documents']:,}"),
        *((name, f"{counts[name]:,}") for name in ("kept", "rejected", "trimmed")),
        *([("trimmed in a prompt", f"{cut:,}")] if (cut := counts.get("trimmed_prompts")) else []),
        *((f"dropped: {reason}", f"{count:,}") for reason, count in counts["dropped"].items() if count),
        *(("note", line) for line in told_by_record(record)),
        *(("source", f"{source['file']}, {source['bytes']:,} bytes") for source in record["sources"]),
    ]
    return _table(rows)


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    cells = [f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in rows]
    return f'<table class="settings">{"".join(cells)}</table>'


def _sample(view: DataView, index: int, tokenizer: Tokenizer) -> str:
    spans = view.spans(index, tokenizer)
    marked = view.kind.has_labels
    note = "trained text is marked" if marked else "all of it is trained"
    text = "".join(_span(span, marked) for span in spans)
    # HTML does not show a line feed directly after <pre>, so one is added.
    summary = f"<summary>{escape(view.title(index))}<small>{note}</small></summary>"
    return f"<details open>{summary}<pre>\n{text}</pre></details>"


def _span(span: Span, marked: bool) -> str:
    text = escape(span.text)
    return f"<mark>{text}</mark>" if marked and span.trained else text
