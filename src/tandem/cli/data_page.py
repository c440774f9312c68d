"""What `tandem inspect data` shows, as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tandem.checkpoints.publish import write_text_atomically
from tandem.data.record import read_record
from tandem.data.statistics import DataView, Span, Statistics
from tandem.data.tokenizer import Tokenizer

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a90d9; --trained: #2a9d4b33; --edge: #2a9d4b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { border-bottom: 1px solid var(--line); padding: .2rem 1rem .2rem 0; }
td { vertical-align: top; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { width: 30rem; } td.bar div { background: var(--bar); height: .9rem; min-width: 1px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: .8rem; font-size: 13px; }
mark { color: inherit; background: var(--trained); box-shadow: 0 1px 0 var(--edge); }
summary { cursor: pointer; } summary span { opacity: .7; margin-left: 1rem; }
"""


def write_page(path: str, view: DataView, tokenizer: Tokenizer | None, count: int) -> None:
    """Write the counts, the record and the first `count` samples, in which trained text is marked."""
    samples = []
    for index in range(min(count, len(view))):
        assert tokenizer is not None
        samples.append(_sample(view, index, tokenizer))
    found = read_record(view.data_path)
    parts = [_counts(view.statistics()), _record(found[1]) if found else "", *samples]
    title = escape(view.data_path)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )
    write_text_atomically(Path(path), page)


def _counts(statistics: Statistics) -> str:
    share = statistics.trained_tokens / max(1, statistics.tokens)
    rows = [
        ("sequences", f"{statistics.sequences:,}"),
        ("documents in them", f"{statistics.documents:,}"),
        ("tokens", f"{statistics.tokens:,}"),
        ("trained tokens", f"{statistics.trained_tokens:,} ({share:.1%})"),
        ("fill rate", f"{statistics.fill_rate:.2%}"),
    ]
    most = max((count for *_, count in statistics.histogram), default=1)
    bars = "".join(
        f'<tr><td class="number">{first:,} – {last:,}</td><td class="number">{count:,}</td>'
        f'<td class="bar"><div style="width:{count / max(1, most):.2%}"></div></td></tr>'
        for first, last, count in statistics.histogram
    )
    return f"<h2>Counts</h2>{_table(rows)}<h2>Tokens of a sequence</h2><table>{bars}</table>"


def _record(record: Mapping[str, Any]) -> str:
    template, counts, options = record["template"], record["counts"], record["options"]
    rows = [
        ("tokenizer", f"{options['tokenizer_name_or_path']}, sha256 {record['tokenizer']['sha256'][:16]}…"),
        *([("prompt type", template["prompt_type"]), ("thinking", template["enable_thinking"])] if template else []),
        ("options", ", ".join(f"{name} {value}" for name, value in options.items() if value)),
        ("documents read", f"{counts['documents']:,}"),
        *((name, f"{counts[name]:,}") for name in ("kept", "rejected", "trimmed")),
        *((f"dropped: {reason}", f"{count:,}") for reason, count in counts["dropped"].items() if count),
        *((source["file"], f"{source['bytes']:,} bytes") for source in record["sources"]),
    ]
    return f"<h2>Made from</h2>{_table(rows)}"


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    cells = [f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in rows]
    return f"<table>{''.join(cells)}</table>"


def _sample(view: DataView, index: int, tokenizer: Tokenizer) -> str:
    spans = view.spans(index, tokenizer)
    marked = view.is_instruction_dataset
    note = "trained text is marked" if marked else "all of it is trained"
    text = "".join(_span(span, marked) for span in spans)
    # A line feed right behind <pre> would not be shown.
    return (
        f"<details open><summary>{escape(view.title(index))}<span>{note}</span></summary><pre>\n{text}</pre></details>"
    )


def _span(span: Span, marked: bool) -> str:
    text = escape(span.text)
    return f"<mark>{text}</mark>" if marked and span.trained else text
